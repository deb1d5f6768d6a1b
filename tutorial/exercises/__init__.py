"""What the exercises run on: a toy model whose greedy tokens depend on everything before them, and a short serving run.

The toy computes in float64, where only the PyTorch definitions run, so an exercise about a kernel is about its definition.
Its head is untied and boosted, its cache is full of NaN and its blocks are handed out in no order: what reads a wrong slot,
a wrong position or a wrong head then says something else at once.
"""

import functools
import math
import random
from collections import OrderedDict
from types import SimpleNamespace

import torch

from nanoserve import GPT, LLM, KVCache, ModelConfig, SamplingParams

CONFIG = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 64, "hidden_size": 32,
          "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 128, "tie_word_embeddings": False}
STEP_LIMIT = 500  # no run here needs half as many


class Wrong(Exception):
    """What is wrong with a submission, in words for whoever wrote it."""


@functools.cache
def toy(window: int | None = None) -> GPT:
    """The model: Mistral's shape, so that it can have a sliding window."""
    model = GPT(ModelConfig.from_dict({**CONFIG, "sliding_window": window}), torch.float64, "cpu").randomize(1, std=0.5)
    model.head *= 4
    return model


def engine(blocks: int = 60, window: int | None = None, **options) -> LLM:
    """An LLM over the toy with so many blocks of four tokens."""
    model = toy(window)
    c, size = model.config, options.setdefault("block_size", 4)
    block_bytes = KVCache.bytes_per_block(c.num_layers, size, c.num_kv_heads, c.head_dim, model.dtype.itemsize)
    llm = LLM(model, kv_memory=(blocks + 1) * block_bytes, **{"max_batch_tokens": 32, "max_batch_requests": 8, **options})
    llm.cache.data.fill_(math.nan)
    llm.pool.free = OrderedDict.fromkeys(random.Random(0).sample(sorted(llm.pool.free), len(llm.pool.free)))
    return llm


def prompt(length: int, seed: int) -> list[int]:
    """So many random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(CONFIG["vocab_size"]) for _ in range(length)]


def serve(exercise) -> SimpleNamespace:
    """The whole engine over an exercise's requests, each added at its step: tokens, how they are shown, exact counters.

    Checks the invariants after every step and that no block is left in use; raises Wrong where they do not hold. What the
    exercise defines is asked as well: `before_step(llm)`, and at the end `measure(llm, counters)` for counters of its own.
    """
    llm, requests, times = engine(**exercise.ENGINE), [], {}  # times: for each sample the steps in which it got a token
    before_step = getattr(exercise, "before_step", lambda llm: None)
    measure = getattr(exercise, "measure", lambda llm, counters: {})
    llm.scheduler.clock = lambda: llm.counts["computed_tokens"]  # a step takes as many seconds as it has tokens
    arrivals = list(exercise.REQUESTS)  # (step, prompt, sampling options)
    step = stalls = peak = 0
    while arrivals or llm.has_work():
        while arrivals and arrivals[0][0] <= step:
            _, tokens, options = arrivals.pop(0)
            more = {name: options[name] for name in options.keys() & {"cache_salt", "priority", "tenant"}}
            sampling = {name: options[name] for name in options.keys() - more.keys()}
            requests.append(llm.add_request(tokens, SamplingParams(logprobs=1, **sampling), **more))
        before_step(llm)
        decoding, computed = any(r.num_output for r in llm.scheduler.running), llm.stats()["computed_tokens"]
        for request in llm.step():
            times.setdefault(request, []).append(step)
        try:
            llm.scheduler.check()
        except AssertionError as error:
            raise Wrong(f"after step {step} an invariant does not hold: {error}") from None
        stats = llm.stats()
        stalls += decoding and stats["computed_tokens"] - computed > 16
        peak = max(peak, stats["blocks_used"])
        step += 1
        if step > STEP_LIMIT:
            raise Wrong(f"after {STEP_LIMIT} steps the requests are still not finished: {llm.scheduler.running}")
    if llm.stats()["blocks_used"] or any(llm.pool.refs):
        raise Wrong(f"the last request has ended and {llm.stats()['blocks_used']} blocks are still in use: a leak")
    samples = [sample for request in requests for sample in request.samples]
    outputs = [s.tokens[s.num_prompt:] for s in samples]
    shown = [[f"{token} (log-probability {entry[token]:.2f})" for entry, token in zip(s.logprobs[-len(out):], out)]
             for s, out in zip(samples, outputs)]
    counters = {name: stats[name] for name in ("steps", "computed_tokens", "hit_tokens", "preemptions", "output_tokens",
                                               "with_targets", "goodput")}
    steps = [times[sample] for sample in samples]
    counters |= {"peak_blocks": peak, "stalled_steps": stalls, "token_steps": steps, "first_token_at": [s[0] for s in steps],
                 "longest_gap": max((b - a for s in steps for a, b in zip(s, s[1:])), default=0)}
    return SimpleNamespace(tokens=outputs, shown=shown, counters=counters | measure(llm, counters))
