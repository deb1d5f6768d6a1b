"""A kernel is as fast as the bytes it does not move and the launches it does not need

Survey: A VI.C · B 3.2.5, 4
Papers: Online softmax arXiv:1805.02867 · FlashAttention arXiv:2205.14135 · Flash-Decoding (PyTorch blog, 2023)
Code: kernels.paged_attention, kernels.CudaKernels, nanoserve.DecodeGraphs
Minutes: read 12, run 1, exercise 40
Kind: run, the CUDA kernels on the CPU (and on a GPU with --device cuda); the H200 is calculated
Exercise: 02
Effect: a decode step of 4 layers takes 206 launches operation by operation, 41 with fused kernels, 6 with a graph
"""

# %% [markdown]
# ## The idea
#
# A GPU runs *kernels*: functions that the CPU *launches* one after the other, at some microseconds each. Between the
# matrix products little is computed and much is carried about: written operation by operation, every result goes out
# to memory and comes back for the next. A *fused* kernel does several operations while the numbers are in registers.
# What is left then is the launching, and a *graph* launches all kernels of a step as one.
#
# *Invariant:* the definition's result, up to rounding, however the work is cut.
# *Cost:* code that no compiler wrote for you; for attention some unfinished sums.

# %% Before you run it: a decode step of one request, a Llama of 4 layers, every operation of PyTorch a launch.
PREDICT = 80  # How many launches does one forward pass take?

# %%
import functools
import math
from unittest.mock import Mock

import book
import cuda_on_cpu
import torch

import kernels
from nanoserve import LLM, SHAPES, DecodeGraphs, ModelConfig, SamplingParams

args = book.options(__doc__)
rng = torch.Generator().manual_seed(0)
kernels.use_cpp = False  # on the CPU the PyTorch definitions run
EMULATED = bool(cuda_on_cpu.compiler())
if not EMULATED:
    print("\nThere is no C++ compiler here (c++, g++, clang++): what CUDA kernels do is left out.")

# %% [markdown]
# ## Online softmax in ten lines
#
# To fuse attention looks impossible: a softmax needs the sum over all keys before it can weigh the first value. *Online
# softmax*: weigh some keys relative to the largest score among them, and correct that when they meet others. Chunks can
# then come one after the other, or be split between workers and merged in the end.

# %%
def attend(q, keys, values):
    """Attention of one query to some of the keys, unfinished: (weighted values, sum of weights, largest score)."""
    scores = keys @ q
    top = scores.max()
    weights = (scores - top).exp()
    return weights @ values, weights.sum(), top


def merge(some, others):
    """Attention to the keys of both."""
    (acc_a, total_a, top_a), (acc_b, total_b, top_b) = some, others
    top = torch.maximum(top_a, top_b)
    shrink_a, shrink_b = (top_a - top).exp(), (top_b - top).exp()  # one of the two is 1
    return acc_a * shrink_a + acc_b * shrink_b, total_a * shrink_a + total_b * shrink_b, top


q = 4 * torch.randn(64, generator=rng, dtype=torch.float64)
keys, values = torch.randn(2, 4096, 64, generator=rng, dtype=torch.float64)
exact = (keys @ q).softmax(0) @ values
for size in (1, 16, 256):
    chunks = [attend(q, k, v) for k, v in zip(keys.split(size), values.split(size))]
    acc, total, _ = functools.reduce(merge, chunks)
    assert (acc / total - exact).abs().max() < 1e-12
    print(f"{len(chunks):,} chunks of {size}, merged: softmax(scores) @ values to 12 digits")

# %% [markdown]
# ## The bytes of attention
#
# Now the CUDA sources that a GPU gets, compiled for the CPU, with their loads counted (`tutorial/cuda_on_cpu.h`). The
# kernel takes a *tile* of queries at a time, of all heads that share K and V, and reads these for each tile; what two
# tiles read counts twice, though a GPU mostly finds it in its cache then. 8 query heads of 64 share 2 KV heads, or 8.

# %%
def both_ways(function, *arguments):
    """Run it as PyTorch, and as CUDA sources: (operations, [launches], operations that remain beside the launches)."""
    with cuda_on_cpu.Operations() as operations:
        output = function(*arguments)
    if not EMULATED:
        return operations, [], operations
    with cuda_on_cpu.Operations() as others, cuda_on_cpu.enabled(launches=[]) as launches:
        fused = function(*arguments)
    difference = (fused.float() - output.float()).abs().max()
    assert difference < 0.03 * output.float().abs().max(), "a kernel errs by more than bfloat16's 8 bits do"
    return operations, launches, others


