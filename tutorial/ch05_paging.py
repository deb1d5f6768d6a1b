"""Memory handed out in blocks holds several times as many requests as memory reserved in one piece

Survey: A III.A · B 3.2.3 · C KV Cache Optimization: Memory Management
Papers: PagedAttention arXiv:2309.06180 · vAttention arXiv:2405.04437 · LightLLM's token attention is block size 1
Code: cache.BlockPool, cache.BlockPool.extend, scheduler.Scheduler.schedule, kernels.paged_attention
Minutes: read 12, run 1, exercise 20
Kind: run
Exercise: 03
Effect: 3.0 times as many requests at once in the same memory, 2.6 times fewer steps
"""

# %% [markdown]
# ## The idea
#
# A request's cache grows by one token a step, and nobody knows where it will end. If keys and values must lie in one
# piece, the server has to reserve room for the longest request there could be. Most of that room is never written
# (*internal* fragmentation), and what is free lies in gaps too small for the next request (*external* fragmentation).
# Operating systems had this problem with programs, and solved it with pages. So: cut the memory into blocks of 16
# tokens, give each request a table of the blocks it has, and hand out the next block when the last one is full.
#
# *Invariant:* token i lives in block `table[i // block_size]` at offset `i % block_size`.
# *Cost:* one partly filled block per request, a table lookup per block when attending, no room set aside for growth.

# %% Before you run it: 8,192 token slots, requests of at most 1,024 tokens, on average 296 in and 59 out.
PREDICT = 2.0  # How many times as many requests run at once with blocks of 16 as with 1,024 slots reserved for each?

# %%
from collections import namedtuple
from statistics import fmean
from types import SimpleNamespace

import book
import torch

import kernels
from cache import BlockPool
from scheduler import Request, Scheduler

args = book.options(__doc__)
SLOTS, LONGEST = 8192, 1024
jobs = book.workload("assistant", 160, seed=2, scale=8, longest=LONGEST)

# What is seen in a step: requests that run, slots that hold a token, slots taken; for blocks also tokens computed
Step = namedtuple("Step", "running used taken computed", defaults=(0,))


