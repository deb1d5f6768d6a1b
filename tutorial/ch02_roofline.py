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
# piece of work has two sizes: its bytes and its FLOPs. It cannot be faster than the slower of the two allows:
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
from nanoserve import GPT, LLM, SHAPES, ModelConfig, Roofline, SamplingParams, measure_roofline

args = book.options(__doc__)
device, dtype, CONTEXT = torch.device(args.device), torch.float32, 64
config = ModelConfig.from_dict(SHAPES["qwen3-small"])
model = GPT(config, dtype, device, max_len=512).randomize()  # what the weights are does not matter here
llm = LLM(model, max_batch_tokens=256, prefix_caching=False, kv_memory=1 << 28)
bandwidth, rate = measure_roofline(dtype, device)
print(f"\n{llm.describe()}\n~ this machine: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:,.0f} GFLOP/s, "
      f"ridge at {rate / bandwidth:.1f} FLOPs per byte")

# %% [markdown]
# ## Bytes and FLOPs of a step, counted
#
# A step reads each weight once, whatever the batch, and each request's cached keys and values once. It does two FLOPs
# per weight and token, and four per pair of query and key, head and dimension. `Roofline` watches the engine and adds
# up the least seconds: with a bandwidth of 1 and an infinite rate these are the bytes, the other way round the FLOPs.

# %%
def cost_of_a_step(prepare):
    """(bytes, FLOPs, median seconds) of the step that comes after prepare()."""
    seconds = []
    for _ in range(5):
        prepare()
        with book.Timer() as t:
            llm.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        seconds.append(t.seconds)
    prepare()
    as_bytes, as_flops = Roofline(llm, 1.0, math.inf), Roofline(llm, math.inf, 1.0)
    llm.step()
    flops = as_flops.close()
    return as_bytes.close(), flops, statistics.median(seconds)