CASES = (16, 16, 2), (64, 64, 2), (128, 128, 2), (256, 256, 2), (512, 512, 2), (1, 512, 2), (1, 512, 8)
traffic = {}
for queries, context, kv_heads in CASES:
    blocks = math.ceil(context / 16)
    q = torch.randn(queries, 8, 64, generator=rng).bfloat16()
    k_cache, v_cache = torch.randn(2, blocks + 1, 16, kv_heads, 64, generator=rng).bfloat16()
    table = torch.randperm(blocks, generator=rng).int()[None] + 1  # in which block each 16 tokens lie
    case = q, k_cache, v_cache, table, torch.tensor([context]), torch.tensor([0, queries]), 64**-0.5
    seen, launches, _ = both_ways(kernels.paged_attention, *case)
    fused = sum(launches[0].read) + q.nbytes if launches else math.nan  # it writes as much as q
    least = 2 * q.nbytes + context * 2 * kv_heads * 64 * 2  # two bytes for each number of K and V
    traffic[queries, context, kv_heads] = seen.bytes / 1e3, fused / 1e3, least / 1e3
book.table("queries | context | KV heads | operation by operation | one kernel | input and output",
    [(*case, *row) for case, row in traffic.items()], "attention of five prompts, and of a 512th token, KB moved")

# %% [markdown]
# ## Splits
#
# One request that decodes is one tile for each KV head, and an H200 has 132 multiprocessors (SMs) that could each take
# one. So the keys are *split*: each SM goes through some of them, and one more kernel merges as above. Here the engine
# is asked what it would launch for Llama-3.1-8B (32 query heads, 8 KV heads of 128); nothing runs.

