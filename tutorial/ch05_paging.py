"""Memory handed out in blocks holds several times as many requests as memory reserved in one piece

Survey: A III.A · B 3.2.3 · C KV Cache Optimization: Memory Management
Papers: PagedAttention arXiv:2309.06180 · vAttention arXiv:2405.04437 · LightLLM's token attention is block size 1
Code: cache.BlockPool, cache.BlockPool.extend, scheduler.Scheduler.schedule, kernels.paged_attention
Minutes: read 12, run 1, exercise 20
Kind: run
Exercise: 03
Effect: 3.3 times as many requests at once in the same memory, 2.9 times fewer steps
"""

# %% [markdown]
# ## The idea
#
# A request's cache grows by one token a step, and nobody knows where it will end. If keys and values must lie in one
# piece, the server has to reserve room for the longest request there could be. Most of that room is never written
# (*internal* fragmentation), and what is free lies in gaps too small for the next one (*external* fragmentation).
#
# An operating system had this problem with programs, and solved it with pages. So: cut the memory into blocks of 16
# tokens, give each request a table of the blocks it has, and hand out the next block when the last one is full.
#
# *Invariant:* token i lives in block `table[i // block_size]` at offset `i % block_size`, and every block in use has an
# owner.
# *Cost:* at most one partly filled block per request, one table lookup per block when attending, and no room set aside
# for growth.

# %% Before you run it: 8,192 token slots, requests of at most 1,024 tokens, on average 255 in and 59 out.
PREDICT = 2.0  # How many times more requests run at once with blocks of 16 than with 1,024 slots reserved for each?

# %%
import bisect
import statistics
from types import SimpleNamespace

import book
import torch

import kernels
from cache import BlockPool
from scheduler import Request, Scheduler

args = book.options(__doc__)
SLOTS, LONGEST = 8192, 1024
jobs = book.workload("assistant", 160, seed=1, scale=8, longest=LONGEST)
print(f"\n{len(jobs)} requests, all waiting from the start: {sum(j.prompt for j in jobs) / len(jobs):.0f} tokens in and "
      f"{sum(j.output for j in jobs) / len(jobs):.0f} out on average, "
      f"{max(j.prompt + j.output for j in jobs)} together at most")

# %% [markdown]
# ## In one piece
#
# First fit: a request goes into the first gap that is large enough, in order of arrival. How much to reserve? Three
# answers: the longest possible request; the prompt plus the 256 tokens of output that the client allowed; or exactly
# what it will turn out to need, which only an oracle knows. (These are Orca's variants "Max", "Pow2" and "Oracle" in
# the PagedAttention paper, the middle one simplified.)

# %%


def first_fit(reserved, size):
    """Where a gap of `size` slots begins, among (start, end, job) in order; None if there is none."""
    at = 0
    for start, end, *_ in [*reserved, (SLOTS, SLOTS)]:
        if start - at >= size:
            return at
        at = end
    return None


def in_one_piece(jobs, reserve):
    """Serve jobs on one strip of memory. A step computes the whole prompt of who is new and one token of everybody else."""
    waiting, reserved, seen = list(jobs), [], Counts()
    while waiting or reserved:
        while waiting and (at := first_fit(reserved, reserve(waiting[0]))) is not None:
            job = waiting.pop(0)
            bisect.insort(reserved, (at, at + reserve(job), SimpleNamespace(job=job, done=0)), key=lambda r: r[0])
        free = SLOTS - sum(end - start for start, end, _ in reserved)
        seen.blocked += bool(waiting) and free >= reserve(waiting[0])  # enough room, but not in one piece
        for _, _, running in reserved:
            seen.computed += 1 if running.done else running.job.prompt
            running.done += 1
        seen.look(len(reserved), sum(r.job.prompt + r.done - 1 for _, _, r in reserved), SLOTS - free)
        reserved = [r for r in reserved if r[2].done < r[2].job.output]
    return seen