def decode(requests):
    """A step in which so many requests decode."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    added = [llm.add_request(book.token_ids(CONTEXT, i, config.vocab_size), params) for i in range(requests)]
    while any(request.num_output == 0 for request in added):
        llm.step()  # computes the prompts
    cost = cost_of_a_step(lambda: None)
    for request in added:
        llm.abort(request)
    return cost


def prefill(tokens):
    """A step that computes a prompt of so many tokens."""
    prompt, params = book.token_ids(tokens, 0, config.vocab_size), SamplingParams(temperature=0, max_tokens=1)
    return cost_of_a_step(lambda: llm.add_request(prompt, params))


decode(2)  # warms up
steps = {("decode", n): decode(n) for n in (1, 2, 4, 8, 16, 32)} | {("prefill", n): prefill(n) for n in (16, 64, 256)}
intensities = {step: flops / moved for step, (moved, flops, _) in steps.items()}
book.table("step of | tokens | MB | MFLOP | FLOPs per byte",
    [(*step, moved / 1e6, flops / 1e6, intensities[step]) for step, (moved, flops, _) in steps.items()])

gain, one, many = intensities["decode", 16] / intensities["decode", 1], steps["decode", 1][0], steps["decode", 16][0]
book.predicted("FLOPs per byte, 16 requests against one", PREDICT, gain, "16 times the FLOPs; bytes: "
    f"{one / 1e6:.0f} MB for one, and {(many - one) / 15e6:.1f} more, its cache, for each other: {many / one:.2f} times")

# %% [markdown]
# ## And in seconds: predicted against measured
#
# With B requests a step does about 2 x weights x B FLOPs and reads 4 x weights bytes, so its intensity is B / 2 in
# float32 (B in 16 bits, 4 B in 4 bits), less what the caches add to the bytes. A ridge at 5 FLOPs per byte, say, is
# reached with 10 requests in float32, or a few more. The *floor* is the roofline's prediction. (If it is above what is
# measured, the machine was busy with something else while its two speeds were measured.)

# %%
print("\n~ step            floor ms   measured ms   floor / measured   tokens/s   bound by")
for (kind, tokens), (moved, flops, seconds) in steps.items():
    floor = max(moved / bandwidth, flops / rate)
    bound = "memory" if moved / bandwidth > flops / rate else "arithmetic"
    print(f"~ {kind:8}{tokens:4}{1e3 * floor:12.2f}{1e3 * seconds:14.2f}{100 * floor / seconds:17.0f} %"
          f"{tokens / seconds:11,.0f}   {bound}")

# %% [markdown]
# ## Where batching does not help
#
# Weights are shared by the batch. Caches are not: with long contexts each request brings its own bytes. So there is a
# ceiling, and near it more requests only take longer. The same picture for an H200 from its datasheet: 4.8 TB/s, 989
# TFLOP/s in bf16. (Its 141 GB hold some 950,000 tokens beside the weights: not all batches below fit.)

# %%
RIDGE = 989e12 / 4.8e12
large = ModelConfig.from_dict(SHAPES["llama-3.1-8b"])
weights = sum(book.num_weights(large))
kv_bytes = KVCache.bytes_per_block(large.num_layers, 1, large.num_kv_heads, large.head_dim, 2)  # of a token in bf16
per_pair = 4 * large.num_heads * large.head_dim * large.num_layers


def intensity(requests, context):
    flops = requests * (2 * weights + per_pair * context)
    return flops / (2 * weights + requests * context * kv_bytes)


contexts, batches = (128, 1024, 8192, 65536), (1, 16, 256, 4096)
book.table("context | 1 request | 16 | 256 | 4,096 | bound by, with 4,096",
    [(context, *[intensity(n, context) for n in batches],
      "memory" if intensity(4096, context) < RIDGE else "arithmetic") for context in contexts],
    f"Llama-3.1-8B decodes in bf16: FLOPs per byte (an H200's ridge is at {RIDGE:.0f})")

# %%
with book.figure(args, "ch02_roofline", columns=2, size=(9, 3.6)) as axes:
    if axes is not None:
        left, right = axes
        for kind, marker, colour in (("decode", "o-", book.BLUE), ("prefill", "s--", book.ORANGE)):
            points = [(n, value) for (name, n), value in intensities.items() if name == kind]
            left.plot(*zip(*points), marker, color=colour, label=kind)
        left.set(title="34M weights in float32, counted", xlabel="tokens in the step", ylabel="FLOPs per byte",
                 xscale="log", yscale="log")
        left.legend(fontsize=9, loc="lower right")
        powers = [2**i for i in range(13)]
        looks = (book.BLUE, "-"), (book.GREEN, "--"), (book.ORANGE, "-."), (book.RED, ":")
        for context, (colour, style) in zip(contexts, looks):
            values = [intensity(n, context) for n in powers]
            right.plot(powers, values, style, color=colour, label=f"context {context:,}")
        right.axhline(RIDGE, color=book.BLACK, linewidth=1)
        right.annotate("H200's ridge", (1.2, RIDGE * 1.15), fontsize=9)
        right.set(title="Llama-3.1-8B on an H200, calculated", xlabel="requests", ylabel="FLOPs per byte",
                  ylim=(0.2, 1500), xscale="log", yscale="log")
        right.legend(fontsize=9, loc="lower right")

# %% [markdown]
# ## Why
#
# Prefill of 256 tokens does 177 times the arithmetic of decoding one, with the same weights (it would be 256 times, but
# only its last row goes on after the last attention): bound by arithmetic on a CPU, and in bf16 from some 300 tokens on
# an H200, too. Decoding one request does two FLOPs for every four bytes: bound by memory on any machine whose ridge is
# above one half, which is all of them. Part II of this tutorial moves one of the two numbers: fewer bytes per weight
# (chapter 09), fewer per cached token (10), more tokens per reading (11). And the floor is not reached: launches,
# Python, caches too small, attention that waits.
#
# ## At scale
#
# "LLM Inference Unveiled" does this analysis operation by operation, for many models and devices. For the H200 above,
# contexts of 1,024 tokens and more are never arithmetic-bound while decoding: with 128 KiB per token, the caches of a
# large batch outweigh the weights. It is one of the reasons to give prefill and decoding different machines, as
# disaggregation does (chapter 17).
#
# ## Try this
#
# 1. `dtype = torch.bfloat16`: which column halves, and where does the ridge go?
# 2. CONTEXT = 300. Which rows change?
# 3. Put your phone's or laptop's datasheet numbers in the place of the H200's.
#
# **Exercise 11** (`python tutorial/check.py 11`): write `Roofline.cost`, which counted the bytes and FLOPs above.

# %% The claim, on counters.
assert gain > 10, "sixteen requests share the weights"
assert abs(intensities["decode", 1] - 2 / dtype.itemsize) < 0.1 and intensities["prefill", 256] > 50
assert intensity(4096, 65536) < RIDGE < intensity(4096, 128), "caches are not shared"
