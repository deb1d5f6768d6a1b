"""A kernel is as fast as the bytes it does not move and the launches it does not need

Survey: A VI.C · B 3.2.5, 4
Papers: Online softmax arXiv:1805.02867 · FlashAttention arXiv:2205.14135 · PagedAttention
 arXiv:2309.06180 · Flash-Decoding (PyTorch blog, 2023)
Code: kernels.paged_attention, kernels.add_norm, kernels.CudaKernels, nanoserve.DecodeGraphs
Minutes: read 15, run 1, exercise 40
Kind: run, the CUDA kernels on the CPU (and on a GPU with --device cuda); the H200 is calculated
Exercise: 02
Effect: a decode step of 4 layers takes 206 launches operation by operation, 41 with fused kernels, 6 with a graph
"""

# %% [markdown]
# ## The idea
#
# Between the matrix products of a step little is computed and much is carried about. Written operation by operation,
# each result goes out to memory and comes back for the next. A *fused* kernel does it all while the numbers are in
# registers. For attention that looks impossible, as a softmax needs the sum over all keys before it can weigh the first
# one. *Online softmax*: weigh by what is known so far, and correct the sums when a larger score turns up. The same
# correction adds up pieces that were computed apart, so one long context can be *split* over a whole GPU. What is left
# is to launch each kernel, and a *graph* replays all launches of a step as one.
#
# *Invariant:* the definition's result, up to rounding, however the keys are cut.
# *Cost:* a largest score, a total and unfinished sums per row; and code that no compiler wrote for you.

# %% Before you run it: a decode step of one request, a Llama of 4 layers, every operation of PyTorch a launch.
PREDICT = 80  # How many launches does one forward pass take?

# %%
import contextlib
import functools
import math
from unittest.mock import Mock

import book
import cuda_on_cpu
import torch

import kernels
from nanoserve import LLM, SHAPES, DecodeGraphs, ModelConfig, SamplingParams, parameters

args = book.options(__doc__)
EMULATED, GPU = bool(cuda_on_cpu.compiler()), args.device == "cuda"
if not EMULATED:
    print("\nThere is no C++ compiler here (c++, g++, clang++): what the CUDA kernels do is left out.")
if GPU and not torch.cuda.is_available():
    raise SystemExit("--device cuda: there is no CUDA device here")
kernels.use_cpp = False  # the PyTorch definitions run, unless it says otherwise


def close(a, b):
    return (a.float() - b.float()).abs().max() < 0.03 * b.float().abs().max()  # bfloat16 keeps 8 bits


# %% [markdown]
# ## Online softmax in ten lines
#
# One query, 4,096 keys, a chunk at a time. `top` is the largest score so far, `total` the sum of the weights relative to
# it, `acc` that of the weighted values. When `top` grows, both sums shrink.

# %%
def online_attention(q, keys, values, chunk):
    """(acc, total, top, how many chunks brought a new largest score)."""
    acc, total, top, grew = torch.zeros_like(q), 0.0, -math.inf, 0
    for k, v in zip(keys.split(chunk), values.split(chunk)):
        scores = k @ q
        new = max(top, scores.max().item())
        p, shrink = (scores - new).exp(), math.exp(top - new)
        acc, total = acc * shrink + p @ v, total * shrink + p.sum()
        grew, top = grew + (new > top), new
    return acc, total, top, grew


def merge(parts):
    """The same correction once more, for pieces that were computed apart: what `combine_splits` does."""
    top = max(part[2] for part in parts)
    acc, total = (sum(part[i] * math.exp(part[2] - top) for part in parts) for i in (0, 1))
    return acc / total


rng = torch.Generator().manual_seed(0)
q, (keys, values) = 4 * torch.randn(64, generator=rng).double(), torch.randn(2, 4096, 64, generator=rng).double()
scores, exact = keys @ q, (keys @ q).softmax(0) @ values
whole = {chunk: online_attention(q, keys, values, chunk) for chunk in (1, 16, 256, 4096)}
errors = {chunk: (acc / total - exact).abs().max().item() for chunk, (acc, total, *_) in whole.items()}
pieces = [online_attention(q, k, v, 16) for k, v in zip(keys.split(512), values.split(512))]
errors["8 pieces, merged"] = (merge(pieces) - exact).abs().max().item()
print(f"\nall within 1e-12 of softmax(scores) @ values: {max(errors.values()) < 1e-12}; a new largest score turned up in "
      + ", ".join(f"{grew} of {4096 // chunk:,}" for chunk, (*_, grew) in whole.items()) + " chunks\nwithout taking off the "
      f"largest ({scores.max():.0f}), {int(scores.float().exp().isinf().sum())} of 4,096 weights are infinite in float32")