class Counts:
    """What is noted in every step: requests running, slots that hold something, slots taken."""

    def __init__(self):
        self.steps = self.blocked = self.computed = self.preemptions = 0
        self.running, self.used, self.taken = [], [], []

    def look(self, running, used, taken):
        self.steps += 1
        self.running.append(running)
        self.used.append(used)
        self.taken.append(taken)

    def busy(self, values):
        """Their mean over the first three quarters of the steps; in the rest the queue is empty."""
        return statistics.mean(values[: max(1, len(values) * 3 // 4)])


# %% [markdown]
# ## In blocks
#
# No simulator is needed here: `Scheduler` and `BlockPool` know no tensors, so the engine's own code runs, only the
# model is left out.

# %%


def in_blocks(jobs, block_size=16, slots=SLOTS):
    """Serve jobs with the engine's scheduler and pool; every model is replaced by 'token 7'."""
    pool = BlockPool(slots // block_size + 1, block_size, prefix_caching=False)
    scheduler = Scheduler(pool, max_batch_tokens=1 << 20, max_batch_requests=1 << 10, max_model_len=LONGEST)
    for job in jobs:
        scheduler.add(Request([1] * job.prompt, job.output))
    seen = Counts()
    while scheduler.has_work():
        plan = scheduler.schedule()
        for request, n in plan:
            seen.computed += n
            if scheduler.advance(request, n):
                request.tokens.append(7)
        running = scheduler.running
        seen.look(len(running), sum(r.num_computed for r in running), (pool.num_usable - pool.num_free) * block_size)
        for request in [r for r in running if r.num_output == r.max_tokens]:
            scheduler.finish(request, "length")
    scheduler.check()
    seen.preemptions = scheduler.num_preemptions
    return seen


schemes = {
    "reserve the longest": in_one_piece(jobs, lambda job: LONGEST),
    "reserve prompt + 256": in_one_piece(jobs, lambda job: min(LONGEST, job.prompt + 256)),
    "reserve exactly (oracle)": in_one_piece(jobs, lambda job: job.prompt + job.output),
    "blocks of 16": in_blocks(jobs),
}
worst, paged = schemes["reserve the longest"], schemes["blocks of 16"]
book.table("memory | requests at once | slots holding a token | taken, empty | free | steps to serve all | "
    "held up by gaps | computed twice",
    [(name, s.busy(s.running), f"{100 * s.busy(s.used) / SLOTS:.0f} %",
      f"{100 * (s.busy(s.taken) - s.busy(s.used)) / SLOTS:.0f} %", f"{100 * (1 - s.busy(s.taken) / SLOTS):.0f} %",
      s.steps, s.blocked, s.computed - worst.computed) for name, s in schemes.items()],
    f"{len(jobs)} requests in {SLOTS:,} slots")
gain = paged.busy(paged.running) / worst.busy(worst.running)
mean = paged.busy(paged.used) / paged.busy(paged.running)
book.predicted("requests at once, blocks against reserving the longest", PREDICT, gain,
    f"a running request holds {mean:.0f} tokens on average: {SLOTS:,} / {mean:.0f} = {SLOTS / mean:.0f} of them, against "
    f"{SLOTS:,} / {LONGEST:,} = {SLOTS // LONGEST}")
book.bars({name: s.busy(s.running) for name, s in schemes.items()}, "requests", "running at once")

# %% [markdown]
# ## How large a block?
#
# A block that is too large is a small reservation: on average half of the last one is empty. A block that is too small
# makes long tables, and attention has to look up a new place more often. The bytes of keys and values are the same. So
# the time of a decode step's attention is measured, on 16 requests of 512 tokens, blocks in random order: does it care?

# %%


def attention_seconds(block_size, requests=16, length=512, heads=8, kv_heads=2, head_dim=64):
    """Median seconds of one paged_attention call in which every request has one query."""
    device, per_request = torch.device(args.device), -(-length // block_size)
    order = torch.randperm(requests * per_request, generator=torch.Generator().manual_seed(0)) + 1
    tables = order.view(requests, per_request).int().to(device)
    k, v = torch.randn(2, requests * per_request + 1, block_size, kv_heads, head_dim, device=device)
    q = torch.randn(requests, heads, head_dim, device=device)
    lens = torch.full((requests,), length, dtype=torch.int32, device=device)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    return book.median_seconds(lambda: kernels.paged_attention(q, k, v, tables, lens, starts, head_dim**-0.5), 25,
                               torch.cuda.synchronize if device.type == "cuda" else lambda: None)


sweep = {size: in_blocks(jobs, size) for size in (1, 4, 16, 64, 256)}
book.table("block size | taken, empty | requests at once | steps | table entries for 1,024 tokens",
    [(size, f"{100 * (s.busy(s.taken) - s.busy(s.used)) / SLOTS:.1f} %", s.busy(s.running), s.steps, LONGEST // size)
     for size, s in sweep.items()], "the block-size sweep")
times = {size: attention_seconds(size) for size in sweep}
print("~ attention, microseconds: " + ", ".join(f"{1e6 * t:.0f} at {size}" for size, t in times.items()))

# %% [markdown]
# ## Where it does not help
#
# **When lengths are known.** Blocks are handed out on faith: nothing is set aside for what the admitted will still
# write. If every request is exactly 256 tokens, reserving exactly wastes nothing and never regrets. Blocks let a few
# more in, run out, preempt them, and compute their prompts again: the same number of steps, and more work in them.
#
# **When everybody grows.** Below, prompts are short and outputs long, and the faith is misplaced. Blocks still need
# fewer steps, because more requests run in each. But look at the last column. Where computing is dear and memory is
# not, that is a bad bargain: a server can then hold some blocks back when it admits (Try this, 2), or predict lengths
# (chapter 08).

# %%
def exactly_or_in_blocks(jobs):
    return {"reserve exactly": in_one_piece(jobs, lambda job: job.prompt + job.output), "blocks of 16": in_blocks(jobs)}


same = exactly_or_in_blocks([book.Arrival(0, 192, 64)] * 96)
grow = exactly_or_in_blocks([book.Arrival(0, 16, 496)] * 64)
for title, cases in (("all 192 in, 64 out", same), ("all 16 in, 496 out", grow)):
    needed = cases["reserve exactly"].computed
    book.table("memory | requests at once | steps | preemptions | tokens computed | of them twice",
        [(name, s.busy(s.running), s.steps, s.preemptions, s.computed, f"{100 * (s.computed - needed) / needed:.1f} %")
         for name, s in cases.items()], title)

# %%
with book.figure(args, "ch05_paging", columns=2, size=(9, 3.4)) as axes:
    if axes is not None:
        left, right = axes
        for y, s in enumerate(schemes.values()):
            used, taken = 100 * s.busy(s.used) / SLOTS, 100 * s.busy(s.taken) / SLOTS
            left.barh(y, used, color=book.BLUE, label="holds a token" if not y else None)
            left.barh(y, taken - used, left=used, color=book.ORANGE, label="taken, empty" if not y else None)
            left.barh(y, 100 - taken, left=taken, color="#E5E5E5", label="free" if not y else None)
            left.annotate(f"{s.busy(s.running):.0f} at once", (3, y), color="white", va="center", fontweight="bold")
        left.set(title="Where the memory goes", xlabel="% of the cache", yticks=range(len(schemes)),
                 yticklabels=list(schemes), ylim=(3.6, -1.3))
        left.legend(ncols=3, loc="upper center", fontsize=9, columnspacing=1, handlelength=1)
        left.grid(visible=False)
        for (name, s), style, colour in zip(grow.items(), ("--", "-"), (book.GREEN, book.BLUE)):
            right.plot(s.running, style, color=colour, label=name)
        right.set(title="When everybody grows", xlabel="step", ylabel="requests running", ylim=(0, None))
        right.legend()

# %% [markdown]
# ## Why
#
# Waste per request is what is reserved and not written: up to a thousand slots when reserving the longest, on average
# half a block with blocks. (With prefix sharing, chapter 06, there is less than that.) External fragmentation is gone
# because all blocks have the same size: any free one fits.
#
# The price is an indirection in the attention kernel. On the CPU above it shows in small blocks, and from 16 tokens on
# no more. The alternative is to leave it to the hardware: vAttention reserves *virtual* addresses for the longest
# request, and maps physical pages behind them as the request grows, so that unchanged kernels see contiguous memory. It
# pays with the driver's page size (2 MB unless the driver is changed): for one layer of Llama-3.1-8B in 16 bits, 2 MB
# of keys are 1,024 tokens, so its "block" is that of our sweep's last row, times four. And sharing a prefix (chapter
# 06) works in steps of such pages only.
#
# ## At scale
#
# The PagedAttention paper finds that 20 to 38 % of the KV memory of earlier systems held tokens, and reports 2 to 4
# times their throughput at the same latency. Ours, above: the first row's share, and the ratio of the steps.
#
# ## Try this
#
# 1. `longest=512` in the workload, with 1,024 still reserved. Which row changes, and which does not?
# 2. Let the scheduler keep a tenth of the blocks back when it admits. How much is computed twice now? What does that
#    cost the first workload?
# 3. Give `in_one_piece` compaction: when a gap is too small, move everybody together. How many tokens are moved?
#
# **Exercise 03** (`python tutorial/check.py 03`): write `allocate` and `release` yourself, and let the engine run on
# them.

# %% The claim, on counters.
assert gain > 2 and worst.steps > 1.8 * paged.steps and paged.blocked == 0
assert same["blocks of 16"].steps == same["reserve exactly"].steps, "with known lengths there is nothing to gain"
assert grow["blocks of 16"].preemptions > 0 == grow["reserve exactly"].preemptions
assert grow["blocks of 16"].computed > 1.05 * grow["reserve exactly"].computed
