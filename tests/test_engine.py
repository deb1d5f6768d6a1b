"""The engine: whatever shares a batch, a block or a budget with a request, its tokens are those of a plain loop.

`Slow` is that loop: no cache, no batch, the whole text through the model for every token. The model is a toy in float64
whose head is untied and boosted, so that its greedy tokens depend on every token before them.
"""

import copy
import functools
import inspect
import itertools
import math
import random
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
import nanoserve
from nanoserve import GPT, LLM, Batch, KVCache, ModelConfig, Output, SamplingParams, Tokenizer
from scheduler import FINISHED

torch.set_num_threads(1)
TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
GREEDY = SamplingParams(temperature=0, max_tokens=8)
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
          "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 128, "tie_word_embeddings": False}


@functools.cache
def toy(vocab: int = 64) -> GPT:
    model = GPT(ModelConfig.from_dict({**CONFIG, "vocab_size": vocab}), torch.float64, "cpu").randomize(1, std=0.5)
    model.head *= 4
    if vocab == 400:  # one that speaks plain ASCII with the byte_level tokenizer
        texts = map(Tokenizer(TOKENIZERS / "byte_level").decode, ([i] for i in range(vocab)))
        model.head[[i for i, text in enumerate(texts) if not (text and text.isascii() and text.isprintable())]] = 0
    return model


def engine(blocks: int = 200, *, model: GPT | None = None, tokenizer: str = "", **options) -> LLM:
    """An LLM over the toy, with at most so many blocks of four tokens."""
    model = model or (toy(400) if tokenizer else toy())
    c, size = model.config, options.setdefault("block_size", 4)
    entry = {"int8": 1, "bfloat16": 2}.get(options.get("kv_dtype"), model.dtype.itemsize)
    block = KVCache.bytes_per_block(c.num_layers, size, c.num_kv_heads, c.head_dim, entry)
    llm = LLM(model, kv_memory=(blocks + 1) * block, **{"max_batch_tokens": 64, "max_batch_requests": 16, **options})
    # What was never written must never be read.
    for tensor in (*llm.cache.tensors, *llm.cache.host):
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
    if tokenizer:
        llm.tokenizer = Tokenizer(TOKENIZERS / tokenizer)
    return llm


def finish(llm: LLM, *requests) -> list[Output]:
    """Step until nothing is left to do, checking the scheduler's invariants; the outputs of all samples."""
    while llm.has_work():
        llm.step()
        llm.scheduler.check()
    assert is_clean(llm)
    return [llm.output(sample) for request in requests for sample in request.samples]


def is_clean(llm: LLM) -> bool:
    llm.scheduler.check()
    return not llm.has_work() and llm.stats()["blocks_used"] == 0 and not any(llm.pool.refs)


class Slow:
    """What a request must come to, computed without an engine."""

    kv_dtype = torch.float64

    @classmethod
    @functools.cache
    def logits(cls, tokens: tuple, vocab: int = 64) -> torch.Tensor:
        """Of every position, [len(tokens), V]: all tokens at once, in one block."""
        model, n = toy(vocab), len(tokens)
        c = model.config
        cache = KVCache(c.num_layers, 2, n, c.num_kv_heads, c.head_dim, cls.kv_dtype, "cpu")
        ids, at = torch.tensor(tokens), torch.arange(n)
        return model.forward(Batch(ids, at, n + at, *(torch.tensor(x, dtype=torch.int32) for x in ([[1]], [n], [0, n])),
                                   at), cache)

    @staticmethod
    def edited(logits: list[float], prompt: list[int], output: list[int], p: SamplingParams, stops: set) -> list[float]:
        """Biases, penalties, bans, in the documented order, entry by entry."""
        out = []
        for token, x in enumerate(logits):
            x += (p.logit_bias or {}).get(token, 0.0)
            if token in prompt or token in output:
                x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
            x -= p.frequency_penalty * output.count(token) + p.presence_penalty * (token in output)
            out.append(-math.inf if token in stops and len(output) < p.min_tokens else x)
        return out

    @classmethod
    def generate(cls, prompt: list[int], p: SamplingParams, sample: int = 0, eos=(), vocab: int = 64) -> list[int]:
        stops = set(p.stop_token_ids) | (set() if p.ignore_eos else set(eos))
        output: list[int] = []
        while len(output) < p.max_tokens and not (output and output[-1] in stops):
            logits = cls.logits(tuple(prompt + output), vocab)[-1].tolist()
            row = torch.tensor([cls.edited(logits, prompt, output, p, stops)])
            if p.temperature == 0:
                output.append(int(row.argmax()))
                continue
            seed = np.array([p.seed % 2**64], dtype=np.uint64)
            noise = torch.from_numpy(kernels.uniform_noise(seed, np.array([len(output) + (sample << 32)])))
            settings = [torch.tensor([x]) for x in (p.temperature, p.top_k, p.top_p, p.min_p)]
            output.append(int(kernels.sample(row, *settings, noise)))
        return output


class SlowInt8(Slow):
    """Over an int8 cache a token sees itself and all before it rounded, however they got there."""

    kv_dtype = torch.int8


class SlowBfloat16(Slow):
    """The same with another rounding."""

    kv_dtype = torch.bfloat16


SLOW = {"auto": Slow, "bfloat16": SlowBfloat16, "int8": SlowInt8}


