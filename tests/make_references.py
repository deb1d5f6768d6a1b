"""Make the reference data under tests/data: tiny checkpoints, RoPE frequencies and tokenizers.

Run once by hand, `python tests/make_references.py`; needs torch, transformers, tokenizers and safetensors.
Every checkpoint is random but drawn so that mistakes show: norm weights are not one, biases are not zero,
attention is peaky and reaches far back. The reference logits are those of transformers in float32.
`--check` only reloads what is stored and compares.
"""

import argparse
import datetime
import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import chat_template_utils, logging

DATA = Path(__file__).parent / "data"
LENGTHS = (1, 37, 97)
VOCAB = 96
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def gpt2(**over) -> dict:
    """A config.json in the style of the published GPT-2."""
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": VOCAB - 1,
        "embd_pdrop": 0.1,
        "eos_token_id": VOCAB - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 128,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "resid_pdrop": 0.1,
        "vocab_size": VOCAB,
        **over,
    }


def llama(kind: str = "llama", arch: str = "Llama", **over) -> dict:
    """A config.json in the style of Llama and its many relatives; `over` adds or replaces keys."""
    return {
        "architectures": [f"{arch}ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "model_type": kind,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB,
        **over,
    }


def new_style(config: dict, **rope) -> dict:
    """The spelling of transformers 5: `dtype` and `rope_parameters`."""
    config = {k: v for k, v in config.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")}
    return {**config, "dtype": "bfloat16", "rope_parameters": rope}


# fmt: off
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
QWEN = {"bos_token_id": 94, "eos_token_id": 95, "rms_norm_eps": 1e-06, "rope_theta": 1000.0}
# use_sliding_window is false in the published Qwen configs, which nevertheless name a window
QWEN2 = {**QWEN, "max_window_layers": 1, "sliding_window": 16, "use_sliding_window": False}
QWEN3 = {**QWEN, "attention_bias": False, "head_dim": 24, "num_attention_heads": 4, "hidden_size": 32,
         "intermediate_size": 48}
QWEN3_MOE = {
    **QWEN, "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 16, "intermediate_size": 40,
    "max_window_layers": 2, "mlp_only_layers": [], "moe_intermediate_size": 16, "norm_topk_prob": True,
    "num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False, "rope_scaling": None,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
}
OLMOE = {
    "attention_bias": False, "bos_token_id": None, "clip_qkv": None, "eos_token_id": 95, "intermediate_size": 16,
    "norm_topk_prob": False, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4,
    "output_router_logits": False, "pad_token_id": 1, "rope_scaling": None, "rope_theta": 1000.0,
    "router_aux_loss_coef": 0.01,
}

CONFIGS = {
    "gpt2": gpt2(n_inner=64),
    "gpt2_prefixed": gpt2(n_head=2, torch_dtype="bfloat16"),
    "llama2": llama(num_key_value_heads=4, torch_dtype="float16", pretraining_tp=1, rope_scaling=None),
    "llama3": llama(
        head_dim=16, rope_theta=500.0, rope_scaling={**LLAMA3, "rope_type": "llama3"},
        tie_word_embeddings=True, bos_token_id=90, eos_token_id=[91, 92, 93],
    ),
    "llama_linear": llama(rope_theta=1000.0, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_yarn": new_style(
        llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=1), rope_type="yarn", rope_theta=500.0,
        factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0,
    ),
    "llama_bias": llama(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "mistral": new_style(llama("mistral", "Mistral", sliding_window=None, head_dim=16), rope_theta=1e3,
                         rope_type="default"),
    "mistral_window": llama("mistral", "Mistral", sliding_window=16, rope_theta=10000.0),
    "qwen2": llama("qwen2", "Qwen2", **QWEN2, tie_word_embeddings=True),
    "qwen2_window": llama("qwen2", "Qwen2", **{**QWEN2, "use_sliding_window": True}),
    "qwen3": llama("qwen3", "Qwen3", **QWEN3, sliding_window=None, use_sliding_window=False, max_window_layers=2),
    "qwen3_window": new_style(  # layer_types overrules max_window_layers
        llama("qwen3", "Qwen3", **QWEN3, tie_word_embeddings=True, sliding_window=16, use_sliding_window=True,
              max_window_layers=1, layer_types=["sliding_attention", "full_attention"]),
        rope_theta=1000.0, rope_type="default",
    ),
    "mixtral": llama(
        "mixtral", "Mixtral", intermediate_size=40, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
        output_router_logits=False, rope_theta=1000.0, router_aux_loss_coef=0.02,
    ),
    "qwen3_moe": llama("qwen3_moe", "Qwen3Moe", **QWEN3_MOE),
    "qwen3_moe_mixed": new_style(  # layers 0 and 2 are dense by the step, 3 by the list, only 1 has experts
        llama("qwen3_moe", "Qwen3Moe", **{**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 12,
              "norm_topk_prob": False, "num_hidden_layers": 4}), rope_theta=1000.0, rope_type="default",
    ),
    "olmoe": llama("olmoe", "Olmoe", **OLMOE),
    "olmoe_clip": llama("olmoe", "Olmoe", **{**OLMOE, "clip_qkv": 2.0, "num_key_value_heads": 2}),
}
# fmt: on


def randomise(model: torch.nn.Module, tied: bool, dtype: torch.dtype) -> None:
    """Draw every parameter, with values that `dtype` holds exactly."""
    for name, p in model.named_parameters():
        fan_in = p.shape[0] if re.search(r"\.c_(attn|proj|fc)\.", name) else p.shape[-1]
        if name.endswith("bias"):
            mean, std = 0.0, 0.2
        elif p.dim() == 1:  # norms; those of q and k set how peaky attention is
            mean, std = (1.6 if re.search("[qk]_norm", name) else 1.0), 0.2
        elif re.search("wte|embed_tokens", name):
            mean, std = 0.0, 1.6 / fan_in**0.5 if tied else 0.4
        else:
            gains = {"q_proj|k_proj|c_attn": 1.6, "mlp.gate.weight": 2.0, "lm_head": 1.8, "wpe": 4.0, "": 1.2}
            mean, std = 0.0, next(g for pattern, g in gains.items() if re.search(pattern, name)) / fan_in**0.5
        p.data = (mean + std * torch.randn(p.shape)).to(dtype).float()


def published_tensors(model: torch.nn.Module, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict under the key names that published checkpoints of this family use."""
    with tempfile.TemporaryDirectory() as folder:  # save_pretrained unfuses the experts
        model.save_pretrained(folder)
        tensors = {k: v.to(dtype).contiguous() for k, v in load_file(f"{folder}/model.safetensors").items()}
    if name == "gpt2":  # as published: no prefix, and the causal mask as a buffer
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        for i in range(model.config.n_layer):
            tensors[f"h.{i}.attn.bias"] = torch.ones(128, 128, dtype=torch.bool).tril()[None, None]
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def save_checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a Hugging Face folder; some folders get shards, a second file to ignore or a generation config."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    meta = {"format": "pt"}
    if folder.name == "llama3":
        names = sorted(tensors)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, keys in shards.items():
            save_file({k: tensors[k] for k in keys}, folder / file, meta)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map = {k: file for file, keys in shards.items() for k in keys}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    else:
        save_file(tensors, folder / "model.safetensors", meta)
    if folder.name == "mistral_window":  # in the layout of another library; one name is the same and must not win
        junk = {"norm.weight": torch.ones(32), "model.norm.weight": torch.full((32,), 7.0)}
        save_file(junk, folder / "consolidated.safetensors")
    if folder.name in ("llama3", "qwen2"):
        write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": config["bos_token_id"],
                "do_sample": True,
                "eos_token_id": config["eos_token_id"],
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.9,
            },
        )


def write_json(path: Path, value, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None], use_cache=False).logits[0].contiguous()


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()


@torch.no_grad()
def router_gap(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Smallest difference in probability between the last chosen expert and the first rejected one."""
    k = getattr(model.config, "num_experts_per_tok", None)
    if k is None:
        return 1.0
    routers = model(tokens[None], use_cache=False, output_router_logits=True).router_logits
    return min(-top[:, k - 1 :].diff().max().item() for top in (r.softmax(-1).topk(k + 1).values for r in routers))


def make_checkpoint(name: str, config: dict, seed: int) -> None:
    """Draw, save and reload one checkpoint; store the logits of what was reloaded."""
    folder = DATA / name
    dtype = getattr(torch, config.get("torch_dtype") or config.get("dtype") or "float32")
    with tempfile.TemporaryDirectory() as tmp:
        write_json(Path(tmp, "config.json"), config)
        parsed = AutoConfig.from_pretrained(tmp)
    model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, **EAGER).eval()
    torch.manual_seed(seed)
    inputs = [torch.randint(VOCAB, (length,)) for length in LENGTHS]
    randomise(model, parsed.tie_word_embeddings, dtype)
    while min(router_gap(model, tokens) for tokens in inputs) < 5e-4:  # rounding must not choose another expert
        randomise(model, parsed.tie_word_embeddings, dtype)
    save_checkpoint(folder, config, published_tensors(model, name, dtype))
    reloaded, reference = load(folder), {}
    for i, tokens in enumerate(inputs):
        reference[f"tokens_{i}"], reference[f"logits_{i}"] = tokens, logits(reloaded, tokens)
        torch.testing.assert_close(logits(model, tokens), reference[f"logits_{i}"], atol=1e-6, rtol=0)
    save_file(reference, folder / "reference.safetensors")


def check_checkpoint(name: str) -> float:
    """Largest difference between the stored logits and those of the reloaded checkpoint."""
    model, reference = load(DATA / name), load_file(DATA / name / "reference.safetensors")
    pairs = [(reference[f"tokens_{i}"], reference[f"logits_{i}"]) for i in range(len(LENGTHS))]
    return max((logits(model, tokens) - want).abs().max().item() for tokens, want in pairs)


def rope_config(width: int, heads: int, **over) -> dict:
    return {"model_type": "llama", "hidden_size": width, "num_attention_heads": heads, **over}


# fmt: off
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = {
    "plain_1e4": rope_config(4096, 32, max_position_embeddings=4096, rope_theta=10000.0),
    "plain_1e6": rope_config(4096, 32, head_dim=128, max_position_embeddings=32768, rope_theta=1000000.0),
    "plain_default_theta": rope_config(4096, 32, max_position_embeddings=2048, rope_scaling=None),
    "llama_3.1_8b": rope_config(
        4096, 32, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    ),
    "llama_3.2_1b": rope_config(
        2048, 32, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling={**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    ),
    "llama_2_linear": rope_config(
        4096, 32, max_position_embeddings=16384, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "qwen_2.5_yarn": rope_config(
        5120, 40, model_type="qwen2", max_position_embeddings=32768, rope_theta=1000000.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn_default_original": rope_config(
        4096, 32, max_position_embeddings=4096, rope_scaling={"rope_type": "yarn", "factor": 8.0}
    ),
    "yarn_explicit": rope_config(
        4096, 32, max_position_embeddings=131072,
        rope_parameters={**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
    ),
    "yarn_mscale": rope_config(
        4096, 32, max_position_embeddings=131072,
        rope_parameters={**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "yarn_mscale_only": rope_config(4096, 32, max_position_embeddings=131072, rope_parameters={**YARN, "mscale": 0.5}),
    "yarn_not_truncated": rope_config(
        4096, 32, max_position_embeddings=131072, rope_parameters={**YARN, "truncate": False}
    ),
}
# fmt: on


def make_ropes() -> dict:
    """Inverse frequencies and attention factor of full-size configs."""
    result = {}
    for name, config in ROPES.items():
        kwargs = json.loads(json.dumps(config))
        rope = LlamaRotaryEmbedding(AutoConfig.for_model(kwargs.pop("model_type"), **kwargs))
        result[name] = {
            "config": config,
            "attention_factor": rope.attention_scaling,
            "inv_freq": rope.inv_freq.tolist(),
        }
    return result


CORPUS = """
The server reads a request, turns the text into tokens and asks the model for the next one.
When the token comes back it is appended, and the same question is asked again and again.
A small model forgets quickly; a large model remembers more, but it answers more slowly.
Don't worry: it's only a test, and we'll see what they've written when they're done.
In 2024 there were 365 days plus 1, that is 366; 12 months, 52 weeks, 8784 hours.
def add(first, second):
    return first + second

for token in tokens:
    print(token, end=" ")
Der schöne Fluss fließt über die Brücke; où est le café? El niño señaló el camino mañana.
the cat and the hat and the bat and the rat, the other and another, then there and these.
"""

# fmt: off
TEXTS = [
    "", " ", "Hello, world!", "the token and the model", "   leading and   inner spaces", "trailing  ",
    "a\nb\n\n\nc\r\n", "\n", "\tdef add(x):\n\t\treturn x + 1234567", "It's we'll THEY'RE don't", "café mañana fließt",
    "cafe\u0301 n\u0303", "日本語のテキスト、中文", "한국어 текст עברית", "🙂👩‍👩‍👧 🏳️‍🌈 ok🙂", "x\u200dy\u00a0z",
    "<s> is text </s>", "<|begin_of_text|>hi<|end_of_turn|>", "▁ literal and <0x41> bytes",
    "price: $5.99 (50% off) . , !",
]
# fmt: on

BYTE_LEVEL_TEMPLATE = """\
{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- if messages[0].role != "system" %}
    {{- "<|start_of_turn|>system\\n\\nToday is " + today + ".<|end_of_turn|>" }}
{%- endif %}
{% for message in messages %}
    {% if message.role == "system" %}
        {{- "<|start_of_turn|>system\\n\\nToday is " + today + ".\\n" + message.content | trim + "<|end_of_turn|>" }}
    {% elif message.role in ["user", "assistant"] %}
        {{- "<|start_of_turn|>" + message.role }}
        {%- if message.name is defined %} {{ message.name | tojson }}{% endif %}
        {{- "\\n\\n" + message.content | trim + "<|end_of_turn|>" }}
    {% else %}
        {{- raise_exception("Unknown role: " + message["role"]) }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{- "<|start_of_turn|>assistant\\n\\n" -}}
{% endif %}
"""

INST_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}\
{% else %}{% set system = false %}{% set turns = messages %}{% endif %}{% for message in turns %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}\
{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}\
{{ message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}\
{% endif %}{% endfor %}"""

NOW = datetime.datetime(2025, 3, 9, 14, 5)
CHATS = [
    [{"role": "user", "content": "Hello there"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": " What is <b>1 & 1</b>? "}],
    [
        {"role": "user", "name": "Zoë <z@x>", "content": "First\n\nline"},
        {"role": "assistant", "content": "Sure 🙂"},
        {"role": "user", "content": "日本語?"},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "critic", "content": "no"}],
    [{"role": "user", "content": "Hi"}, {"role": "user", "content": "again"}],
]


def byte_level() -> Tokenizer:
    """Byte-level BPE like that of GPT-2 and Llama 3."""
    tok = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    split = pre_tokenizers.Split(Regex(pattern + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence([split, bytes_]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=396, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_of_turn|>", "<|end_of_turn|>"]
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    bos = processors.TemplateProcessing(
        "<|begin_of_text|> $A", "<|begin_of_text|> $A <|begin_of_text|>:1 $B:1", [(names[0], tok.token_to_id(names[0]))]
    )
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return tok


def sentence_piece(metaspace: bool) -> Tokenizer:
    """BPE like that of Llama 2: spaces are `▁`, put by a pre-tokenizer or, as first published, by a normalizer."""
    special = ["<unk>", "<s>", "</s>"]
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    fixed = special + [f"<0x{i:02X}>" for i in range(256)]
    tok.train_from_iterator(
        [CORPUS.replace("\n", " ")], trainers.BpeTrainer(vocab_size=500, special_tokens=fixed, show_progress=False)
    )
    model = json.loads(tok.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    tok = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in special])
    tok.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    return tok


def save_tokenizer(folder: Path, tok: Tokenizer, config: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        **config,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def make_tokenizers(folder: Path) -> None:
    """Three tokenizer folders: the template inside the config, special tokens as objects, template in its own file."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    objects = {k: {**flags, "content": v} for k, v in special.items()}
    save_tokenizer(
        folder / "byte_level",
        byte_level(),
        {
            "bos_token": "<|begin_of_text|>",
            "chat_template": BYTE_LEVEL_TEMPLATE,
            "eos_token": "<|end_of_turn|>",
        },
    )
    save_tokenizer(folder / "metaspace", sentence_piece(True), {**objects, "chat_template": INST_TEMPLATE})
    save_tokenizer(folder / "prepend", sentence_piece(False), special)
    (folder / "prepend" / "chat_template.jinja").write_text(INST_TEMPLATE, encoding="utf-8")


def render(tok: PreTrainedTokenizerFast, messages: list[dict], add_generation_prompt: bool) -> dict:
    case = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return {**case, "text": text}
    except Exception as error:  # what raise_exception in a template does
        return {**case, "error": str(error)}


def tokenizer_reference(folder: Path) -> dict:
    """What transformers makes of each text and chat; `prefixes` decodes ids[:1], ids[:2] and so on, as in streaming."""
    tok = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = []
    for text in TEXTS:
        ids = tok.encode(text)
        texts.append(
            {
                "text": text,
                "ids": ids,
                "ids_without_special": tok.encode(text, add_special_tokens=False),
                "decoded": tok.decode(ids, skip_special_tokens=True),
                "decoded_with_special": tok.decode(ids),
                "prefixes": [tok.decode(ids[:n], skip_special_tokens=True) for n in range(1, len(ids) + 1)],
            }
        )
    with mock.patch.object(chat_template_utils, "datetime") as clock:
        clock.now.return_value = NOW
        chats = [render(tok, messages, prompt) for messages in CHATS for prompt in (False, True)]
    return {
        "now": NOW.isoformat(),
        "vocab_size": len(tok),
        "bos_token": tok.bos_token,
        "eos_token": tok.eos_token,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "texts": texts,
        "chats": chats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is stored, write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, rope_file = DATA / "tokenizers", DATA / "rope.json"
    if not check:
        for seed, (name, config) in enumerate(CONFIGS.items()):
            make_checkpoint(name, config, seed)
        write_json(rope_file, make_ropes(), indent=None)
        make_tokenizers(folder)
    reference = {name: tokenizer_reference(folder / name) for name in ("byte_level", "metaspace", "prepend")}
    if not check:
        write_json(folder / "reference.json", reference, indent=None)
    assert reference == json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    assert make_ropes() == json.loads(rope_file.read_text(encoding="utf-8"))
    for name in CONFIGS:
        size, error = sum(f.stat().st_size for f in (DATA / name).iterdir()), check_checkpoint(name)
        print(f"{name:16} {size:8} bytes, max error {error:.1e}")
        assert error < 1e-5, name


if __name__ == "__main__":
    main()
