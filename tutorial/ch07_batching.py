"""Deciding again in every step who computes what fills the machine, and cutting prompts into chunks keeps it smooth

Survey: A IV.A · B 3.2.4, 3.2.5 · C Request Scheduling: Intra-Request Scheduling
Papers: Orca (OSDI'22) · Sarathi-Serve arXiv:2403.02310 · DeepSpeed-FastGen arXiv:2401.08671
Code: scheduler.Scheduler.schedule, scheduler.Scheduler.advance, nanoserve.LLM.pack, nanoserve.LLM.step
Minutes: read 12, run 1, exercises 60, 30, 25
Kind: run; times in a model of step time that is measured at the end
Exercise: 05, 06, 08
Effect: 2.3 times the throughput of request-level batching; a budget cuts the longest stall from 803 tokens to 64
"""

# %% [markdown]
# ## The idea
#
# A step over one token reads all weights. A step over sixteen tokens of sixteen requests reads them once too. So run
# requests together, in one of three ways:
#
# - **request-level**: collect a batch, run it until its last request is done, take the next. Who is done early leaves
#   an empty seat, and prompts are padded to the longest.
# - **continuous** (Orca's iteration-level): after every step whoever is done leaves and somebody new comes in. But a
#   new prompt comes in whole, and for the length of that step everybody else's next token waits.
# - **chunked prefill** (Sarathi-Serve): a step has a *token budget*. Those who are writing take one token each, and
#   what is left of the budget goes to a piece of somebody's prompt.
#
# *Invariant:* a step computes the next n tokens of each planned request; the n add up to at most the budget.
# *Cost:* a prompt in k chunks reads its own keys about k / 2 times, and weights are read for more steps.

# %% Before you run it: 64 requests, 16 at once; prompts of 23 to 700 tokens, outputs of 8 to 98, of 29 on average.
PREDICT = 2.0  # How many times the throughput of request-level batching has continuous batching?

# %%
from statistics import median
from types import SimpleNamespace

import book
from simulator import PLACES, STEP, Engine, Record, Run, price, run, serve

from nanoserve import LLM

args = book.options(__doc__)
WHOLE = 2048  # a budget that no prompt reaches

# Chats, and every eighth request a long document, all arriving as a Poisson process.
jobs = book.workload("assistant", 64, seed=3, scale=16, rate=0.16, longest=512)
for i in range(5, 64, 8):
    jobs[i] = book.Arrival(jobs[i].at, 700, 20)
print(f"\n{len(jobs)} requests: {sum(job.prompt for job in jobs):,} tokens in, {sum(job.output for job in jobs):,} out")

# %% [markdown]
# ## Request-level
#
# Take who has arrived, up to 16 (`PLACES`). One pass over all prompts, padded to the longest; then as many passes as
# the longest output has tokens, all of them over the whole batch.
#
# The time of a step is counted as 1, for reading the weights, and 1/64 more for each token (`STEP` in `simulator.py`):
# a step of 64 tokens takes about twice as long as a step of one. Below it is measured on this machine.

# %%
def request_level(jobs):
    now, plans, records = 0.0, [], []
    while len(records) < len(jobs):
        now = max(now, jobs[len(records)].at)  # wait until somebody is there
        batch = [job for job in jobs[len(records) : len(records) + PLACES] if job.at <= now]
        longest_prompt = max(job.prompt for job in batch)
        longest_output = max(job.output for job in batch)
        ends = []
        for rows in [longest_prompt] + [1] * (longest_output - 1):
            plans.append([(number, 0, rows) for number in range(len(batch))])
            now += price(STEP, plans[-1])
            ends.append(now)
        for job in batch:
            records.append(Record(job.at, job.at, 0, ends[: job.output]))  # asked for, sent, -, when its tokens came
    return Run(jobs, records, SimpleNamespace(now=now, plans=plans))


# %% [markdown]
# ## Continuous and chunked
#
# Both are the engine's own `Scheduler`, in chapter 03's simulator; the only difference is the budget. The model is left
# out; below it runs, and must take the same steps.
#
# A *stall* is a step in which somebody who is writing waits for somebody's prompt. Its length is the tokens in it.

# %%
def longest_stall(r):
    """Most tokens in a step in which somebody got a token who was past the prompt."""
    longest = 0
    for plan in r.server.plans:  # [(request, its tokens before, its tokens in this step), ...]
        if any(before >= r.jobs[number].prompt for number, before, _ in plan):
            longest = max(longest, sum(n for _, _, n in plan))
    return longest


ways = {
    "request-level": request_level(jobs),
    "continuous": run(jobs, budget=WHOLE),
    "chunked, budget 64": run(jobs, budget=64),
}
static, whole, chunked = ways.values()
needed = sum(job.prompt + job.output - 1 for job in jobs)  # the last token is written, and never read
rows = []
for name, r in ways.items():
    padding = f"{100 * (1 - needed / r.rows):.0f} %"
    stall = "all wait" if r is static else longest_stall(r)
    rows.append((name, len(r.server.plans), r.rows, padding, r.throughput, median(r.waits()), stall, r.longest_gap))
book.table("batching | steps | rows | padding | throughput | first token, median | longest stall, tokens | longest gap",
    rows, "one trace, three ways (times in steps of one token)")

