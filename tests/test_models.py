"""Every model family against transformers: the same logits at every position, whatever way the tokens came through.

tests/data/<family> holds a tiny checkpoint, three token sequences and the logits that transformers computed for them in
float32 (see make_references.py). `logits_of` feeds the same sequences through scheduler, pack and model and keeps the
logits of every position, not only of those that would be sampled. The last part plants bugs and expects to see them.
"""

import functools
import inspect
import json
import math
import random
import re
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernels
import nanoserve
from nanoserve import GPT, LLM, ModelConfig, SamplingParams

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data"
FAMILIES = sorted(path.parent.name for path in DATA.glob("*/reference.safetensors"))
TUTORIAL = Path(__file__).parent.parent / "tutorial" / "model"
CPU = torch.device("cpu")
TOLERANCE = 1e-4


def config_of(family: str, **over) -> dict:
    """A family's config.json, with keys replaced; None stays None, `...` removes the key."""
    config = {**json.loads((DATA / family / "config.json").read_text()), **over}
    return {key: value for key, value in config.items() if value is not ...}


def read(family: str, dtype=torch.float32) -> GPT:
    return nanoserve.load(DATA / family, CPU, dtype)


cached = functools.cache(read)


@functools.cache
def reference(family: str) -> list[tuple[list[int], torch.Tensor]]:
    """[(tokens, logits [len, V]), ...] as transformers computed them: sequences of 1, 37 and 97 tokens."""
    stored = load_file(DATA / family / "reference.safetensors")
    return [(stored[f"tokens_{i}"].tolist(), stored[f"logits_{i}"]) for i in range(len(stored) // 2)]


def engine(model: GPT, shuffle: bool = True, **options) -> LLM:
    """An LLM with block ids in random order and a cache full of NaN, so that reading an unwritten slot shows."""
    options = {"max_batch_requests": 8, "prefix_caching": False, "block_size": 4, **options}
    llm = LLM(model, **options)
    llm.cache.data.fill_(math.nan)
    if shuffle:
        blocks = list(llm.pool.free)
        random.Random(1).shuffle(blocks)
        llm.pool.free = type(llm.pool.free).fromkeys(blocks)
    return llm


def logits_of(llm: LLM, sequences: list[list[int]], prompts: list[int] | None = None,
              before_step=None) -> list[torch.Tensor]:
    """The logits at every position of the sequences, [len, V] each; NaN where a prefix hit spared the computation.

    The first `prompts[i]` tokens of a sequence are the prompt (default: all). Whenever a request would sample, the next
    token of its sequence is appended instead, so it decodes along a given path, among all the others.
    """
    prompts = prompts or [len(tokens) for tokens in sequences]
    todo, got = {}, []
    for tokens, n in zip(sequences, prompts):
        request = llm.add_request(tokens[:n], SamplingParams(max_tokens=len(tokens) - n + 1))
        got.append(torch.full((len(tokens), llm.model.config.vocab_size), math.nan, dtype=llm.model.dtype))
        todo[request] = tokens, got[-1]
    for step in range(10_000):
        if not llm.has_work():
            return got
        if before_step:
            before_step(step)
        plan = llm.scheduler.schedule()
        batch, *_ = llm.pack(plan)
        batch.rows = torch.arange(len(batch.tokens))
        rows = llm.model.forward(batch, llm.cache).split([n for _, n in plan])
        for (request, n), logits in zip(plan, rows):
            tokens, mine = todo[request]
            mine[request.num_computed : request.num_computed + n] = logits
            if llm.scheduler.advance(request, n):
                if len(request.tokens) == len(tokens):
                    llm.scheduler.finish(request, "length")
                else:
                    request.tokens.append(tokens[len(request.tokens)])
        llm.scheduler.check()
    raise AssertionError("the requests do not finish")


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest difference; infinite if anything is NaN."""
    return max(math.inf if g.isnan().any() else (g - w).abs().max().item() for g, w in zip(got, want))


# ---- the ways that tokens come through ----


def one_shot(model, sequences):
    """Each sequence alone, in one step, blocks in order."""
    llm = engine(model, shuffle=False, block_size=16)
    return [logits_of(llm, [tokens])[0] for tokens in sequences]


def chunked(model, sequences):
    """Each sequence alone, seven tokens a step, in blocks that the chunks do not line up with."""
    llm = engine(model, block_size=5, max_batch_tokens=7, max_batch_requests=1)
    return [logits_of(llm, [tokens])[0] for tokens in sequences]


def batched(model, sequences):
    """All at once: one decodes from its first token on, one joins half-way, one is prefilled in chunks between them."""
    llm = engine(model, block_size=3, max_batch_tokens=23)
    return logits_of(llm, sequences + [sequences[1][:9]], [1, 14, 70, 2])[: len(sequences)]


def preempted(model, sequences):
    """Like batched, but everybody loses all blocks in turn, and the blocks lose what was in them."""
    llm = engine(model, max_batch_tokens=31)
    rng = random.Random(2)

    def preempt(step):
        if step % 4 == 3 and llm.scheduler.running:
            victim = rng.choice(llm.scheduler.running)
            blocks = list(victim.block_table)
            llm.scheduler.preempt(victim)
            llm.cache.data[:, :, blocks] = math.nan

    got = logits_of(llm, sequences, [1, 20, 80], preempt)
    assert llm.stats()["preemptions"] >= 4
    return got


def prefix_hits(model, sequences):
    """After others have left whole sequences in the cache; what a hit spares is taken from the run that computed it."""
    llm = engine(model, prefix_caching=True, max_batch_tokens=40)
    half = [tokens[: len(tokens) // 2] for tokens in sequences]
    first = logits_of(llm, half)
    again = logits_of(llm, sequences)
    last = logits_of(llm, sequences)
    cached_whole = sum((len(tokens) - 1) // 4 * 4 for tokens in sequences)
    cached_half = sum(len(tokens) // 4 * 4 for tokens in half)
    assert llm.stats()["hit_tokens"] == cached_half + cached_whole
    for short, middle, end in zip(first, again, last):
        hit = middle.isnan().all(-1)
        middle[hit] = short[: hit.sum()]
        hit = end.isnan().all(-1)
        end[hit] = middle[hit]
    return last


@pytest.fixture(params=["cpp", "torch"])
def bodies(request, monkeypatch):
    """Runs a test with the C++ bodies of the kernels and with the PyTorch ones."""
    if request.param == "cpp" and kernels.cpp_library(torch.float32) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(kernels, "use_cpp", request.param == "cpp")


@pytest.mark.parametrize("way", [one_shot, chunked, batched, preempted, prefix_hits], ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, way, bodies):
    sequences, want = zip(*reference(family))
    sequences = [tokens for tokens in sequences if way is not prefix_hits or len(tokens) > 1]
    want = [logits for logits in want if way is not prefix_hits or len(logits) > 1]
    assert error(way(cached(family), sequences), want) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_agrees_with_float32(family):
    sequences, want = zip(*reference(family))
    wide, narrow = batched(read(family, torch.float64), list(sequences)), batched(cached(family), list(sequences))
    assert wide[0].dtype == torch.float64
    assert error(wide, want) < TOLERANCE and error(wide, narrow) < TOLERANCE


def test_all_families_are_there():
    families = {config_of(name)["model_type"] for name in FAMILIES}
    assert families == set(ModelConfig.FAMILIES) and len(FAMILIES) == 18


def test_the_tutorial_model_in_transformers():
    """The default model is an ordinary Llama checkpoint: transformers loads it as it is and gets the same logits."""
    transformers = pytest.importorskip("transformers")
    if not (TUTORIAL / "model.safetensors").exists():
        pytest.skip("the default model is not there")
    peer = transformers.AutoModelForCausalLM.from_pretrained(TUTORIAL, dtype=torch.float32, attn_implementation="eager")
    model = nanoserve.load(TUTORIAL, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in (60, 301)]
    text = nanoserve.Tokenizer(TUTORIAL).encode("Once upon a time there was a fox who lived near the river.")
    tokens.append(text)
    with torch.no_grad():
        want = [peer(torch.tensor([ids]), use_cache=False).logits[0] for ids in tokens]
    got = logits_of(engine(model, block_size=16, max_batch_tokens=100), tokens)
    assert error(got, want) < TOLERANCE * max(1, max(w.abs().max().item() for w in want) / 10)
    want = peer.generate(torch.tensor([text]), max_new_tokens=20, do_sample=False)[0].tolist()
    out = LLM(model).generate([text], SamplingParams(max_tokens=20, temperature=0))[0]
    assert text + out.token_ids == want


# ---- rotary positions ----

ROPES = json.loads((DATA / "rope.json").read_text())
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
BASE = {"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 5e5}


def frequencies(config: dict, head_dim: int = 128) -> tuple[torch.Tensor, float]:
    return kernels.rope_frequencies(ModelConfig._rope(config), head_dim)


@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies_are_those_of_transformers(name):
    """Llama 3's scaling barely shows before position 500 and ruins 8,192: compare the frequencies themselves."""
    want = torch.tensor(ROPES[name]["inv_freq"], dtype=torch.float64)
    inv, scale = frequencies(ROPES[name]["config"], 2 * len(want))
    assert inv.dtype == torch.float32 and inv.shape == want.shape
    assert ((inv - want) / want).abs().max() < 1e-6
    assert scale == pytest.approx(ROPES[name]["attention_factor"], rel=1e-6)


def test_rope_table_keeps_positions_in_float32():
    """bfloat16 has no 257, float16 nothing beyond 65,504; the angle of position 131,071 must be right."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    table = kernels.rope_table(rope, 64, 131072, CPU)
    inv = kernels.rope_frequencies(rope, 64)[0]
    assert table.shape == (131072, 64) and table.dtype == torch.float32
    for position in (0, 1, 257, 4097, 131071):
        angles = (torch.tensor(float(position)) * inv).double()
        want = torch.cat([angles.cos(), angles.sin()])
        assert (table[position] - want).abs().max() < 1e-5


def test_rope_styles_of_old_and_new_configs_agree():
    want = frequencies(BASE | {"rope_scaling": LLAMA3})[0]
    old_name = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    no_theta = {key: value for key, value in BASE.items() if key != "rope_theta"}
    for config in (BASE | {"rope_scaling": old_name}, no_theta | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
                   BASE | {"rope_parameters": LLAMA3},
                   BASE | {"rope_theta": 1.0, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}):
        assert torch.equal(frequencies(config)[0], want), config
    plain = frequencies(BASE)[0]
    assert not torch.allclose(plain, want)
    for rope in ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}):
        assert torch.equal(frequencies(no_theta | {"rope_parameters": rope})[0], plain)


@pytest.mark.parametrize("family, theta", [("llama", 1e4), ("qwen3", 1e4), ("mixtral", 1e6)])
def test_rope_theta_has_the_familys_default(family, theta):
    inv = frequencies({"model_type": family, "max_position_embeddings": 128})[0]
    assert inv[1].item() == pytest.approx(theta ** (-2 / 128), rel=1e-6)


def test_rope_original_length_at_the_top_level_wins():
    inside = frequencies(BASE | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1024}})[0]
    both = frequencies(BASE | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 1024})[0]
    assert torch.equal(inside, both) and not torch.equal(both, frequencies(BASE | {"rope_scaling": LLAMA3})[0])


def test_rope_yarn_derives_its_factor():
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 32768}
    derived = frequencies(BASE | {"rope_scaling": yarn})
    explicit = frequencies(BASE | {"rope_scaling": yarn | {"factor": 4.0}})
    assert torch.equal(derived[0], explicit[0]) and derived[1] == explicit[1] == 0.1 * math.log(4) + 1


@pytest.mark.parametrize("over, message", [
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "needs factor"),
    ({"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
])
def test_rope_that_is_not_supported_is_refused_by_name(over, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig._rope(BASE | over)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(config_of("llama2", **over))


def test_rope_frequencies_refuse_a_type_they_do_not_know():
    with pytest.raises(ValueError, match="'su'"):
        kernels.rope_frequencies({"rope_type": "su", "rope_theta": 1e4}, 64)


# ---- configurations ----


@pytest.mark.parametrize("family, over, windows", [
    ("gpt2", {}, [0, 0]),
    ("llama2", {"sliding_window": 16}, [0, 0]),  # llama knows no windows
    ("mistral", {}, [0, 0]),
    ("mistral", {"sliding_window": ...}, [4096, 4096]),  # as transformers defaults
    ("mistral_window", {}, [16, 16]),
    ("mixtral", {}, [0, 0]),
    ("mixtral", {"sliding_window": ...}, [0, 0]),
    ("mixtral", {"sliding_window": 8}, [8, 8]),
    ("qwen2", {}, [0, 0]),  # names a window and does not use it
    ("qwen2_window", {}, [0, 16]),  # from max_window_layers on
    ("qwen2_window", {"max_window_layers": 0}, [16, 16]),
    ("qwen2_window", {"max_window_layers": ...}, [0, 0]),  # 28 by default
    ("qwen2_window", {"sliding_window": None}, [0, 0]),
    ("qwen3_window", {}, [16, 0]),  # layer_types overrules max_window_layers
    ("qwen3_window", {"layer_types": None}, [0, 16]),
    ("qwen3_window", {"use_sliding_window": False}, [0, 0]),
    ("qwen3_moe", {"sliding_window": 8}, [0, 0]),
    ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}, [8, 8]),
])
def test_windows_per_layer(family, over, windows):
    assert ModelConfig.from_dict(config_of(family, **over)).windows == windows


@pytest.mark.parametrize("family, over, message", [
    ("qwen3_window", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("llama2", {"num_attention_heads": 4, "num_key_value_heads": 3}, "4 query heads cannot share 3"),
    ("llama2", {"hidden_size": ...}, "hidden_size is missing"),
    ("llama2", {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
    ("llama2", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama2", {"model_type": ..., "architectures": ...}, "model_type"),
    ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
])
def test_configs_that_are_not_supported_are_refused_by_name(family, over, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ModelConfig.from_dict(config_of(family, **over))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family, expected", [
    ("llama3", {"head_dim": 16, "eos_ids": (91, 92, 93), "tie_embeddings": True, "num_kv_heads": 2}),
    ("llama2", {"eos_ids": (2,), "dtype": "float16", "num_kv_heads": 4, "head_dim": 8, "qk_norm": ""}),
    ("llama_bias", {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "num_kv_heads": 1}),
    ("qwen2", {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "dtype": "bfloat16"}),
    ("qwen3", {"head_dim": 24, "qk_norm": "head", "qkv_bias": False}),
    ("qwen3_moe_mixed", {"moe_layers": {1}, "norm_topk_prob": False, "expert_size": 16, "mlp_size": 40}),
    ("mixtral", {"moe_layers": {0, 1}, "norm_topk_prob": True, "num_experts": 4, "expert_size": 40}),
    ("olmoe_clip", {"clip_qkv": 2.0, "qk_norm": "full", "norm_topk_prob": False}),
    ("gpt2", {"mlp_size": 64, "rope": None, "tie_embeddings": True, "qkv_bias": True, "dtype": "float32"}),
    ("gpt2_prefixed", {"mlp_size": 128, "num_heads": 2, "head_dim": 16}),
])
def test_configs_say_what_a_family_has(family, expected):
    config = ModelConfig.from_dict(config_of(family))
    assert {name: getattr(config, name) for name in expected} == expected


# ---- the same tokens, whatever else goes on ----


def test_only_rows_that_are_wanted_are_computed():
    """`batch.rows` cuts the last layer: the logits are those of a full run, in the order asked for, repeats and all."""
    llm = engine(cached("qwen3"))
    tokens = reference("qwen3")[1][0]
    llm.add_request(tokens, SamplingParams(max_tokens=1))
    batch, *_ = llm.pack(llm.scheduler.schedule())
    assert batch.rows.tolist() == [len(tokens) - 1]
    batch.rows = torch.tensor([5, 36, 0, 5])
    got = llm.model.forward(batch, llm.cache)
    assert (got - reference("qwen3")[1][1][[5, 36, 0, 5]]).abs().max() < TOLERANCE


PROMPTS = [random.Random(i).choices(range(3, 90), k=k) for i, k in enumerate((1, 5, 30, 17, 3, 44, 8, 30))]
PROMPTS += [PROMPTS[5][:24] + PROMPTS[1], list(PROMPTS[2]), PROMPTS[5][:12]]  # shared prefixes, and one prompt twice


@functools.cache
def alone(family: str, dtype: torch.dtype) -> list[list[int]]:
    """The greedy tokens of each prompt, generated by itself."""
    return greedy(engine(cached(family, dtype), block_size=16), one_by_one=True)


def greedy(llm: LLM, one_by_one: bool = False) -> list[list[int]]:
    params = [SamplingParams(max_tokens=6 + 3 * (i % 4), temperature=0, ignore_eos=True) for i in range(len(PROMPTS))]
    if one_by_one:
        return [llm.generate([prompt], p)[0].token_ids for prompt, p in zip(PROMPTS, params)]
    return [out.token_ids for out in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("family, dtype", [("llama3", torch.float64), ("qwen3_window", torch.float64),
                                           ("mixtral", torch.float64), ("llama_yarn", torch.float32),
                                           ("gpt2", torch.float32)], ids=str)
@pytest.mark.parametrize("policy, prefix_caching", [("fcfs", False), ("fcfs", True), ("priority", True),
                                                    ("shortest", False), ("longest prompt first", True)])
def test_greedy_tokens_do_not_depend_on_the_batch(family, dtype, policy, prefix_caching):
    model, caching, block_size = cached(family, dtype), prefix_caching, 3
    if policy == "longest prompt first":
        policy = lambda request: -request.num_prompt  # noqa: E731
    want = alone(family, dtype)
    roomy = engine(model, policy=policy, prefix_caching=caching, block_size=block_size, max_batch_tokens=37)
    assert greedy(roomy) == want
    c = model.config
    one = nanoserve.KVCache.bytes_per_block(c.num_layers, block_size, c.num_kv_heads, c.head_dim, dtype.itemsize)
    tight = engine(model, policy=policy, prefix_caching=caching, block_size=block_size, max_batch_tokens=21,
                   kv_memory=26 * one)
    assert greedy(tight) == want
    stats = tight.stats()
    assert stats["preemptions"] > 0 and stats["blocks_used"] == 0 and roomy.stats()["preemptions"] == 0
    assert (stats["hit_tokens"] > 0 and roomy.stats()["hit_tokens"] > 0) == caching


# ---- planted bugs: each must be seen by the comparison above, or the comparison is too weak ----

ATTENTION, QKV, POSITIONS = "kernels.paged_attention", "kernels.rope_and_write_kv", "nanoserve.LLM.lay_out"
FORWARD, MLP, CLIP = "nanoserve.GPT.forward", "nanoserve.GPT._mlp", "nanoserve.GPT._normalize_and_clip"
MUTANTS = {  # name: (family that notices, function, text of its source, what is there instead, ...)
    "interleaved rope": ("llama2", "kernels.apply_rope", "x.to(cos.dtype).chunk(2, dim=-1)",
                         "x.to(cos.dtype)[..., ::2], x.to(cos.dtype)[..., 1::2]"),
    "rope turns the other way": ("llama2", "kernels.apply_rope", "a * cos - b * sin, b * cos + a * sin",
                                 "a * cos + b * sin, b * cos - a * sin"),
    "no rope scaling of llama 3": ("llama3", "kernels.rope_frequencies", 'kind == "default"', 'kind != "yarn"'),
    "no attention scale of yarn": ("llama_yarn", "kernels.rope_frequencies", "_yarn_scale(rope, factor)", "1.0"),
    "window too wide by one": ("mistral_window", ATTENTION, "key > query - window", "key >= query - window"),
    "window too narrow by one": ("mistral_window", ATTENTION, "key > query - window", "key > query - window + 1"),
    "window from the chunk's start": ("mistral_window", ATTENTION, "key > query - window",
                                      "key > length - (end - start) - window"),
    "window in the wrong layer": ("qwen3_window", FORWARD, "c.windows, cache", "c.windows[::-1], cache"),
    "window in every layer": ("qwen2_window", FORWARD, "c.windows, cache", "[max(c.windows)] * len(c.windows), cache"),
    "no window": ("qwen2_window", FORWARD, "scale, window, scales)", "scale, 0, scales)"),
    "wrong grouping of heads": ("llama3", ATTENTION, "kv_heads, -1, head_dim)",
                                "-1, kv_heads, head_dim).transpose(1, 2)", "lhd->nhgd", "lhd->nghd"),
    "attention blind to its own token": ("llama2", ATTENTION, "key <= query", "key < query + (query == 0)"),
    "attention sees one token ahead": ("llama2", ATTENTION, "key <= query", "key <= query + 1"),
    "chunks attend as if they came first": ("llama2", ATTENTION, "key[length - (end - start):, None]",
                                            "key[: end - start, None]"),
    "no attention scale": ("llama2", FORWARD, "head_dim**-0.5", "head_dim**0"),
    "k normalised after rope": ("qwen3", QKV, ", rms_norm(k, k_norm, eps)", ", k",
                                "write_kv(k, v", "write_kv(k if k_norm is None else rms_norm(k, k_norm, eps), v"),
    "k not normalised": ("qwen3_moe", QKV, ", rms_norm(k, k_norm, eps)", ", k"),
    "positions restart in each chunk": ("llama2", POSITIONS, "tokens, positions, slots",
                                        "tokens, np.arange(len(tokens)) - query_start[:-1][owner], slots"),
    "learned positions restart in each chunk": ("gpt2", POSITIONS, "tokens, positions, slots",
                                                "tokens, np.arange(len(tokens)) - query_start[:-1][owner], slots"),
    "block ids taken for consecutive": ("llama2", ATTENTION, "block_tables[b, : -(-length // block_size)].long()",
                                        "block_tables[b, 0] + torch.arange(-(-length // block_size))"),
    "no bias of q, k and v": ("qwen2", FORWARD, "h, layer.qkv, layer.qkv_bias", "h, layer.qkv"),
    "no bias after attention": ("llama_bias", FORWARD, "attended, layer.o, layer.o_bias", "attended, layer.o"),
    "no bias in the mlp": ("llama_bias", MLP, "h, layer.down, layer.down_bias", "h, layer.down"),
    "exact gelu": ("gpt2", "kernels.linear", 'approximate="tanh"', 'approximate="none"'),
    "norm_topk_prob flipped, on": ("olmoe", MLP, "if c.norm_topk_prob", "if not c.norm_topk_prob"),
    "norm_topk_prob flipped, off": ("qwen3_moe", MLP, "if c.norm_topk_prob", "if not c.norm_topk_prob"),
    "one expert too few": ("mixtral", MLP, "topk(c.experts_per_token", "topk(c.experts_per_token - 1"),
    "softmax over the chosen experts": ("olmoe", MLP, ".float().softmax(-1)", ".float()",
                                        "if c.norm_topk_prob:", "weights = weights.softmax(-1)\n        if 0:"),
    "no clipping": ("olmoe_clip", CLIP, "qkv if clip is None else", "qkv if True else"),
    "v normalised too": ("olmoe", CLIP, ", v]", ", kernels.rms_norm(v, k_norm, eps)]"),
    "gate and up swapped": ("llama2", "kernels.silu_mul", "F.silu(gate) * up", "F.silu(up) * gate"),
    "no mean taken off in LayerNorm": ("gpt2", "kernels.add_norm", "wide = wide - wide.mean(-1, keepdim=True)", "pass"),
    "norm of x before the addition": ("llama2", "kernels.add_norm", "wide = x.to(",
                                      "wide = (x - (0 if delta is None else delta)).to("),
}


def mutate(monkeypatch, target: str, *edits: str) -> None:
    """Replace a function by one whose source was edited: edits are pairs of (old, new) text."""
    owner, name = target.rsplit(".", 1)
    module = {"kernels": kernels, "nanoserve": nanoserve}[owner.split(".")[0]]
    place = functools.reduce(getattr, owner.split(".")[1:], module)
    source = textwrap.dedent(inspect.getsource(getattr(place, name)))
    for old, new in zip(edits[::2], edits[1::2]):
        assert old in source, f"{target} no longer contains {old!r}: plant this bug anew"
        source = source.replace(old, new)
    scope = {}
    exec("from __future__ import annotations\n" + source, module.__dict__, scope)
    monkeypatch.setattr(place, name, scope[name])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_shows(name, monkeypatch):
    family, *edits = MUTANTS[name]
    monkeypatch.setattr(kernels, "use_cpp", False)
    # Weights that are multiplied through oneDNN take another path through `linear`; here the plain one is under test.
    monkeypatch.setattr(kernels, "pack_weight", lambda weight, dtype: weight)
    sequences, want = zip(*reference(family))
    assert error(batched(read(family), list(sequences)), want) < TOLERANCE
    mutate(monkeypatch, *edits)
    assert error(batched(read(family), list(sequences)), want) > 10 * TOLERANCE


def test_without_packing_the_logits_are_the_same(monkeypatch):
    """Where oneDNN lacks the operations, plain F.linear takes over."""
    monkeypatch.setattr(kernels, "pack_weight", lambda weight, dtype: weight)
    for family in ("gpt2", "llama_bias", "mixtral"):
        sequences, want = zip(*reference(family))
        assert error(batched(read(family), list(sequences)), want) < TOLERANCE