def busy(steps, what):
    """Mean over the first three quarters of the steps; after that the queue is empty."""
    return fmean(getattr(step, what) for step in steps[: len(steps) * 3 // 4])


# %% [markdown]
# ## In one piece
#
# First fit: a request goes into the first gap that is large enough, in order of arrival. How much to reserve? The
# longest possible request; the prompt plus the 256 tokens that the client allowed; or exactly what it will turn out to
# need, which only an oracle knows. (Orca "Max", "Pow2", here simplified, and "Oracle" in the PagedAttention paper.)

# %%
def in_one_piece(jobs, reserve):
    """A step computes the prompts of who is new, and gives everybody a token. reserve: job -> slots."""
    memory = bytearray(SLOTS)  # 1 where a slot is taken
    waiting, running, steps = list(jobs), [], []
    while waiting or running:
        while waiting:
            size = reserve(waiting[0])
            start = memory.find(bytes(size))  # so many zeros in a row
            if start < 0:
                break
            memory[start : start + size] = b"\1" * size
            running.append(SimpleNamespace(job=waiting.pop(0), start=start, size=size, output=0))
        for r in running:
            r.output += 1
        used = sum(r.job.prompt + r.output - 1 for r in running)  # the newest token is not computed yet
        steps.append(Step(len(running), used, memory.count(1)))
        for r in list(running):
            if r.output == r.job.output:
                running.remove(r)
                memory[r.start : r.start + r.size] = bytes(r.size)
    return steps


# %% [markdown]
# ## In blocks
#
# `Scheduler` and `BlockPool` know no tensors: the engine's own code runs without a model, and every answer is 7, 7, 7.

# %%
def in_blocks(jobs, block_size=16):
    pool = BlockPool(SLOTS // block_size + 1, block_size, prefix_caching=False)  # one block is scratch
    scheduler = Scheduler(pool, max_batch_tokens=1 << 20, max_batch_requests=1 << 10, max_model_len=LONGEST)
    for job in jobs:
        scheduler.add(Request([1] * job.prompt, job.output))
    steps = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        for request, n in plan:
            if scheduler.advance(request, n):
                request.tokens.append(7)
        used = sum(request.num_computed for request, _ in plan)
        taken = (pool.num_usable - pool.num_free) * block_size
        steps.append(Step(len(plan), used, taken, sum(n for _, n in plan)))
        for request, _ in plan:
            if request.num_output == request.max_tokens:
                scheduler.finish(request, "length")
    return steps


schemes = {
    "reserve the longest": in_one_piece(jobs, lambda job: LONGEST),
    "reserve prompt + 256": in_one_piece(jobs, lambda job: min(LONGEST, job.prompt + 256)),
    "reserve exactly (oracle)": in_one_piece(jobs, lambda job: job.prompt + job.output),
    "blocks of 16": in_blocks(jobs),
}
worst, paged = schemes["reserve the longest"], schemes["blocks of 16"]
rows = []
for name, steps in schemes.items():
    used, taken = 100 * busy(steps, "used") / SLOTS, 100 * busy(steps, "taken") / SLOTS
    rows.append((name, busy(steps, "running"), used, taken - used, 100 - taken, len(steps)))
book.table("memory | requests at once | holds a token % | taken, empty % | free % | steps to serve all", rows,
    f"{len(jobs)} requests, all waiting from the start, in {SLOTS:,} slots")

gain = busy(paged, "running") / busy(worst, "running")
each = busy(paged, "used") / busy(paged, "running")
book.predicted("requests at once, blocks against reserving the longest", PREDICT, gain,
    f"a running request holds {each:.0f} tokens on average: {SLOTS:,} / {each:.0f} = {SLOTS / each:.0f} of them, if no "
    f"slot stays empty, against {SLOTS:,} / {LONGEST:,} = {SLOTS // LONGEST}")
book.bars({name: busy(steps, "running") for name, steps in schemes.items()}, "requests", "running at once")

# %% [markdown]
# Taken and empty is internal fragmentation. Free, while somebody waits, is external, or too little for a long prompt.
#
# ## How large a block?
#
# If it is large, more of the last one is empty. If it is small, tables are long, and attention has to look up a new
# place more often. So attention is timed, for 16 requests of 512 tokens that decode, their blocks in random order.

# %%
def attention_seconds(block_size):
    blocks = 16 * 512 // block_size
    with torch.device(args.device):
        tables = 1 + torch.randperm(blocks).view(16, -1).int()
        k, v = torch.randn(2, blocks + 1, block_size, 2, 64)  # 2 KV heads of 64
        q = torch.randn(16, 8, 64)  # a query for each request, 8 heads
        lengths, starts = torch.full((16,), 512).int(), torch.arange(17).int()
    wait = torch.cuda.synchronize if q.is_cuda else lambda: None
    return book.median_seconds(lambda: kernels.paged_attention(q, k, v, tables, lengths, starts, 64**-0.5), 25, wait)


sweep = {size: in_blocks(jobs, size) for size in (1, 4, 16, 64, 256)}
rows = []
for size, steps in sweep.items():
    empty = 100 * (busy(steps, "taken") - busy(steps, "used")) / SLOTS
    rows.append((size, empty, busy(steps, "running"), len(steps), LONGEST // size))
book.table("block size | taken, empty % | requests at once | steps | table entries for 1,024 tokens", rows,
    "block sizes")
for size in sweep:
    print(f"~ attention with blocks of {size}: {1e6 * attention_seconds(size):.0f} microseconds")

# %% [markdown]
# ## Where it does not help
#
# Blocks are handed out on faith: nothing is set aside for what the admitted will still write. If they run out, somebody
# is preempted, and computed again later. *If lengths are known*, blocks let a few more in and regret it: as many steps,
# and more work in them. *If everybody grows* from a short prompt to a long output, blocks need fewer steps, but look at
# the last column: a bad bargain where computing is dear and memory is not. Cures: Try this, 2, and chapter 08.

# %%
rows = []
for name, some in (("as above", jobs), ("all 192 in, 64 out", [book.Arrival(0, 192, 64)] * 96),
                   ("all 16 in, 496 out", [book.Arrival(0, 16, 496)] * 64)):
    exact, blocks = in_one_piece(some, lambda job: job.prompt + job.output), in_blocks(some)
    needed = sum(job.prompt + job.output - 1 for job in some)
    twice = 100 * (sum(step.computed for step in blocks) / needed - 1)
    rows.append((name, len(exact), len(blocks), twice))
book.table("requests | steps, reserved exactly | steps, in blocks | in blocks computed twice %", rows,
    "blocks of 16 against an oracle")
_, known, growing = rows

# %%
with book.figure(args, "ch05_paging", size=(8, 3.4)) as axes:
    if axes is not None:
        for what, colour, label in (("taken", book.ORANGE, "taken, empty"), ("used", book.BLUE, "holds a token")):
            shares = [100 * busy(steps, what) / SLOTS for steps in schemes.values()]
            axes.barh(list(schemes), shares, color=colour, label=label)
        for y, steps in enumerate(schemes.values()):
            axes.annotate(f"{busy(steps, 'running'):.0f} requests at once", (1, y), color="white", va="center")
        axes.set(title="Where the memory goes", xlabel="% of the cache; the rest is free", xlim=(0, 100))
        axes.set_ylim(3.6, -1.2)
        axes.legend(ncols=2, loc="upper center")

# %% [markdown]
# ## Why
#
# All that is reserved and not written is part of one block for each request, on average half of it. And all blocks have
# the same size, so any free one fits.
#
# The price is a lookup in the attention kernel. The alternative: vAttention reserves *virtual* addresses for the
# longest request, and maps physical pages behind them as it grows; unchanged kernels see contiguous memory. It pays
# with the driver's page size (2 MB unless the driver is changed): for one layer of Llama-3.1-8B in 16 bits, 2 MB of
# keys are 1,024 tokens, four times our largest block. And a prefix (chapter 06) is shared in whole pages only.
#
# ## At scale
#
# The PagedAttention paper finds that 20 to 38 % of the KV memory of earlier systems held tokens, and reports 2 to 4
# times their throughput at the same latency. Ours: the first row's share, and the ratio of steps, 2.1 to 2.9 by `seed`.
#
# ## Try this
#
# 1. `longest=512` in the workload, with 1,024 still reserved. Which row needs as many steps as before, and why?
# 2. Keep a tenth of the blocks back (a `Scheduler` whose `_fitting` then returns None). What does that save, and cost?
# 3. Give `in_one_piece` compaction: when a gap is too small, move everybody together. How many tokens are moved?
#
# **Exercise 03** (`python tutorial/check.py 03`): write `allocate` and `release`, and let the engine run on them.

# %% The claim, on counters.
assert gain > 2 and len(worst) > 1.8 * len(paged)
assert known[1] == known[2], "with known lengths there is nothing to gain"
assert growing[1] > growing[2] and growing[3] > 5, "fewer steps, for much that is computed twice"