# %% [markdown]
# ## Bytes of attention
#
# Now `CUDA["paged_attention"]` and `CUDA["tiled_attention"]`, the sources that a GPU gets, compiled for the CPU, their
# vector loads counted (tutorial/cuda_on_cpu.h). That is what the instructions ask for: a byte that two tiles read counts
# twice, though the second reading mostly comes from the L2 cache. 8 heads over 2 KV heads of 64, bfloat16, blocks of 16.

# %%
def attention_case(queries, context, device="cpu"):
    """Arguments of paged_attention for one request, its blocks in random order."""
    rng, blocks = torch.Generator().manual_seed(0), -(-context // 16)
    k, v = torch.randn(2, blocks + 1, 16, 2, 64, generator=rng).bfloat16()
    q = torch.randn(queries, 8, 64, generator=rng).bfloat16()
    order = (torch.randperm(blocks, generator=rng) + 1).int()[None]
    tensors = q, k, v, order, torch.tensor([context]).int(), torch.tensor([0, queries]).int()
    return *(t.to(device) for t in tensors), 64**-0.5


prompts = {}
for n in (16, 64, 128, 256, 512):
    case, fused = attention_case(n, n), [None, None]
    with cuda_on_cpu.Operations() as seen:
        wanted = kernels.paged_attention(*case)
    for i, kernels.use_tiles in enumerate((False, True)) if EMULATED else ():
        with cuda_on_cpu.enabled(launches=[]) as launches:
            assert close(kernels.paged_attention(*case), wanted)
        fused[i] = sum(launches[0].read) + wanted.nbytes  # one of the two stores number by number, which is not counted
    prompts[n] = seen.bytes, fused[0], 2 * wanted.nbytes + 2 * n * 2 * 64 * 2, 8 * n * n * 4, fused[1]
book.table("prompt | operation by operation, KB | one kernel, KB | tiled, KB | input and output, KB | scores in memory, KB",
           [(n, a / 1e3, *(b / 1e3 if b else "-" for b in (one, tiled)), least / 1e3, kept / 1e3)
            for n, (a, one, least, kept, tiled) in prompts.items()], "attention of a prompt, bytes read and written")

group, (q, k, v, *rest) = {}, attention_case(1, 512)
wide, expected = [x.repeat_interleave(4, 2) for x in (k, v)], kernels.paged_attention(q, k, v, *rest)
for name, calls in {
    "heads of a group share a reading": [(q, k, v)],
    "the same cache, each head for itself": [(q[:, i::4].contiguous(), k, v) for i in range(4)],
    "8 KV heads (no grouped queries)": [(q, *wide)],
}.items() if EMULATED else ():
    with cuda_on_cpu.enabled(launches=[]) as launches:
        outputs = [kernels.paged_attention(*call, *rest) for call in calls]
    assert close(torch.stack(outputs, 2).flatten(1, 2), expected)
    group[name] = len(launches), sum(sum(x.read[1:3]) for x in launches), calls[0][1].nbytes + calls[0][2].nbytes
if EMULATED:
    book.table("one request of 512 tokens decodes | launches | K and V read, KB | cache, KB",
               [(name, n, read / 1e3, cache / 1e3) for name, (n, read, cache) in group.items()])

# %% [markdown]
# ## Splits
#
# The grid is (tile, KV head, split). One request that decodes is one tile, so without splits it keeps as many of a GPU's
# 132 multiprocessors (SMs) busy as there are KV heads. Here the engine is asked what it would launch on an H200 for
# Llama-3.1-8B (32 heads over 8 KV heads of 128); nothing runs. "Keys in a row" is how many keys the busiest SM goes
# through, one block at a time: blocks per SM, rounded up, times keys of a block.

# %%
def planned(requests, context, num_sms=132):
    """(splits, blocks, keys in a row, % that the splits' sums add to the bytes of K and V). With 0 SMs: no splits."""
    note = Mock(num_sms=num_sms)  # in place of `kernels.CudaKernels`
    q, cache = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((requests, 32, 128), (1, 16, 8, 128)))
    tables = torch.empty(requests, context // 16, dtype=torch.int32, device="meta")
    kernels._paged_attention_cuda(note, q, cache, cache, None, None, tables, None, None, 0.1, 0)
    _, (tiles, kv_heads, splits), _, *arguments = note.call_args_list[0].args
    blocks, share = tiles * kv_heads * splits, ((context - 1) // splits // 16 + 1) * 16
    sums = sum(2 * x.nbytes for x in arguments[9:11] if x is not None)  # written here, read by combine_splits
    return splits, blocks, -(-blocks // 132) * share, 100 * sums / (requests * context * 8 * 128 * 2 * 2)


plans = {(b, c): (planned(b, c), planned(b, c, 0)) for c in (1024, 16384, 131072) for b in (1, 8, 64, 256)}
book.table("requests | context | splits | blocks per SM | keys in a row | without splits | shorter | sums, % of K and V",
           [(b, c, split[0], split[1] / 132, split[2], whole[2], f"{whole[2] / split[2]:.1f} x", f"{split[3]:.1f}")
            for (b, c), (split, whole) in plans.items()], "what the engine chooses for 132 SMs")
outputs = []
for sms in (0, 4) if EMULATED else ():
    with cuda_on_cpu.enabled(launches=[], num_sms=sms) as launches:
        outputs.append(kernels.paged_attention(*attention_case(1, 2048)))
    print(f"run, for {sms} SMs: grid {launches[0].grid}, launches: {len(launches)}, K and V read: "
          f"{sum(sum(x.read[1:3]) for x in launches) / 1e3:,.0f} KB, same output: {close(outputs[0], outputs[-1])}")

# %% [markdown]
# ## Fusion
#
# 16 rows of the residual stream, 4,096 wide, in bfloat16: add what a layer said, then RMSNorm.

# %%
x, delta = torch.randn(2, 16, 4096, generator=rng).bfloat16()
norm = torch.ones(4096).bfloat16(), None, 1e-5
with cuda_on_cpu.Operations() as seen:
    wanted, _ = kernels.add_norm(x, delta, *norm)
fusion = {"operation by operation": (seen.launches, seen.bytes)}
if EMULATED:
    with cuda_on_cpu.Operations() as add:
        summed = x + delta
    with cuda_on_cpu.enabled(launches=[]) as launches:
        assert all(close(kernels.add_norm(*both, *norm)[0], wanted) for both in ((summed, None), (x, delta)))
    apart, together = (sum(launch.read) + sum(launch.written) for launch in launches)
    fusion["an add, then a kernel that normalises"] = 2, add.bytes + apart
    fusion["one kernel"] = 1, together
book.table("add and norm | launches | KB | times all entries",
           [(name, n, b / 1e3, b / x.nbytes) for name, (n, b) in fusion.items()])

# %% [markdown]
# ## Launches, and what a graph saves
#
# The forward pass of a decode step. A graph reads its inputs where they lay when it was captured, so a batch is copied
# there, and filled up with rows of padding. The GPU still runs each kernel; the host launches one. (A CPU captures
# nothing: here a replay does nothing, and what is counted are the copies.)

# %%
class Copies(DecodeGraphs):
    def _capture(self, rows):
        return (lambda: None), self.model.forward(rows, self.cache)


llm = LLM(args.model, device="cpu", dtype="bfloat16", kv_memory=1 << 26, prefix_caching=False)
model, forward, last, num_layers = llm.model, llm.model.forward, [], len(llm.model.layers)
model.forward = lambda batch, cache: (last.append(batch), forward(batch, cache))[1]


@torch.inference_mode()
def launches_of(requests):
    """{body: launches} of a decode step, its batch, rows that a graph computes for it."""
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    added = [llm.add_request(book.token_ids(30 + i, i, model.config.vocab_size), params) for i in range(requests)]
    while not last or not last[-1].is_decode or len(last[-1].tokens) < requests:
        llm.step()
    batch = last[-1]
    with cuda_on_cpu.Operations() as seen:
        wanted = forward(batch, llm.cache)
    counts = {"operation by operation": seen.launches}
    if EMULATED:
        with cuda_on_cpu.Operations() as products, cuda_on_cpu.enabled(launches=[]) as launches:
            fused = forward(batch, llm.cache)
        assert close(fused, wanted)
        counts["fused kernels"] = products.launches + len(launches)
    graphs = Copies(model, llm.cache, 8, llm.pool.blocks_for(llm.max_model_len))
    with cuda_on_cpu.Operations() as seen:
        graphs.forward(batch)
    counts["a graph: replay and copies"] = 1 + seen.launches
    for request in added:
        llm.abort(request)
    return counts, batch, next(size for size in graphs.sizes if size >= requests)


(one, *_), (five, batch, rows) = launches_of(1), launches_of(5)
book.table("a decode step | launches, 1 request | launches, 5 requests", [(name, one[name], five[name]) for name in one],
           f"the forward pass of {num_layers} layers (for 5 requests a graph computes {rows} rows)")
book.predicted("launches of a decode step, operation by operation", PREDICT, one["operation by operation"],
               f"{num_layers} layers of {one['operation by operation'] / num_layers:.0f}: 2 x {seen.launches} for add and "
               "norm, rotary positions, writing and gathering K and V, scores, mask, softmax, SwiGLU, 4 products")

# %% And in seconds: first on this CPU, then, with --device cuda, on the GPU.
median = functools.partial(book.median_seconds, wait=torch.cuda.synchronize if GPU else lambda: None)
LAUNCH = 5e-6  # seconds from one launch to the next, assumed; measured below where there is a GPU
for body in ("PyTorch", "C++", "CUDA, emulated") if EMULATED else ("PyTorch",):
    kernels.use_cpp = body == "C++"
    with torch.inference_mode(), cuda_on_cpu.enabled() if body == "CUDA, emulated" else contextlib.nullcontext():
        forward(batch, llm.cache)  # compiles what is not yet compiled
        print(f"~ forward pass of 5 requests, {body}: {1e3 * median(lambda: forward(batch, llm.cache)):.2f} ms")
if GPU:
    number, case = torch.zeros(1, device="cuda"), attention_case(1, 16384, "cuda")
    LAUNCH = median(lambda: [number.add_(1) for _ in range(1000)]) / 1000
    print(f"~ a launch: {1e6 * LAUNCH:.1f} microseconds")
    if there := kernels.cuda_kernels(case[0].device, torch.bfloat16):
        for sms in (0, there.num_sms):
            there.num_sms = sms
            kernels.paged_attention(*case)
            print(f"~ 16,384 tokens, for {sms} SMs: {1e6 * median(lambda: kernels.paged_attention(*case)):.0f} microseconds")
    for graphs in (False, True):
        engine = LLM(args.model, device="cuda", dtype="bfloat16", kv_memory=1 << 26, graphs=graphs)
        engine.add_request(batch.tokens.tolist() * 6, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
        median(engine.step, 5)
        print(f"~ a step of one request, graphs {graphs}: {1e3 * median(engine.step, 40):.3f} ms")

# %% [markdown]
# ## Where it does not help
#
# **Splits, in a large batch.** From 64 requests on they shorten nothing: every SM has its share anyway. What the engine
# still splits there costs the sums and a launch, and evens out only the last round.
# **Graphs, for a large model.** Launches run ahead of the GPU: where its work takes longer, they are free.
# **Fusing the norm, where weights or arithmetic decide.** It saves bytes of activations, but a small step reads all weights,
# and a large one is bound by its products. The add alone is worth less than 1 %, all nine operations 14 % of 4,096 tokens'
# time. Both are calculated for an H200 (4.8 TB/s, 989 TFLOP/s).
# **Emulation, for speed.** It counts and checks; the seconds above say why nobody serves with it.

# %%
worth, saved, operations = {}, {}, fusion["operation by operation"][1] / x.nbytes - 4
for shape in ("the small model", "qwen3-small", "llama-3.1-8b"):
    config = ModelConfig.from_dict(SHAPES[shape]) if shape in SHAPES else model.config
    weights = sum(math.prod(p.shape) for p in parameters(config) if p.name != "embed" or config.tie_embeddings)
    launches = 9 * config.num_layers + 5  # 4 products, 2 norms, rotary, attention, SwiGLU; and 5 at the ends
    worth[shape] = launches, launches * LAUNCH, 2 * weights / 4.8e12
for tokens in (1, 64, 4096):  # of the last, the large one
    floor = max(2 * weights / 4.8e12, 2 * weights * tokens / 989e12)
    norms = 2 * config.hidden_size * (2 * config.num_layers + 1) * tokens / 4.8e12  # reading or writing all of them once
    saved[tokens] = [100 * times * norms / floor for times in (operations, 1)]
book.table(f"one request | launches | at {1e6 * LAUNCH:.0f} us each, ms | reading the weights, ms | a graph saves",
           [(name, n, 1e3 * a, 1e3 * b, "nearly all of the time" if a > 10 * b else "most" if a > b else "little")
            for name, (n, a, b) in worth.items()], "fused kernels in bfloat16")
book.table("tokens in the step | instead of operations, % | instead of add, then norm, %",
           [(n, f"{a:.3f}", f"{b:.3f}") for n, (a, b) in saved.items()], "Llama-3.1-8B: time saved by a fused add and norm")

# %%
with book.figure(args, "ch04_kernels", columns=3, size=(10, 3.2)) as axes:
    if axes is not None:
        left, middle, right = axes
        for i, style, colour, name in ((0, "o-", book.ORANGE, "operation by operation"), (1, "s-", book.BLUE, "one kernel"),
                                       (2, "--", book.BLACK, "inputs and outputs")):
            left.plot(list(prompts), [(p[i] or math.nan) / 1e6 for p in prompts.values()], style, color=colour, label=name)
        left.set(title="Attention of a prompt, counted", xlabel="tokens", ylabel="MB read and written", yscale="log")
        for c, colour, style in ((1024, book.GREEN, "o-"), (16384, book.BLUE, "s-"), (131072, book.ORANGE, "^:")):
            points = [(b, whole[2] / split[2]) for (b, length), (split, whole) in plans.items() if length == c]
            middle.plot(*zip(*points), style, color=colour, label=f"context {c:,}")
        middle.set(title="Splits on 132 SMs, calculated", xlabel="requests", ylabel="times fewer keys in a row",
                   xscale="log", yscale="log", yticks=(1, 2, 4, 8, 16), yticklabels=(1, 2, 4, 8, 16), ylim=(0.9, 20))
        middle.minorticks_off()
        left.legend(fontsize=8), middle.legend(fontsize=8)
        right.bar_label(right.bar([name.split(":")[0].replace(" by operation", "s") for name in one], list(one.values()),
                                  color=(book.ORANGE, book.BLUE, book.GREEN)))
        right.set(title="Launches of a decode step", ylim=(0, 230))

# %% [markdown]
# ## Why
#
# Attention of 512 tokens has 1.3 MB of inputs and outputs. Its scores alone are 8.4 MB, and operations carry them to
# memory and back several times: 97 MB. The kernels never store a score. 20 MB are K and V, read by every tile of 16 rows:
# `paged_attention` is made for decoding, where there are few, and where sharing between heads (262 instead of 1,049 KB) is
# worth most. Who has more rows than a tile of 128 gets `tiled_attention`, which reads K and V an eighth as often: 3.4 MB.
#
# Add and norm goes from 23 readings and writings to 6. Of these, memory needs to see 4: the weights and what the kernel
# has just written come from a cache. All of it is nothing beside the launches of a small model: 206, 41, 6.
#
# ## At scale
#
# FlashAttention reports 40.3 GB of memory traffic for GPT-2 medium's standard attention against 4.4 GB fused, and 41.7 ms
# against 7.3, with more arithmetic than before. Flash-Decoding reports up to 8 times the decoding speed at long contexts.
# The PagedAttention paper's own kernel was 20 to 26 % slower than an unpaged one: the price of looking blocks up.
#
# ## Try this
#
# 1. `attention_case(queries=5, context=512)`: speculation's five rows. How many more bytes of K and V than for one?
# 2. Let `_paged_attention_cuda` split as soon as there are 64 keys. What happens to the last column?
# 3. Take the second `__syncthreads()` out of `add_norm`'s `block_sum`. What does this chapter say?
#
# **Exercise 02** (`python tutorial/check.py 02`): write `paged_attention`'s definition, the one that everything here is
# held against, and let the engine run on it.

# %% The claim, on counters.
assert max(errors.values()) < 1e-12 and one["a graph: replay and copies"] < 10 and saved[4096][1] < 1
assert plans[1, 131072][1][2] > 10 * plans[1, 131072][0][2], "one long context is spread over the GPU"
assert plans[256, 1024][0][0] == 1 and plans[64, 1024][0][2] == plans[64, 1024][1][2], "a large batch has nothing to split"
assert GPU or worth["qwen3-small"][1] > 10 * worth["qwen3-small"][2] and worth["llama-3.1-8b"][1] < worth["llama-3.1-8b"][2]
if EMULATED:
    assert all(operations > 3 * fused for operations, fused, *_ in prompts.values())
    shared, alone, ungrouped = (read for _, read, _ in group.values())
    assert 4 * shared == alone == ungrouped == 4 * 512 * 2 * 64 * 2 * 2, "a group reads each byte of K and V once"
    assert prompts[16][1] == prompts[16][4] and prompts[512][1] > 5 * prompts[512][4], "large tiles read K and V less often"
    assert len(outputs) == 2 and close(*outputs) and together == 6 * x.nbytes < add.bytes + apart
    assert args.model or one["fused kernels"] == worth["the small model"][0] < one["operation by operation"] / 4