gain, counts = whole.throughput / static.throughput, [len(r.server.plans) for r in (static, whole)]
book.predicted("throughput, continuous against request-level", PREDICT, gain,
    f"a step takes 1, and each row of it 1 / 64: ({counts[0]} + {static.rows:,} / 64) / ({counts[1]} + {whole.rows:,} "
    f"/ 64) = {(counts[0] + static.rows / 64) / (counts[1] + whole.rows / 64):.2f}")
book.bars({name: r.throughput for name, r in ways.items()}, "tokens per step of one token", "throughput")

# %% [markdown]
# ## The dial
#
# The budget trades the time to first token of long prompts against the gaps between tokens of everybody else.

# %%
dial = {budget: run(jobs, budget=budget) for budget in (16, 32, 64, 128, 256, 512, 2048)}
long_waits = {budget: median(r.waits(lambda job: job.prompt >= 500)) for budget, r in dial.items()}
rows = []
for budget, r in dial.items():
    rows.append((budget, longest_stall(r), r.longest_gap, median(r.waits()), long_waits[budget], r.throughput))
book.table("budget | longest stall, tokens | longest gap | first token, median | of long prompts | throughput", rows,
    "the token budget")

# %% [markdown]
# ## Where it does not help
#
# A budget that is too small reads the weights so often that a queue builds up: see the first rows above. And if all
# requests are alike and come together, nobody is done early and nothing is padded: request-level does just as well.

# %%
alike = [book.Arrival(0.0, 48, 32)] * 32
even = {"request-level": request_level(alike), "continuous": run(alike, budget=WHOLE)}
rows = [(name, len(r.server.plans), r.rows, r.throughput) for name, r in even.items()]
book.table("batching | steps | rows | throughput", rows, "32 requests, all 48 in and 32 out")

# %% [markdown]
# ## The same on the model
#
# The engine, with the same arrivals on the same clock. Every step must do exactly what it did above. The seconds of the
# steps give the constant that was assumed: what a token adds to a small step.

# %%
steps = []  # (tokens, seconds)
for budget, simulated in ((WHOLE, whole), (64, chunked)):
    llm = LLM(args.model, device=args.device, dtype="float32", max_batch_tokens=budget, max_batch_requests=PLACES,
              max_model_len=1024, prefix_caching=False)
    server = Engine(llm, STEP)
    serve(server, jobs)
    assert server.plans == simulated.server.plans, "the engine takes the same steps"
    print(f"~ budget {budget}: {sum(server.seconds):.2f} s, longest step {1e3 * max(server.seconds):.0f} ms")
    for plan, seconds in zip(server.plans, server.seconds):
        steps.append((sum(n for _, _, n in plan), seconds))
small = median(seconds for tokens, seconds in steps if tokens <= 20)
per_token = median((seconds - small) / tokens for tokens, seconds in steps if tokens >= 200)
print(f"~ on this machine a token more costs 1/{small / per_token:.0f} of a small step; assumed was 1/64")

# %%
with book.figure(args, "ch07_batching", columns=2, size=(9, 3.4)) as axes:
    if axes is not None:
        left, right = axes
        for (name, r), style, colour in zip(ways.items(), (":", "--", "-"), (book.RED, book.ORANGE, book.BLUE)):
            ends = sorted(time for record in r.records for time in record.times)
            left.plot(ends, range(1, len(ends) + 1), style, color=colour, label=name)
        left.set(title="Tokens out over time", xlabel="time, in steps of one token", ylabel="tokens out")
        left.legend()
        gaps, waits = [r.longest_gap for r in dial.values()], list(long_waits.values())
        right.plot(list(dial), gaps, "o-", color=book.BLUE, label="longest gap between tokens")
        right.plot(list(dial), waits, "s--", color=book.ORANGE, label="first token of long prompts, median")
        right.set(title="The token budget is a dial", xlabel="budget, tokens", ylabel="steps of one token",
                  xscale="log", yscale="log", xticks=list(dial), xticklabels=list(dial))
        right.minorticks_off()
        right.legend(fontsize=9)

# %% [markdown]
# ## Why
#
# A request-level batch lasts as long as its longest output: of the seats only the mean over the maximum is used.
# Continuous batching fills a seat in the step after it became free. A stall is as long as the prompts in it, and the
# budget is its bound. For each chunk the weights are read once more, which is little as long as a chunk keeps the
# arithmetic busy: from about the machine's FLOP/s over its bytes/s on (chapter 02).
#
# ## At scale
#
# Orca reports 36.9 times the throughput of FasterTransformer for GPT-3 175B at the same latency. Sarathi-Serve reports
# 2.6 times vLLM's serving capacity for Mistral-7B on one A100 within the same bound on the gaps between tokens, with
# budgets of 512 to 2,048.
#
# ## Try this
#
# 1. Requests come ten times more slowly (`rate=0.016`): all three have about the same throughput. Why? What differs?
# 2. Let a token add 1/512 (`STEP` in `simulator.py`), a GPU's ratio. Which budget would you choose now?
# 3. `burst=4` in the workload. Which column moves most?
#
# **Exercise 05** (`python tutorial/check.py 05`): write `schedule`. **06**: a bug hunt in chunks. **08**: a budget that
# changes from step to step.

# %% The claim, on counters.
assert gain > 1.5 and longest_stall(chunked) <= 64 < longest_stall(whole)
assert chunked.longest_gap < whole.longest_gap / 2
assert dial[16].throughput < dial[256].throughput, "a budget can be too small"
assert even["continuous"].rows == even["request-level"].rows, "with equal requests there is nothing to gain"
