"""Decoding reads all weights for every step, so until the batch is large enough another request costs little

Survey: A III, IV · B 2.2, 2.4, 7 · C Hardware
Papers: Roofline (Williams, CACM 2009) · LLM Inference Unveiled arXiv:2402.16363 · GenZ arXiv:2406.01698
Code: nanoserve.measure_roofline, nanoserve.Roofline.cost, nanoserve.GPT.forward, kernels.linear
Minutes: read 12, run 1, exercise 20
Kind: run; the H200 is calculated from its datasheet
Exercise: 11
Effect: 16 requests that share one reading of the weights do 14 times the FLOPs per byte of one
"""

# %% [markdown]
# ## The idea
#
# A processor has two speeds: how many bytes a second it can read, and how many floating-point operations it can do. A
# piece of work has two sizes: its bytes and its FLOPs. It can not be faster than the slower of the two allows:
#
#     seconds >= max(bytes / bandwidth, FLOPs / rate)
#
# FLOPs per byte is the work's *arithmetic intensity*. Where the two terms are equal lies the machine's *ridge*: below
# it the memory decides, above it the arithmetic.
#
# *Invariant:* no step is faster than its roofline. *Cost:* none, this is a law; what one buys with it is knowing when
# to stop.

# %% Before you run it: a model of 34 million weights in float32, requests that have 64 tokens of context each.
PREDICT = 16  # How many times the FLOPs per byte of one decoding request have sixteen of them in one step?

# %%
import math
import statistics

import book
import torch

from cache import KVCache
from nanoserve import GPT, LLM, SHAPES, ModelConfig, Roofline, SamplingParams, measure_roofline, parameters

args = book.options(__doc__)
device, dtype = torch.device(args.device), torch.float32
config = ModelConfig.from_dict(SHAPES["qwen3-small"])
llm = LLM(GPT(config, dtype, device, 512).randomize(), max_batch_tokens=256, prefix_caching=False, kv_memory=1 << 28)
bandwidth, rate = measure_roofline(dtype, device)
print(f"\n{llm.describe()}\n~ this machine: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:,.0f} GFLOP/s, "
      f"ridge at {rate / bandwidth:.1f} FLOPs per byte")

# %% [markdown]
# ## Bytes and FLOPs of a step, counted
#
# A step reads each weight once, whatever the batch, and each request's cached keys and values once. It does two FLOPs
# per weight and token, and four per pair of query and key, head and dimension. `Roofline` watches the engine's
# scheduler and adds that up; with a bandwidth of 1 and an infinite rate its "seconds" are bytes, the other way round
# they are FLOPs.

# %%
CONTEXT = 64


def count(run):
    """(bytes, FLOPs) of the steps that run() takes."""
    as_bytes, as_flops = Roofline(llm, 1.0, math.inf), Roofline(llm, math.inf, 1.0)
    run()
    flops = as_flops.close()
    return as_bytes.close(), flops


def measured_step():
    """Seconds of one step."""
    with book.Timer() as t:
        llm.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return t.seconds