def tokens_of(outputs: list[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def emulate_graphs(monkeypatch) -> Counter:
    """All of decode graphs but the graph: what a replay would do is done again, on the CPU, over the same memory. Counts the
    replays, by model and rows.
    """
    replays = Counter()

    def capture(self, rows):
        forward = self.model.forward
        logits = forward(rows, self.cache).clone()

        def replay():
            replays[self.model, len(rows.tokens)] += 1
            # Rows that pad do too: they write into the scratch block, and see what they wrote.
            size = self.cache.data.shape[3]
            blocks = rows.block_tables.gather(1, (rows.positions // size)[:, None])[:, 0]
            assert (rows.context_lens == rows.positions + 1).all()
            assert (rows.slots == blocks * size + rows.positions % size).all()
            logits.copy_(forward(rows, self.cache))

        return replay, logits

    monkeypatch.setattr(nanoserve.DecodeGraphs, "_capture", capture)
    return replays


def expected(prompts, params, slow=Slow, **more) -> list[list[int]]:
    """Slow.generate of every sample, in the order of `generate`."""
    return [slow.generate(prompt, p, i, **more) for prompt, p in zip(prompts, params) for i in range(p.n)]


# ---- the interface that others build on ----


def test_names_and_defaults():
    parameters = inspect.signature(LLM).parameters
    assert list(parameters)[0] == "model" and parameters["model"].default is None
    options = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert options.keys() == {"device", "dtype", "quantize", "kv_dtype", "kv_memory", "block_size", "max_batch_tokens",
                              "max_batch_requests", "max_model_len", "policy", "prefix_caching", "graphs", "overlap",
                              "swap_memory", "seed", "draft", "num_drafts"}
    fixed = {"device": "auto", "dtype": "auto", "kv_dtype": "auto", "block_size": 16, "policy": "fcfs",
             "prefix_caching": True, "seed": 0}
    assert {name: options[name] for name in fixed} == fixed

    def arguments(function):
        found = inspect.signature(function).parameters.items()
        return {name: p.default for name, p in found if p.default is not p.empty}

    assert arguments(LLM.generate) == {"params": None, "progress": False}
    assert arguments(LLM.add_request).items() >= {"params": None, "priority": 0, "tenant": None}.items()
    assert {f.name for f in fields(Output)} >= {"text", "token_ids", "finish_reason", "logprobs", "prompt_token_ids"}
    assert {f.name for f in fields(SamplingParams)} >= {
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "n", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias"}
    assert engine().stats().keys() >= {"steps", "prompt_tokens", "output_tokens", "hit_tokens", "preemptions",
                                       "blocks_used", "blocks_cached", "blocks_free", "forward_passes"}


def test_outputs_of_generate():
    llm = engine(tokenizer="byte_level")
    first, second = llm.generate(["Once upon", [5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))
    assert first.prompt_token_ids == llm.tokenizer.encode("Once upon") and second.prompt_token_ids == [5, 6, 7]
    assert first.token_ids == Slow.generate(first.prompt_token_ids, replace(GREEDY, max_tokens=6), vocab=400)
    full = llm.tokenizer.decode(first.prompt_token_ids + first.token_ids)
    assert full == llm.tokenizer.decode(first.prompt_token_ids) + first.text
    assert first.finish_reason == "length" and first.logprobs is None
    [alone] = llm.generate("Once upon", SamplingParams(temperature=0, max_tokens=6))
    assert alone == first
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="params: 1 .* 2 prompts"):
        llm.generate([[1], [2]], [GREEDY])
    assert is_clean(llm)


def test_step_on_an_idle_engine():
    llm = engine()
    assert llm.step() == [] and llm.stats()["steps"] == llm.stats()["forward_passes"] == 0 and not llm.has_work()


def test_step_returns_the_requests_that_changed():
    llm = engine(max_batch_tokens=16)
    long, short = llm.add_request([1] * 40, GREEDY), llm.add_request([2, 3], replace(GREEDY, max_tokens=2))
    changed = [llm.step() for _ in range(5)]
    assert changed == [[], [], [long, short], [long, short], [long]] and short.finish_reason == "length"


# ---- the same tokens whatever else is going on ----

CROWD = [([5, 6, 7], GREEDY),
         ([5, 6, 7] * 5, SamplingParams(temperature=2.0, seed=11, max_tokens=12)),
         ([5, 6, 7] * 5 + [8], SamplingParams(temperature=2.0, seed=11, max_tokens=9, n=3)),
         ([5, 6, 7] * 5 + [9, 10], replace(GREEDY, max_tokens=12)),
         ([40], SamplingParams(temperature=3.0, seed=-4, top_k=20, max_tokens=10)),
         (list(range(30)), SamplingParams(temperature=2.0, seed=11, top_p=0.9, min_p=0.01, max_tokens=5)),
         ([5, 6, 7, 5], SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=1.5, max_tokens=12)),
         (list(range(20)), SamplingParams(temperature=2.0, seed=2**64 - 1, presence_penalty=3.0, n=2, max_tokens=7))]


@pytest.mark.parametrize("kv_dtype", SLOW)
@pytest.mark.parametrize("circumstance", ["roomy", "alone", "tiny pool", "budget of three", "no prefix cache",
                                          "warm prefix cache", "reversed", "big blocks", "shortest first"])
def test_tokens_do_not_depend_on_circumstances(circumstance, kv_dtype):
    options = {"tiny pool": {"blocks": 10}, "budget of three": {"max_batch_tokens": 3, "max_batch_requests": 3},
               "no prefix cache": {"prefix_caching": False}, "big blocks": {"block_size": 8},
               "shortest first": {"policy": "shortest", "max_batch_requests": 4}}.get(circumstance, {})
    llm, crowd = engine(kv_dtype=kv_dtype, **options), CROWD[::-1] if circumstance == "reversed" else CROWD
    prompts, params = zip(*crowd)
    if circumstance == "warm prefix cache":
        llm.generate(prompts, GREEDY)
    if circumstance == "alone":
        outputs = [output for prompt, p in crowd for output in llm.generate([prompt], p)]
    else:
        outputs = finish(llm, *[llm.add_request(*each) for each in crowd])
    assert tokens_of(outputs) == expected(prompts, params, SLOW[kv_dtype])
    assert all(output.finish_reason == "length" for output in outputs)
    stats = llm.stats()
    assert (stats["preemptions"] > 0) == (circumstance == "tiny pool")
    assert (stats["hit_tokens"] == 0) == (circumstance == "no prefix cache")


@pytest.mark.parametrize("prefix_caching", (True, False))
@pytest.mark.parametrize("swap", (None, False, True))
def test_swapping_changes_no_token(swap, prefix_caching):
    """On a pool that is much too small: swapped always, never though there is room, or without room for it."""
    model = GPT(ModelConfig.from_dict(CONFIG), torch.float32, "cpu").randomize(1, std=0.5)
    memory = 0 if swap is None else 1 << 20
    llm = engine(10, model=model, swap_memory=memory, prefix_caching=prefix_caching)
    llm.scheduler.prefers_swap = lambda tokens, blocks: swap
    prompts, params = zip(*[(prompt, replace(GREEDY, max_tokens=p.max_tokens, n=p.n)) for prompt, p in CROWD])
    outputs = llm.generate(prompts, list(params))
    roomy = engine(model=model, prefix_caching=prefix_caching)
    assert tokens_of(outputs) == tokens_of(roomy.generate(prompts, list(params)))
    stats, least = llm.stats(), roomy.stats()["computed_tokens"]
    assert stats["preemptions"] > 0 and is_clean(llm)
    assert sorted(llm.pool.free_slots) == list(range(llm.pool.num_host_slots))
    assert stats["blocks_swapped_out"] == stats["blocks_swapped_in"] + stats["blocks_swap_freed"]
    assert (stats["blocks_swapped_out"] > 0) == bool(swap)
    if not prefix_caching:
        assert (stats["computed_tokens"] == least) == bool(swap), "nothing that was swapped is computed again"
        assert stats["blocks_swap_freed"] == 0


def test_swapping_is_decided_by_what_was_measured(monkeypatch):
    """The cheaper of copying so many blocks and computing so many tokens."""
    monkeypatch.setattr(LLM, "_measure_swap", lambda self: (0.001, 0.01))
    prefers = engine(swap_memory=1 << 20).scheduler.prefers_swap
    assert prefers(41, 4) and not prefers(40, 4) and not prefers(1, 1)
    monkeypatch.undo()
    per_token, per_block = engine(swap_memory=1 << 20)._measure_swap()
    assert per_token > 0 and per_block > 0


def test_blocks_come_back_from_the_host_as_they_went():
    """Every layer, keys and values, into whichever block; all that goes out is read before anything is written."""
    cache = KVCache(2, 5, 4, 2, 8, torch.float32, "cpu", num_host_slots=3)
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    before = cache.data.clone()
    cache.move({2: 1, 0: 4}, {}, {})
    cache.data[:, :, 1] = 0
    cache.move({1: 1}, {}, {1: 0, 3: 2})
    assert torch.equal(cache.data[:, :, 1], before[:, :, 4]) and torch.equal(cache.data[:, :, 3], before[:, :, 1])
    assert not cache.host[0][1].any()
    for block in (0, 2, 4):
        assert torch.equal(cache.data[:, :, block], before[:, :, block])


@pytest.mark.parametrize("seed", range(24))
def test_random_requests_on_a_tiny_pool(seed):
    """Random parameters, arrivals and aborts; whoever is not aborted gets what it would get alone."""
    rng = random.Random(seed)
    width, eos = rng.randint(2, 6), {rng.randrange(64), rng.randrange(64)}
    llm = engine(rng.randint(8, 14), max_batch_requests=width, max_batch_tokens=rng.choice((width, 9, 40)),
                 policy=rng.choice(("fcfs", "shortest", "priority", "mlfq", "fair")), prefix_caching=rng.random() < 0.8,
                 swap_memory=rng.choice((0, 1 << 14, 1 << 20)))
    llm.scheduler.prefers_swap = lambda tokens, blocks: rng.random() < 0.8
    llm.eos_ids = frozenset(eos)
    stem, work, aborted = [rng.randrange(64) for _ in range(12)], [], set()
    for step in itertools.count():
        if len(work) < 10 and rng.random() < 0.6:
            prompt = stem[: rng.randrange(13)] + [rng.randrange(64) for _ in range(rng.randint(1, 4))]
            p = SamplingParams(
                temperature=rng.choice((0, 0, 1.0, 2.0, 4.0)), seed=rng.randrange(-5, 5), max_tokens=rng.randint(1, 9),
                n=rng.choice((1, 1, 1, 2)), top_k=rng.choice((0, 0, 5)), top_p=rng.choice((1.0, 0.8)),
                min_p=rng.choice((0.0, 0.05)), repetition_penalty=rng.choice((1.0, 1.3, 0.7)),
                presence_penalty=rng.choice((0, 2)), frequency_penalty=rng.choice((0, -1.5)),
                ignore_eos=rng.random() < 0.5, stop_token_ids=rng.sample(range(64), rng.choice((0, 0, 8))))
            p.min_tokens = rng.randint(0, p.max_tokens)
            work.append((prompt, p, llm.add_request(prompt, p, priority=rng.randrange(3), tenant=rng.choice("ab"))))
        elif work and rng.random() < 0.04:
            aborted.add(victim := rng.choice(work)[2])
            llm.abort(victim)
        llm.step()
        llm.scheduler.check()
        if len(work) == 10 and not llm.has_work():
            break
        assert step < 2000, "no end in sight"
    assert is_clean(llm)
    for prompt, p, request in work:
        for i, sample in enumerate(request.samples):
            full, out = Slow.generate(prompt, p, i, eos), llm.output(sample)
            if request in aborted and sample.finish_reason == "abort":
                assert out.token_ids == full[: len(out.token_ids)]
                continue
            assert out.token_ids == full
            stopped = full[-1] in p.stop_token_ids or (full[-1] in eos and not p.ignore_eos)
            assert out.finish_reason == ("stop" if stopped else "length")


def test_an_int8_cache_is_rounded_but_nearly_the_same():
    """If its tokens were always those of the plain cache, the test above would not show that anything is rounded."""
    tokens = tuple(random.Random(0).choices(range(64), k=100))
    plain, rounded = Slow.logits(tokens), SlowInt8.logits(tokens)
    assert 1e-6 < (rounded - plain).abs().mean() / plain.std() < 0.05


@pytest.mark.parametrize("head_dim, blocks", [(64, 193), (128, 196)])
def test_an_int8_cache_holds_nearly_twice_the_blocks(head_dim, blocks):
    """Per token and head a byte for each entry and two for the scale, instead of two bytes for each: 128 / 66, 256 / 130."""
    config = ModelConfig.from_dict({**CONFIG, "head_dim": head_dim})
    model = GPT(config, torch.bfloat16, "cpu").randomize(1)
    memory = 100 * 2 * 2 * 16 * 2 * head_dim * 2  # 100 blocks: layers, keys and values, tokens, heads, entries, bytes
    plain, int8 = (LLM(model, kv_dtype=kv_dtype, kv_memory=memory) for kv_dtype in ("auto", "int8"))
    assert plain.pool.num_blocks == 100 and int8.pool.num_blocks == blocks == 100 * 2 * head_dim // (head_dim + 2)
    assert plain.cache.nbytes == memory
    assert int8.cache.nbytes == blocks * 2 * 2 * 16 * 2 * (head_dim + 2) == int8.cache.data.nbytes + int8.cache.scales.nbytes
    assert f"{blocks - 1} int8 KV blocks of 16 tokens" in int8.describe() and "int8" not in plain.describe()


def test_an_int8_cache_in_float32_on_the_model_that_comes_along():
    """Alone and at once, or together, in chunks, and preempted: the same greedy tokens from the compiled body."""
    prompts = ["Once upon a time there was a fox", "Long ago", "The", "What colour was the kite? " * 6]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    tight = LLM(dtype="float32", kv_dtype="int8", max_batch_tokens=24, kv_memory=6 * 4 * 2 * 16 * 2 * 66)
    together, roomy = tokens_of(tight.generate(prompts, params)), LLM(dtype="float32", kv_dtype="int8", kv_memory=1 << 24)
    assert together == [roomy.generate(prompt, params)[0].token_ids for prompt in prompts]
    assert tight.stats()["preemptions"] > 0 and roomy.stats()["preemptions"] == 0


def test_copied_blocks_take_their_scales_along():
    cache = KVCache(2, 5, 4, 2, 8, torch.int8, "cpu")
    cache.data.copy_(torch.arange(cache.data.numel()).view(cache.data.shape) % 251 - 125)
    cache.scales.copy_(torch.arange(cache.scales.numel()).view(cache.scales.shape))
    data, scales = cache.data.clone(), cache.scales.clone()
    cache.move({}, {3: 1, 1: 4}, {})  # all are read before any is written
    for now, before in ((cache.data, data), (cache.scales, scales)):
        assert torch.equal(now, before[:, :, [0, 4, 2, 1, 4]])
    assert all(torch.equal(s, c) for layer, of_layer in zip(cache.layers, cache.scales) for s, c in zip(layer[2], of_layer))


# ---- n samples, seeds ----


def test_samples_share_the_blocks_of_their_prompt():
    """At the fork eight samples of 500 tokens hold the blocks of one; the step after, each has its own last block."""
    model = GPT(ModelConfig.from_dict({**CONFIG, "max_position_embeddings": 512}), torch.float64, "cpu").randomize(1)
    used = {}
    for n in (1, 8):
        llm = engine(model=model, block_size=16, max_batch_tokens=512)
        request = llm.add_request([i % 64 for i in range(500)], SamplingParams(n=n, seed=1, max_tokens=4, ignore_eos=True))
        llm.step()
        assert len(request.samples) == n
        used[n] = [llm.stats()["blocks_used"]]
        llm.step()
        used[n].append(llm.stats()["blocks_used"])
    assert used == {1: [32, 32], 8: [32, 39]} and 39 <= 1.3 * 32


def test_n_samples_are_consecutive_and_differ():
    llm, p = engine(), SamplingParams(temperature=3.0, seed=3, max_tokens=8)
    outputs = llm.generate([[1, 2, 3, 4, 5], [9, 8]], [replace(p, n=4), replace(p, n=2)])
    assert [o.prompt_token_ids for o in outputs] == [[1, 2, 3, 4, 5]] * 4 + [[9, 8]] * 2
    assert len({tuple(o.token_ids) for o in outputs}) == 6
    assert llm.stats()["prompt_tokens"] == 7  # a prompt is computed once, not once a sample
    assert is_clean(llm)


def test_seeds():
    """Equal seeds, equal samples, also in a new engine; without one samples differ, and follow from the engine's."""
    p = SamplingParams(temperature=3.0, seed=3, max_tokens=8)
    twice = engine().generate([[1, 2, 3]] * 2, p)
    assert twice[0] == twice[1] == engine(seed=99).generate([[1, 2, 3]], p)[0]
    assert engine().generate([[1, 2, 3]], replace(p, seed=4))[0] != twice[0]
    free = [tokens_of(engine(seed=s).generate([[1, 2, 3]] * 3, replace(p, seed=None))) for s in (0, 0, 1)]
    assert free[0] == free[1] and free[0] != free[2] and len(set(map(tuple, free[0]))) == 3


# ---- log-probabilities ----


def check_logprobs(reported: dict, row: torch.Tensor, chosen: int, k: int):
    exact = row.float().log_softmax(-1)
    best = exact.topk(k).indices.tolist()
    assert reported.keys() == {*best, chosen} and list(reported)[:k] == best
    assert [reported[t] for t in reported] == pytest.approx([exact[t].item() for t in reported], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 3, "max_batch_requests": 3}, {"blocks": 9}],
                         ids=["one chunk", "chunked", "preempted"])
def test_logprobs_of_prompt_and_output(options):
    """Those of the model as it is, whatever penalties and temperature make of them, whatever happens on the way."""
    prompts = [[7] + list(range(18)), list(range(30, 45)), [3]]
    p = SamplingParams(temperature=2.0, seed=5, repetition_penalty=1.5, max_tokens=9)
    params = [replace(p, logprobs=3, prompt_logprobs=2), replace(p, logprobs=0, n=2), replace(p, prompt_logprobs=0)]
    llm = engine(**options)
    llm.generate([prompts[0]], replace(GREEDY, max_tokens=1))  # a prefix hit would leave positions without logits
    hits = llm.stats()["hit_tokens"]
    outputs = finish(llm, *[llm.add_request(*each) for each in zip(prompts, params)])
    assert tokens_of(outputs) == expected(prompts, params)
    for output, asked in zip(outputs, [params[0], params[1], params[1], params[2]]):
        start, rows = len(output.prompt_token_ids), Slow.logits(tuple(output.prompt_token_ids + output.token_ids))
        if asked.logprobs is None:
            assert output.logprobs is None
        else:
            assert len(output.logprobs) == len(output.token_ids)
            for i, (token, reported) in enumerate(zip(output.token_ids, output.logprobs)):
                check_logprobs(reported, rows[start + i - 1], token, asked.logprobs)
        if asked.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            assert len(output.prompt_logprobs) == start and output.prompt_logprobs[0] is None
            for i, token in enumerate(output.prompt_token_ids[1:], 1):
                check_logprobs(output.prompt_logprobs[i], rows[i - 1], token, asked.prompt_logprobs)
    if "blocks" in options:
        assert llm.stats()["preemptions"] > 0
    else:
        assert llm.stats()["hit_tokens"] == hits


# ---- where an output ends ----


def test_max_tokens_is_exact():
    llm = engine()
    for n in (1, 2, 7):
        [output] = llm.generate([[1, 2, 3]], replace(GREEDY, max_tokens=n))
        assert len(output.token_ids) == n and output.finish_reason == "length"
    [output] = llm.generate([[1] * 100], SamplingParams(temperature=0))
    assert len(output.token_ids) == 28  # by default as many as fit, up to 256


def test_end_tokens():
    """Any of the model's end tokens and of the caller's ends the output, stays in token_ids, and is not in the text."""
    llm, p = engine(tokenizer="byte_level"), replace(GREEDY, max_tokens=12)
    prompt = llm.tokenizer.encode("Once upon a time")
    full = Slow.generate(prompt, p, vocab=400)
    [plain] = llm.generate([prompt], p)
    assert plain.token_ids == full and len(set(full)) > 6
    at = next(i for i in range(4, 12) if full[i] not in full[:i])
    llm.eos_ids = frozenset({full[at], 399})

    def text(n):
        return llm.tokenizer.decode(prompt + full[:n])[len(llm.tokenizer.decode(prompt)):]

    [stopped] = llm.generate([prompt], p)
    assert (stopped.token_ids, stopped.finish_reason, stopped.text) == (full[: at + 1], "stop", text(at))
    [ignored] = llm.generate([prompt], replace(p, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason, ignored.text) == (full, "length", plain.text)
    [asked] = llm.generate([prompt], replace(p, ignore_eos=True, stop_token_ids=[full[2], 1]))
    first = full.index(full[2])
    assert (asked.token_ids, asked.finish_reason, asked.text) == (full[: first + 1], "stop", text(first))
    # At exactly max_tokens, an end token still is a stop.
    [last] = llm.generate([prompt], replace(p, max_tokens=at + 1))
    assert last.finish_reason == "stop"
    [later] = llm.generate([prompt], replace(p, min_tokens=at + 1))
    assert later.token_ids == Slow.generate(prompt, replace(p, min_tokens=at + 1), eos=llm.eos_ids, vocab=400)
    assert len(later.token_ids) > at + 1 and later.token_ids[: at] == full[:at]


def test_end_tokens_come_from_the_files(tmp_path):
    """generation_config.json's list first, else config.json's, be it a number or a list."""
    from test_cli import save_model

    save_model(tmp_path, {**CONFIG, "vocab_size": 400, "eos_token_id": [3, 4]})
    assert LLM(tmp_path, kv_memory=1 << 20).eos_ids == {3, 4}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')
    assert LLM(tmp_path, kv_memory=1 << 20).eos_ids == {5, 6, 7}


def test_end_tokens_outside_the_vocabulary_are_none():
    """There is nothing to ban until `min_tokens`."""
    config = ModelConfig.from_dict({**CONFIG, "eos_token_id": [3, 64]})
    llm = LLM(GPT(config, torch.float64, "cpu").randomize(1), kv_memory=1 << 20)
    assert llm.eos_ids == {3} and len(llm.generate([[1]], replace(GREEDY, min_tokens=8))[0].token_ids) == 8


def test_stop_strings():
    """They span tokens, begin inside them, and the earliest match of any cuts the text."""
    llm, p = engine(tokenizer="byte_level"), replace(GREEDY, max_tokens=20)
    [plain] = llm.generate(["Once upon"], p)
    text, tokens = plain.text, plain.token_ids
    early, late = text[4:7], text[6:12]
    for stop in (early, [late, early], (early, "not in there")):
        [output] = llm.generate(["Once upon"], replace(p, stop=stop))
        assert output.text == text[: text.find(early)] and output.finish_reason == "stop"
        assert output.token_ids == tokens[: len(output.token_ids)] != tokens
        # No token more than it takes to see the stop string.
        assert early not in llm.tokenizer.decode(output.token_ids[:-1])
        assert early in llm.tokenizer.decode(output.token_ids)
    [output] = llm.generate(["Once upon"], replace(p, stop="not in there"))
    assert (output.text, output.finish_reason) == (text, "length")
    both = llm.generate(["Once upon"], replace(p, stop=early, n=2))
    assert [output.text for output in both] == [text[: text.find(early)]] * 2
    # The token that completes one is a part of the text, up to where that begins; a stop token is none.
    options = ({"stop": early}, {"stop_token_ids": [tokens[0]]}, {"max_tokens": 1})
    ended = [llm.add_request("Once upon", replace(p, **more)) for more in options]
    finish(llm, *ended)
    assert [request.finish_reason for request in ended] == ["stop", "stop", "length"]
    assert [request.ended_by_token for request in ended] == [False, True, False]


def test_min_tokens_holds_without_max_tokens():
    """The default of max_tokens must not undercut min_tokens."""
    c = {**CONFIG, "max_position_embeddings": 512}
    model = GPT(ModelConfig.from_dict(c), torch.float32, "cpu").randomize()
    [output] = engine(model=model).generate([[1]], SamplingParams(temperature=0, min_tokens=300))
    assert len(output.token_ids) >= 300


# ---- streams ----


def test_stream_pieces_join_to_the_text():
    llm, p = engine(tokenizer="byte_level"), replace(GREEDY, max_tokens=20)
    [plain] = llm.generate(["Once upon"], p)
    pieces = list(llm.stream("Once upon", p))
    assert "".join(pieces) == plain.text and len(pieces) > 5 and all(pieces)
    stop = plain.text[6:9]
    assert "".join(llm.stream("Once upon", replace(p, stop=stop))) == plain.text[: plain.text.find(stop)]
    with pytest.raises(ValueError, match="n: .*2"):
        list(llm.stream("Once upon", replace(p, n=2)))
    with pytest.raises(ValueError, match="params: must be SamplingParams, got dict"):
        list(llm.stream("Once upon", {"n": 1}))
    assert is_clean(llm)


def test_leaving_a_stream_early_frees_its_blocks():
    llm, p = engine(tokenizer="byte_level"), replace(GREEDY, max_tokens=20)
    neighbour = llm.add_request([1, 2, 3], p)
    for _ in llm.stream("Once upon", p):
        break
    assert llm.scheduler.running == [neighbour]
    [output] = finish(llm, neighbour)
    assert output.token_ids == Slow.generate([1, 2, 3], p, vocab=400)


def test_reading_the_text_along_the_way():
    """A client may look at a request's text at any time, also before it is split into samples."""
    llm = engine(tokenizer="byte_level", max_batch_tokens=16)
    p = SamplingParams(temperature=2.0, n=3, seed=1, max_tokens=9)
    prompt = llm.tokenizer.encode("Once upon a time, there were two")
    calm = llm.generate([prompt], p)
    request = llm.add_request(prompt, p)
    assert llm.text(request) == ""
    while llm.has_work():
        llm.step()
        texts = [llm.text(sample) for sample in request.samples]
        assert all(output.text.startswith(text) for output, text in zip(calm, texts))
    assert texts == [output.text for output in calm]


# ---- aborts, refusals, failures ----


@pytest.mark.parametrize("moment", range(9))
def test_abort_at_any_moment(moment):
    """Waiting, half-way through the prompt, decoding, just finished, as a whole or one sample of three; and twice."""
    llm, p = engine(40, max_batch_tokens=16), SamplingParams(temperature=2.0, seed=1, max_tokens=4, n=3)
    prompt = list(range(37))
    other = llm.add_request([5, 6], replace(GREEDY, max_tokens=12))
    whole, part = llm.add_request(prompt, p), llm.add_request(prompt[::-1], p)
    for _ in range(moment):
        llm.step()
    victim = part.samples[-1]
    done = [sample.status == FINISHED for sample in whole.samples]
    for _ in "12":
        llm.abort(whole)
        llm.abort(victim)
        llm.scheduler.check()
    assert all(s.finish_reason == ("length" if d else "abort") for s, d in zip(whole.samples, done))
    outputs = finish(llm, other, part)
    assert outputs[0].token_ids == Slow.generate([5, 6], replace(GREEDY, max_tokens=12))
    if victim is not part:
        assert tokens_of(outputs[1:3]) == [Slow.generate(prompt[::-1], p, i) for i in (0, 1)]
    assert len(outputs) == (4 if victim is not part else 2)
    stats = llm.stats()
    assert stats["finished"] + stats["aborted"] == 1 + 3 + 3  # also those that never came to be


REFUSED = [([], {}, "prompt.*empty"), ([1, 64], {}, "prompt.*64.*63"), ([-1], {}, "prompt.*-1"),
           ([1, True], {}, "prompt: .* int, got True, which is bool"), (["1"], {}, "prompt: .* got '1', which is str"),
           ([1.0], {}, "prompt: .* 1.0, which is float"), (7, {}, "prompt: .* list of token ids, got int"),
           (None, {}, "prompt: .* got NoneType"), ("text", {}, "prompt.*tokenizer"),
           ([1] * 129, {}, "prompt: 129.*max_model_len=128"),
           ([1] * 100, {"max_tokens": 29}, "prompt: 100.*max_tokens=29.*129.*max_model_len=128"),
           ([1] * 70, {"max_tokens": 12}, "prompt: 70.*max_tokens=12.*21 KV blocks.*20"),
           ([1], {"n": 17}, "n.*17.*max_batch_requests=16"),
           ([1], {"stop": "x"}, "stop.*tokenizer"), ([1], {"logit_bias": {64: 1.0}}, "logit_bias.*64"),
           ([1], {"logit_bias": {-2: 1.0}}, "logit_bias.*-2"), ([1], {"stop_token_ids": [64]}, "stop_token_ids.*64")]


@pytest.mark.parametrize("prompt, options, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_refusals_name_the_limit_and_leave_the_rest_alone(prompt, options, message):
    llm = engine(20)
    other = llm.add_request([5, 6, 7], GREEDY)
    llm.step()
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        llm.add_request(prompt, SamplingParams(**options))
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        llm.generate([[1, 2], prompt], [GREEDY, SamplingParams(**options)])
    assert llm.scheduler.running == [other] and llm.stats()["waiting"] == 0
    assert tokens_of(finish(llm, other)) == [Slow.generate([5, 6, 7], GREEDY)]


def test_what_just_fits_is_served():
    llm = engine(20)
    assert len(llm.generate([[1] * 70], replace(GREEDY, max_tokens=11))[0].token_ids) == 11  # 80 tokens in 20 blocks
    roomy = engine()
    assert len(roomy.generate([[1] * 100], replace(GREEDY, max_tokens=28))[0].token_ids) == 28
    assert len(roomy.generate([[1]], replace(GREEDY, n=16))) == 16


@pytest.mark.parametrize("options, message", [
    ({"max_model_len": 129}, "max_model_len.*128.*129"), ({"max_model_len": 1}, "max_model_len"),
    ({"kv_memory": 1000}, "kv_memory.*1000"), ({"kv_memory": -1}, "kv_memory"), ({"kv_memory": True}, "kv_memory"),
    ({"policy": "random"}, "policy.*random"), ({"max_batch_requests": 0}, "max_batch_requests.*0"),
    ({"max_batch_tokens": 4, "max_batch_requests": 8}, "max_batch_requests.*4.*8"),
    ({"block_size": 0}, "block_size.*0"), ({"kv_dtype": "fp8"}, "kv_dtype: must be one of auto, bfloat16, int8, got 'fp8'"),
    ({"swap_memory": -1}, "swap_memory.*-1"),
    ({"swap_memory": 0.5}, "swap_memory.*0.5"), ({"swap_memory": math.inf}, "swap_memory.*inf"),
    ({"swap_memory": 1 << 62}, "there is no room for .* or swap_memory"),
    ({"swap_memory": 1e30}, "swap_memory: must be .* to 2.62, got 1e.30"),
    ({"prefix_caching": "no"}, "prefix_caching: must be True or False, got 'no'"), ({"graphs": 2}, "graphs: .* got 2"),
    ({"overlap": 0}, "overlap: must be True or False, got 0"), ({"overlap": "yes"}, "overlap: .* or False, got 'yes'"),
    ({"seed": [1]}, r"seed: .* integer, got \[1\]")], ids=str)
def test_impossible_engines_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLM(toy(), **options)


@pytest.fixture
def poisoned():
    """A toy whose token 63 has no sensible embedding: NaN spreads from it to keys, values and logits."""
    model = copy.copy(toy())
    model.embed = model.embed.clone()
    model.embed[63] = math.nan
    model.head = model.head.clone()
    model.head[63] = 0  # nobody else ever says it
    return model


def test_nan_logits_end_only_their_own_request(poisoned):
    llm = engine(14, model=poisoned, max_batch_tokens=16)
    prompts = [[1, 2, 3], list(range(20)), [4] * 9]
    calm = [engine(model=poisoned).generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    assert all(63 not in tokens for tokens in calm)
    sampled = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, n=2, max_tokens=8, logprobs=2)
    good = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    bad = [llm.add_request([9, 9, 63, 9, 9, 9], GREEDY), llm.add_request([8, 63], sampled)]
    again = [llm.add_request(prompt, GREEDY) for prompt in prompts]  # these get blocks that held NaN
    assert tokens_of(finish(llm, *good, *again)) == calm * 2
    for request in itertools.chain(*(r.samples for r in bad)):
        assert request.finish_reason == "abort" and request.num_output == 0 and "not finite" in request.error
    assert llm.stats()["finished"] == 6 and llm.stats()["aborted"] == 3
    with pytest.raises(ValueError, match="not finite"):
        llm.generate([[1, 2, 3], [63]], GREEDY)
    with pytest.raises(ValueError, match="not finite"):
        llm.tokenizer = Tokenizer(TOKENIZERS / "byte_level")
        list(llm.stream([63], GREEDY))
    assert is_clean(llm) and tokens_of(llm.generate(prompts, GREEDY)) == calm


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_banning_every_token_is_an_error(temperature):
    llm, ban = engine(), dict.fromkeys(range(64), -math.inf)
    other = llm.add_request([1, 2, 3], GREEDY)
    with pytest.raises(ValueError, match="banned"):
        llm.generate([[1]], SamplingParams(temperature=temperature, logit_bias=ban))
    assert tokens_of(finish(llm, other)) == [Slow.generate([1, 2, 3], GREEDY)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["pack", "forward", "sample", "commit"])
def test_an_interrupted_step_harms_nobody(monkeypatch, where, error):
    """`generate` leaves nothing behind when a step fails, and requests of others go on to the right end."""
    llm, p = engine(model=copy.copy(toy()), max_batch_tokens=16), replace(GREEDY, max_tokens=10)
    split = SamplingParams(temperature=2.0, seed=1, n=2, max_tokens=10)
    others = [llm.add_request([1, 2, 3], p), llm.add_request([7, 8], split)]
    owner, calls = (llm.model if where == "forward" else llm), itertools.count()
    original = getattr(owner, where)

    def interrupted(*args):
        if next(calls) == 3:
            raise error
        return original(*args)

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(error):
        llm.generate([[4, 5, 6], list(range(60))], p)
    assert llm.scheduler.running == [others[0], *others[1].samples] and not llm.scheduler.num_waiting
    assert tokens_of(finish(llm, *others)) == expected([[1, 2, 3], [7, 8]], [p, split])
    assert tokens_of(llm.generate([[4, 5, 6]], p)) == [Slow.generate([4, 5, 6], p)]


# ---- counters ----


def counters(llm) -> dict[str, int]:
    """What is the same in every run."""
    return {name: value for name, value in llm.stats().items() if not name.endswith("_seconds")}


def test_counters_of_two_requests_worked_out_by_hand():
    """Budget 8, blocks of 4. A: 10 tokens, B: 3, each generates 3.

    step 1: 8 of A · step 2: 2 of A (samples), 3 of B (samples) · steps 3 and 4: one each.
    """
    llm = engine(10, max_batch_tokens=8, max_batch_requests=4)
    a, b = llm.add_request(list(range(10)), replace(GREEDY, max_tokens=3)), llm.add_request([50, 51, 52], GREEDY)
    b.max_tokens = 3
    zero = dict.fromkeys(counters(llm), 0)
    assert counters(llm) == {**zero, "waiting": 2, "blocks_free": 10}
    llm.step()
    llm.step()
    assert counters(llm) == {**zero, "steps": 2, "forward_passes": 2, "computed_tokens": 13, "prompt_tokens": 13,
                           "output_tokens": 2, "running": 2, "blocks_used": 4, "blocks_free": 6}
    finish(llm, a, b)
    # Computed: 12 tokens of A in three full blocks, 5 of B in one full block and a part; the last token never is.
    ended = {**zero, "steps": 4, "forward_passes": 4, "computed_tokens": 17, "prompt_tokens": 13, "output_tokens": 6,
             "finished": 2, "blocks_cached": 4, "blocks_free": 6}
    assert counters(llm) == ended
    # A once more: two full blocks hit, since of ten tokens at least one must be computed; then tokens 9 and 10.
    llm.generate([list(range(10))], replace(GREEDY, max_tokens=1))
    assert counters(llm) == {**ended, "steps": 5, "forward_passes": 5, "computed_tokens": 19, "prompt_tokens": 15,
                           "output_tokens": 7, "finished": 3, "hit_tokens": 8}


def test_what_a_failed_step_has_computed_counts_as_what_it_was(monkeypatch):
    """Rows that went through the model in vain; those of prompts among them too."""
    llm = engine()
    llm.add_request([1, 2, 3], replace(GREEDY, max_tokens=1))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(llm, "sample", lambda *args: 1 / 0)
        llm.step()
    llm.step()
    stats = llm.stats()
    assert (stats["computed_tokens"], stats["prompt_tokens"], stats["output_tokens"]) == (6, 6, 1)


def test_where_the_time_goes(monkeypatch):
    """Every part of a step counts once, whatever it takes; a step without a plan counts nothing."""
    seconds = itertools.accumulate(itertools.count(1))  # 1, 3, 6, 10, ...: laps of 2, 3, 4, ...
    monkeypatch.setattr(nanoserve.time, "perf_counter", lambda: next(seconds))
    llm = engine()
    assert llm.step() == [] and not any(llm.watch.seconds.values())
    next(seconds)
    llm.add_request([1, 2], GREEDY)
    llm.step()
    laps = [llm.stats()[f"{part}_seconds"] for part in ("schedule", "pack", "launch", "wait", "commit")]
    assert laps == [laps[0] + i for i in range(5)]


def test_counters_of_a_preemption_worked_out_by_hand():
    """Four blocks of 4. A and B: 4 tokens each, 8 to generate, so 11 tokens in three blocks each.

    step 1: 4 + 4 · steps 2 to 5: one each, all four blocks are full · step 6: A takes B's second block · steps 7, 8:
    A alone, done · step 9: B again, its first block still matches, 5 of 9 tokens computed · steps 10 and 11: B alone.
    """
    llm = engine(4)
    a, b = llm.add_request([1, 2, 3, 4], GREEDY), llm.add_request([5, 6, 7, 8], GREEDY)
    assert tokens_of(finish(llm, a, b)) == [Slow.generate([1, 2, 3, 4], GREEDY), Slow.generate([5, 6, 7, 8], GREEDY)]
    stats = llm.stats()
    assert (stats["steps"], stats["computed_tokens"], stats["prompt_tokens"]) == (11, 8 + 8 + 3 + 5 + 2, 8)
    assert (stats["output_tokens"], stats["preemptions"], stats["hit_tokens"]) == (16, 1, 4)
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)


def test_salted_caches_are_separate():
    llm, prompt = engine(), list(range(20))

    def hits(salt):
        before = llm.stats()["hit_tokens"]
        [output] = finish(llm, llm.add_request(prompt, GREEDY, cache_salt=salt))
        assert output.token_ids == Slow.generate(prompt, GREEDY)
        return llm.stats()["hit_tokens"] - before

    assert [hits(salt) for salt in (None, None, "a", "b", "a", "b", None)] == [0, 16, 0, 0, 16, 16, 16]


# ---- what the host does per step ----


def calls_during(function) -> int:
    """How many calls, of Python and of C functions, `function` makes."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_waiting_requests_cost_a_step_nothing():
    def calls(waiting):
        llm = engine(max_batch_requests=4)
        for _ in range(waiting):
            llm.add_request([1, 2, 3], replace(GREEDY, max_tokens=5))
        return [calls_during(llm.step) for _ in range(7)]  # admits four, decodes, ends four, admits the next

    calls(10)
    assert calls(10_000) == calls(100)


def test_waiting_requests_cost_generate_nothing():
    """The same for the loop around the step: calls from the start of one step to the start of the next."""
    def calls(waiting):
        llm, count, marks = engine(max_batch_requests=4), 0, []
        original = llm.step

        def profile(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        def step():
            if len(marks) == 6:
                raise InterruptedError
            marks.append(count)
            return original()

        llm.step = step
        llm.abort = lambda request: None  # giving up is not part of the measurement
        sys.setprofile(profile)
        try:
            llm.generate([[1, 2, 3]] * waiting, replace(GREEDY, max_tokens=9))
        except InterruptedError:
            pass
        finally:
            sys.setprofile(None)
        return [after - before for before, after in zip(marks[1:], marks[2:])]

    calls(10)
    assert calls(2000) == calls(100)


def test_the_engine_says_what_runs_where():
    line = engine().describe()
    for part in ("llama", "float64", "cpu", "PyTorch kernels and attention)", "200 KV blocks of 4",
                 "16 requests", "64 tokens"):
        assert part in line
    assert "PyTorch kernels and attention, overlapping steps)" in engine(overlap=True).describe()
    assert nanoserve.DEFAULT_MODEL.name == "model"


# ---- found by reading the engine as an adversary would ----


def test_a_stream_is_complete_though_others_step():
    """Whoever steps may finish a request while its stream waits at a yield."""
    llm = engine(tokenizer="byte_level")
    p = replace(GREEDY, max_tokens=12, ignore_eos=True)
    whole = "".join(llm.stream([5, 6, 7], p))
    first, pieces = llm.stream([5, 6, 7], p), []
    pieces.append(next(first))
    llm.generate([[8, 9]], replace(p, max_tokens=30))
    assert "".join(pieces + list(first)) == whole


def test_broken_keys_and_values_are_not_inherited(monkeypatch):
    """What a request with NaN logits computed is not found by the next one with the same prompt."""
    llm = engine(model=copy.copy(toy()))
    healthy, prompt = llm.model.forward, list(range(40))
    monkeypatch.setattr(llm.model, "forward", lambda *args: healthy(*args) * float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        llm.generate([prompt], GREEDY)
    monkeypatch.setattr(llm.model, "forward", healthy)
    assert tokens_of(llm.generate([prompt], GREEDY)) == [Slow.generate(prompt, GREEDY)]
    assert llm.stats()["hit_tokens"] == 0


@pytest.mark.parametrize("options, name", [({"priority": "x"}, "priority"), ({"priority": float("nan")}, "priority"),
                                           ({"priority": True}, "priority"), ({"cache_salt": ["a"]}, "cache_salt"),
                                           ({"tenant": 7}, "tenant"),
                                           ({"params": {"temperature": 0}}, "params")])
def test_add_request_refuses_what_would_break_the_queue(options, name):
    llm = engine()
    with pytest.raises(ValueError, match=name):
        llm.add_request([1, 2], **options)
    assert not llm.has_work() and tokens_of(llm.generate([[1, 2]], GREEDY)) == [Slow.generate([1, 2], GREEDY)]


def test_a_policy_whose_keys_do_not_compare_refuses_the_request():
    llm = engine(policy=lambda request: request.root)
    first = llm.add_request([1, 2], GREEDY, cache_salt="a")
    with pytest.raises(ValueError, match="policy"):
        llm.add_request([3, 4], GREEDY)
    assert llm.scheduler.waiting == [first]
    llm.scheduler.check()


def test_a_deadline_ends_a_request_with_what_it_has():
    """`step` returns it like any that changed, `generate` its output; whoever waited has cost nothing."""
    llm = engine(max_batch_requests=1)
    now = 0
    llm.scheduler.clock = lambda: now
    running = llm.add_request([1, 2, 3], replace(GREEDY, deadline=5, ttft_target=1, max_tokens=20))
    waiting = llm.add_request([4, 5, 6], replace(GREEDY, deadline=4))
    quick = llm.add_request([7, 8, 9], replace(GREEDY, itl_target=0.5, max_tokens=2))
    assert llm.step() == [running]
    now = 4.5
    assert llm.step() == [running, waiting] and waiting.finish_reason == "abort" and "deadline" in waiting.error
    now = 5.5
    assert llm.step() == [quick, running] and llm.output(running).token_ids == Slow.generate([1, 2, 3], GREEDY)[:2]
    assert llm.step() == [quick] and llm.step() == []
    stats = llm.stats()
    assert (stats["goodput"], stats["with_targets"], stats["aborted"], stats["finished"]) == (1, 3, 2, 1)
    assert stats["computed_tokens"] == 3 + 1 + 3 + 1  # nothing for the one that waited
    llm.scheduler.clock = iter(range(0, 10_000, 2)).__next__
    late, other = llm.generate([[1, 2, 3], [4, 5]], [replace(GREEDY, deadline=7), replace(GREEDY, max_tokens=1)])
    assert late.finish_reason == "abort" and 0 < len(late.token_ids) < 8 and other.finish_reason == "length"
    assert is_clean(llm)


def test_a_failed_step_does_not_hide_who_expired(monkeypatch):
    llm = engine(max_batch_requests=1)
    late, other = llm.add_request([1, 2], replace(GREEDY, deadline=1)), llm.add_request([3, 4], GREEDY)
    start = llm.scheduler.clock()
    llm.scheduler.clock = lambda: start + 60
    monkeypatch.setattr(llm, "pack", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.step()
    assert llm.drop_step("it failed") == [other, late] and llm.stats()["aborted"] == 2 and is_clean(llm)


def test_a_budget_alone_limits_the_requests_too():
    assert LLM(toy(), kv_memory=1 << 20, max_batch_tokens=8).scheduler.max_batch_requests == 8


def test_a_shorter_rope_table_shortens_the_model():
    config = toy().config
    short = GPT(config, torch.float64, "cpu", max_len=16).randomize(0)
    with pytest.raises(ValueError, match="16"):
        LLM(short, kv_memory=1 << 20, max_model_len=17)
    with pytest.raises(ValueError, match="16"):
        LLM(short, kv_memory=1 << 20).add_request([1] * 15, replace(GREEDY, max_tokens=2))


@pytest.mark.parametrize("kv_dtype", [torch.float64, torch.int8])
def test_the_largest_step_is_as_large_as_the_limits(monkeypatch, kv_dtype):
    """On a GPU it is computed before the cache is made, and that gets a share of what is then left."""
    llm, batches, logits = engine(max_model_len=40), [], []
    forward, sample = llm.model.forward, kernels.sample
    monkeypatch.setattr(llm.model, "forward", lambda batch, cache: (batches.append(batch), forward(batch, cache))[1])
    monkeypatch.setattr(kernels, "sample", lambda rows, **options: (logits.append(rows), sample(rows, **options))[1])
    for budget, most, each in ((64, 16, 4), (70, 16, 4), (5, 16, 1), (200, 4, 40)):
        llm._compute_the_largest_step(kv_dtype, 4, budget, most)
        batch = batches.pop()
        assert batch.context_lens.tolist() == batch.query_start.diff().tolist() == [each] * min(budget, most)
        assert len(batch.tokens) == len(batch.positions) == each * min(budget, most) and batch.positions.max() == each - 1
        assert batch.slots.max() < 4 and not batch.block_tables.any() and batch.block_tables.shape[1] * 4 >= each
        assert len(logits.pop()) == min(budget, most) and not llm.pool.stats()["blocks_used"]


def test_a_step_without_memory_names_the_knobs(monkeypatch):
    llm = engine()

    def fail(batch, cache):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llm.model, "forward", fail)
    with pytest.raises(ValueError, match="max_batch_tokens: there is no memory for a step of 64 tokens of 16 requests"):
        llm._compute_the_largest_step(torch.float64, 4, 64, 16)


def test_the_middle_of_a_prompt_attends_to_nothing_in_the_last_layer(monkeypatch):
    """Nobody wants its logits, so its keys and values are all that the layer has to compute."""
    attend, calls = kernels.paged_attention, []
    monkeypatch.setattr(kernels, "paged_attention", lambda *args: (calls.append(1), attend(*args))[1])
    llm = engine(max_batch_tokens=16)
    request = llm.add_request(list(range(1, 33)), GREEDY)
    counts = []
    while llm.has_work() and len(counts) < 3:
        calls.clear()
        llm.step()
        counts.append(len(calls))
    layers = llm.model.config.num_layers
    assert counts == [layers - 1, layers, layers] and request.num_output == 2


def test_graphs_of_a_mixture_end_where_its_experts_run_one_by_one(monkeypatch):
    llm = LLM(toy(), kv_memory=1 << 20)
    monkeypatch.setattr(llm, "device", torch.device("cuda"))
    monkeypatch.setattr(kernels, "compiled", lambda *_: (None, True))
    monkeypatch.setattr(nanoserve, "DecodeGraphs", lambda model, cache, max_rows, max_blocks: max_rows)
    monkeypatch.setattr(llm.model.config, "head_dim", 16)
    assert llm._capture(llm.model, llm.cache, 100) == 100
    monkeypatch.setattr(llm.model.config, "experts_per_token", 4)
    monkeypatch.setattr(llm.model.layers[1], "router", torch.ones(1))
    for pairs, rows in (400, 100), (256, 64), (3, None), (0, None):
        monkeypatch.setattr(kernels, "most_pairs", lambda *_, pairs=pairs: pairs)
        assert llm._capture(llm.model, llm.cache, 100) == rows


def test_graphs_without_memory_name_the_knobs(monkeypatch):
    """The cache's share of the memory may leave too little for what they need."""
    def graphs(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    llm = LLM(toy(), kv_memory=1 << 20)
    monkeypatch.setattr(llm, "device", torch.device("cuda"))
    monkeypatch.setattr(kernels, "compiled", lambda *_: (None, True))
    monkeypatch.setattr(nanoserve, "DecodeGraphs", graphs)
    monkeypatch.setattr(llm.model.config, "head_dim", 16)
    with pytest.raises(ValueError, match="kv_memory: leaves no memory to the decode graphs; lower it, or max_"):
        llm._capture(llm.model, llm.cache, 4)