# %%
CONTEXT = 16384
plans = {}
for requests in (1, 8, 64, 256):
    recorder = Mock(num_sms=132)  # in the place of `kernels.CudaKernels`: notes how it is called
    q = torch.empty(requests, 32, 128, dtype=torch.bfloat16, device="meta")  # a shape without memory
    cache = torch.empty(1, 16, 8, 128, dtype=torch.bfloat16, device="meta")
    tables = torch.empty(requests, CONTEXT // 16, dtype=torch.int32, device="meta")
    kernels._paged_attention_cuda(recorder, q, cache, cache, None, None, tables, None, None, 128**-0.5, 0)
    _, (tiles, kv_heads, splits), *_ = recorder.call_args_list[0].args
    without, busy = min(132, tiles * kv_heads), min(132, tiles * kv_heads * splits)
    plans[requests] = without, splits, busy, busy / without
book.table("requests | SMs at work without splits | splits | SMs at work | times as many",
    [(requests, *row) for requests, row in plans.items()], f"{CONTEXT:,} tokens of context each, 132 SMs")

# %% [markdown]
# ## Launches, and what a graph saves
#
# The forward pass of a step in which one request decodes; all between two matrix products is one kernel or two. A graph
# reads its inputs from where they lay when it was captured, so a batch is first copied there. Only a GPU can capture:
# here a replay does nothing, and what is counted are the copies.

# %%
class GraphsOnCpu(DecodeGraphs):
    def _capture(self, rows):
        return (lambda: None), self.model.forward(rows, self.cache)


llm = LLM(args.model, device="cpu", dtype="bfloat16", kv_memory=1 << 26, prefix_caching=False)
prompt, params = book.token_ids(30, 0, llm.model.config.vocab_size), SamplingParams(max_tokens=60, ignore_eos=True)
llm.add_request(prompt, params)
llm.step()  # computes the prompt
batch, *_ = llm.pack(llm.scheduler.schedule())  # what the next step will compute: one token
forward = functools.partial(llm.model.forward, batch, llm.cache)
seen, launches, products = both_ways(forward)  # matrix products remain PyTorch's
graphs = GraphsOnCpu(llm.model, llm.cache, 1, llm.pool.blocks_for(llm.max_model_len))
with cuda_on_cpu.Operations() as copies:
    graphs.forward(batch)
fused = len(launches) + products.launches if launches else math.nan
step = {"operations": seen.launches, "fused kernels": fused, "a graph": 1 + copies.launches}
book.table("a decode step | launches", list(step.items()))
book.predicted("launches of a decode step, operation by operation", PREDICT, seen.launches,
    "in a layer 14 for two norms and sums, 16 for rotary positions, 2 to write K and V, 11 for attention, 2 for SwiGLU, "
    f"4 products: 49; {len(llm.model.layers)} layers, and {seen.launches - 49 * len(llm.model.layers)} beside them")

# %% And in seconds: on this CPU, and with --device cuda on a GPU.
print(f"~ forward pass, PyTorch: {1e3 * book.median_seconds(forward):.2f} ms")
if EMULATED:
    kernels.use_cpp = True
    print(f"~ forward pass, fused kernels in C++: {1e3 * book.median_seconds(forward):.2f} ms")
if args.device == "cuda":
    for with_graphs in (False, True):
        engine = LLM(args.model, device="cuda", dtype="bfloat16", kv_memory=1 << 26, graphs=with_graphs)
        engine.add_request(prompt, params)
        seconds = book.median_seconds(engine.step, 40, torch.cuda.synchronize)
        print(f"~ a step on the GPU, graphs {with_graphs}: {1e3 * seconds:.3f} ms")
    number = torch.zeros(1, device="cuda")
    thousand = book.median_seconds(lambda: [number.add_(1) for _ in range(1000)], wait=torch.cuda.synchronize)
    print(f"~ a launch: {1e3 * thousand:.1f} microseconds")

# %% [markdown]
# ## Where it does not help
#
# **Splits, in a large batch:** from 64 requests on every SM has work anyway; they only even out the last round.
# **Graphs, for a large model:** launches run ahead of the GPU, and are free where its work takes longer. At least it
# reads all weights; below at 5 microseconds a launch (assumed) and 4.8 TB/s (an H200).

# %%
worth = {}
for name in ("this model", "qwen3-small", "llama-3.1-8b"):
    config = ModelConfig.from_dict(SHAPES[name]) if name in SHAPES else llm.model.config
    num_launches = 9 * config.num_layers + 5  # 4 products, 2 norms, rotary, attention, SwiGLU; and 5 at the ends
    launching, reading = 5e-6 * num_launches, 2 * sum(book.num_weights(config)) / 4.8e12
    worth[name] = num_launches, 1e3 * launching, 1e3 * reading, launching / reading
book.table("one request, fused kernels | launches | launching, ms | reading weights, ms | launching / reading",
    [(name, *row) for name, row in worth.items()], "a graph saves time where the last number is above 1")

# %%
with book.figure(args, "ch04_kernels", columns=2) as axes:
    if axes is not None:
        left, right = axes
        prompts = [queries for queries, _, _ in CASES if queries > 1]
        left.set_prop_cycle(color=(book.ORANGE, book.BLUE, book.BLACK), marker=("o", "s", "v"))
        left.plot(prompts, list(traffic.values())[: len(prompts)],
                  label=("operation by operation", "one kernel", "input and output"))
        left.set(title="Attention of a prompt", xlabel="tokens", ylabel="KB moved", yscale="log")
        left.legend(fontsize=9)
        right.bar_label(right.bar(list(step), list(step.values()), color=(book.ORANGE, book.BLUE, book.GREEN)))
        right.set(title="Launches of a decode step", ylim=(0, 230))

# %% [markdown]
# ## Why
#
# Attention of 512 tokens has 1.3 MB of input and output. Its scores are 8 heads x 512 x 512 x 4 bytes = 8.4 MB, and
# operations carry them to memory and back several times: 97 MB. The kernel stores no score; it moves 3.4 MB as each
# tile reads K and V for itself. Decoding reads hardly anything but K and V (operations copy them first), and heads
# that share them read them once: a quarter. In seconds all of it is little beside 206 launches of a small model.
#
# ## At scale
#
# For GPT-2 medium's attention in training, forward and backward, FlashAttention reports 40.3 GB of memory traffic and
# 41.7 ms operation by operation, 4.4 GB and 7.3 ms fused, with more arithmetic. Flash-Decoding reports up to 8 times the
# decoding speed at long contexts. Looking blocks up has its price: PagedAttention's own kernel (arXiv:2309.06180) was 20
# to 26 % slower than an unpaged one.
#
# ## Try this
#
# 1. Add (5, 512, 2) to `CASES`: five queries, as in speculation. Does the kernel read K and V five times?
# 2. CONTEXT = 1024: why are there only 4 splits for one request (kernels.py says), and what would more cost?
# 3. Take a `__syncthreads()` out of `CUDA["paged_attention"]` in kernels.py. What does this chapter say?
#
# **Exercise 02** (`python tutorial/check.py 02`): write `paged_attention`'s definition, against which all this is held.

# %% The claim, on counters.
assert plans[1][3] >= 4 and plans[64][3] == 1, "one request is spread over the GPU; a batch is anyway"
assert step["a graph"] < 10 and worth["qwen3-small"][3] > 10 and worth["llama-3.1-8b"][3] < 1
if EMULATED:
    operations, fused, _ = traffic[512, 512, 2]
    assert operations > 20 * fused, "no score goes to memory"
    assert traffic[1, 512, 2][1] < traffic[1, 512, 8][1] / 3.8, "heads that share K and V read them once"
    assert args.model or step["fused kernels"] == worth["this model"][0] < step["operations"] / 4