def decode(requests):
    """(bytes, FLOPs, seconds) of one step in which so many requests decode."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    added = [llm.add_request(book.token_ids(CONTEXT, i, config.vocab_size), params) for i in range(requests)]
    while any(request.num_output == 0 for request in added):
        llm.step()
    seconds = [measured_step() for _ in range(5)]
    moved, flops = count(llm.step)
    for request in added:
        llm.abort(request)
    return moved, flops, statistics.median(seconds)


def prefill(tokens):
    """The same for a step that computes a prompt of so many tokens."""
    def prompt():
        llm.add_request(book.token_ids(tokens, 0, config.vocab_size), SamplingParams(temperature=0, max_tokens=1))

    seconds = []
    for _ in range(3):
        prompt()
        seconds.append(measured_step())
    prompt()
    moved, flops = count(llm.step)
    return moved, flops, statistics.median(seconds)


decode(2)  # warm up
BATCHES = (1, 2, 4, 8, 16, 32)
steps = {f"decode, {n} request{'s' * (n > 1)}": (n, decode(n)) for n in BATCHES} | {
    f"prefill, {n} tokens": (n, prefill(n)) for n in (16, 64, 256)
}
book.table("step | MB | MFLOP | FLOPs per byte | bound by, on an H200",
    [(name, moved / 1e6, flops / 1e6, flops / moved, "memory" if flops / moved < 206 else "arithmetic")
     for name, (_, (moved, flops, _)) in steps.items()], "exact: what a step has to read and to compute (float32)")
print("\n~ step                  floor ms   measured ms   share of the roofline   tokens/s   bound by")
floors = {}
for name, (n, (moved, flops, seconds)) in steps.items():
    floors[name] = floor = max(moved / bandwidth, flops / rate)
    print(f"~ {name:22s}{1e3 * floor:8.2f}{1e3 * seconds:14.2f}{100 * floor / seconds:20.0f} %{n / seconds:16,.0f}   "
          f"{'memory' if moved / bandwidth > flops / rate else 'arithmetic'}")

one, sixteen = steps["decode, 1 request"][1], steps["decode, 16 requests"][1]
gain = (sixteen[1] / sixteen[0]) / (one[1] / one[0])
book.predicted("FLOPs per byte, 16 requests against one", PREDICT, gain,
    f"16 times the FLOPs; the weights are read once, but 16 caches: {sixteen[0] / one[0]:.2f} times the bytes")
if any(floors[name] > seconds for name, (_, (_, _, seconds)) in steps.items()):
    print("~ (a share above 100 %: the machine was busy with something else while its roofline was measured)")

# %% [markdown]
# ## Where the ridge lies
#
# With B requests a step does about 2 x weights x B FLOPs and reads 4 x weights bytes, so its intensity is B / 2 in
# float32 (B in 16 bits, 4 B in 4 bits), less what the caches add to the bytes. A ridge at 5 FLOPs per byte, say, is
# reached with 10 requests in float32, or a few more.

# %%
body = sum(math.prod(p.shape) for p in parameters(config) if len(p.shape) == 2 and p.name not in ("embed", "head"))
weights = body + config.vocab_size * config.hidden_size
kv = KVCache.bytes_per_block(config.num_layers, 1, config.num_kv_heads, config.head_dim, dtype.itemsize)
pair = 4 * config.num_heads * config.head_dim * config.num_layers
ridge = rate / bandwidth


def turning_point(ridge, weights, itemsize, kv, pair, context):
    """The batch at which FLOPs / bytes = ridge; infinite where the caches grow faster than the arithmetic."""
    gain = 2 * weights + pair * context - ridge * kv * context
    return ridge * weights * itemsize / gain if gain > 0 else math.inf


turns = turning_point(ridge, weights, dtype.itemsize, kv, pair, CONTEXT)
print(f"\n~ on this machine, with a ridge at {ridge:.1f} FLOPs per byte, arithmetic decides from {turns:.0f} requests on")

# %% [markdown]
# ## Where batching does not help
#
# Weights are shared by the batch. Caches are not. With long contexts each request brings its own bytes, and the
# intensity of attention stays at query heads over KV heads (times 2 over the bytes of a number) whatever the batch. So
# there is a ceiling, and past it more requests only take longer. The same picture for an H200 from its datasheet: 4.8
# TB/s, 989 TFLOP/s in bf16.

# %%
H200 = 989e12 / 4.8e12
large = ModelConfig.from_dict(SHAPES["llama-3.1-8b"])
big = sum(math.prod(p.shape) for p in parameters(large) if len(p.shape) == 2 and p.name != "embed")
big_kv = KVCache.bytes_per_block(large.num_layers, 1, large.num_kv_heads, large.head_dim, 2)
big_pair = 4 * large.num_heads * large.head_dim * large.num_layers


def intensity(requests, context):
    return requests * (2 * big + big_pair * context) / (2 * big + requests * context * big_kv)


contexts = (128, 1024, 8192, 65536)
found = {context: turning_point(H200, big, 2, big_kv, big_pair, context) for context in contexts}
book.table("context | 1 request | 16 | 256 | 4,096 | arithmetic-bound from",
    [(context, *(intensity(n, context) for n in (1, 16, 256, 4096)), f"{turn:,.0f} requests" if turn < math.inf else "never")
     for context, turn in found.items()],
    f"Llama-3.1-8B, bf16, decoding: FLOPs per byte (an H200's ridge is at {H200:.0f})")
book.bars({f"context {c:,}": intensity(256, c) for c in contexts}, "FLOPs per byte",
    "256 requests: the longer the context, the less a batch helps")

# %%
with book.figure(args, "ch02_roofline", columns=2, size=(9, 3.6)) as axes:
    if axes is not None:
        left, right = axes
        for kind, marker, colour in (("decode", "o-", book.BLUE), ("prefill", "s--", book.ORANGE)):
            points = [(n, flops / moved) for name, (n, (moved, flops, _)) in steps.items() if name.startswith(kind)]
            left.plot([n for n, _ in points], [y for _, y in points], marker, color=colour, label=kind)
        left.set(title="34M weights in float32, counted", xlabel="tokens in the step", ylabel="FLOPs per byte",
                 xscale="log", yscale="log")
        left.legend(fontsize=9, loc="lower right")
        batches = [2**i for i in range(13)]
        for context, colour, style in zip(contexts, (book.BLUE, book.GREEN, book.ORANGE, book.RED), ("-", "--", "-.", ":")):
            right.plot(batches, [intensity(n, context) for n in batches], style, color=colour, label=f"context {context:,}")
        right.axhline(H200, color=book.BLACK, linewidth=1)
        right.annotate("H200's ridge", (1.2, H200 * 1.15), fontsize=9)
        right.set(title="Llama-3.1-8B on an H200, calculated", xlabel="requests", ylabel="FLOPs per byte",
                  ylim=(0.2, 1500), xscale="log", yscale="log")
        right.legend(fontsize=9, loc="lower right")

# %% [markdown]
# ## Why
#
# Prefill of 256 tokens does 177 times the arithmetic of decoding one, with the same weights (it would be 256 times, but
# only its last row goes through the output layer): compute-bound on a CPU, and from some 600 tokens on an H200 too.
# Decoding one request does two FLOPs for every four bytes: memory-bound on any machine whose ridge is above one half,
# which is all of them. Everything in Part II of this tutorial moves one of the two numbers: fewer bytes per weight
# (chapter 09), fewer per cached token (10), more tokens per reading (11).
#
# The floor is not what is reached. The share column says how far away the engine is: launches, Python, caches too
# small, attention that waits.
#
# ## At scale
#
# "LLM Inference Unveiled" does this analysis operation by operation, for many models and devices. For the H200 above,
# contexts of 1,024 tokens and more are never arithmetic-bound while decoding: with 128 KiB per token, the caches of a
# large batch outweigh the weights. That is why disaggregation (chapter 17) gives prefill and decoding different
# machines.
#
# ## Try this
#
# 1. `dtype = torch.bfloat16`: which column halves, and where does the ridge go?
# 2. CONTEXT = 300. Which rows change?
# 3. Put your phone's or laptop's datasheet numbers in the place of the H200's.
#
# **Exercise 11** (`python tutorial/check.py 11`): write `Roofline.cost`, which counted the bytes and FLOPs above.

# %% The claim, on counters.
ratio = {name: flops / moved for name, (_, (moved, flops, _)) in steps.items()}
assert ratio["decode, 16 requests"] > 10 * ratio["decode, 1 request"], "sixteen requests share the weights"
assert abs(ratio["decode, 1 request"] - 0.5) < 0.05 and ratio["prefill, 256 tokens"] > 50
assert intensity(4096, 65536) < H200 < intensity(4096, 128), "caches are not shared"
