"""Whoever goes first makes somebody else wait: a policy does not add capacity, it decides who pays

Survey: A IV.A, V.B, VI.C · B 3.2.4 · C Request Scheduling: Inter-Request Scheduling, Decoding Length Prediction, Fairness
Papers: FastServe arXiv:2305.05920 · VTC arXiv:2401.00588 · Learning to rank arXiv:2408.15792 · Andes arXiv:2404.16283
Code: scheduler.Policy, scheduler.Shortest, scheduler.MLFQ, scheduler.Fair, scheduler.Scheduler.preempt
Minutes: read 15, run 1, exercises 30, 35
Kind: simulated; the engine's own scheduler and block pool, without a model, under chapter 07's model of step time
Exercise: 07, 10
Effect: a learned ranking brings first tokens 1.6 times sooner on average, and the longest wait grows from 252 to 635
"""

# %% [markdown]
# ## The idea
#
# Chapter 07 filled every step. What is left to decide is *whose* tokens fill it:
#
# - **first come, first served**: who comes behind a long request waits for it (head-of-line blocking).
# - **shortest first** has the least mean wait. It needs lengths, or predictions: of a bucket, or only of the *order*.
# - **feedback queues** (MLFQ) predict nothing: who has used up a quantum drops a level, and is interrupted for somebody
#   above. What was there is computed again later (recomputed), or moved to main memory and back (swapped).
# - **quality of experience** (Andes) looks at readers: nobody needs a token before the one in front of it is read.
# - **fairness counters** (VTC) look at tenants, not at requests: who was served least goes first.
#
# *Invariant:* a policy changes who runs, never what is generated; if nobody is interrupted, all compute the same rows.
# *Cost:* waiting, for those who go last; with interruption also rows computed twice, or blocks moved.

# %% Before you run it: five rushes of 400 requests, outputs of 2 to 512 tokens, a third of them of at most 16.
PREDICT = 3.0  # How many times sooner comes the first token, on average, if the shortest go first?

# %%
import math
import random
from collections import Counter, defaultdict, namedtuple
from itertools import combinations
from statistics import fmean, mode

import book
from simulator import PLACES, run

from scheduler import MLFQ, Fair, Policy, Shortest

args = book.options(__doc__)
FIRST, READS = 60, 0.25  # a reader wants the first token by 60, in steps of one token, and then reads one in 4

# %% [markdown]
# ## A workload whose lengths can be guessed
#
# The rule is *made up*: three words in a prompt say how long its answer gets. `meaning` is what each of them adds to
# the logarithm of the length, `noise` what they do not say (a lognormal's sigma). Real prompts tell it less plainly.

# %%
# words: is there "briefly" in the prompt, "explain", "story"? text: which random tokens it is made of
Job = namedtuple("Job", "at prompt output words tenant text", defaults=((), "", 0))


def trace(count, rate, seed=0, noise=0.5, meaning=(-1.2, 0.9, 1.4)):
    rng, at, jobs = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        words = (rng.random() < 0.4, rng.random() < 0.3, rng.random() < 0.15)
        prompt = round(rng.lognormvariate(math.log(60), 0.6))
        log_length = 3.2 + sum(adds for adds, is_there in zip(meaning, words) if is_there)
        output = round(rng.lognormvariate(log_length, noise))
        jobs.append(Job(at, min(400, max(8, prompt)), min(512, max(2, output)), words))
    return jobs


# %% [markdown]
# ## Learning to predict
#
# From a thousand past requests, lined up by the length of their answers. `bucketed` says in which quarter of the line
# the answers to these words stand most often. `ranked` sorts the words by the average place of their answers in the
# line; it knows an order and no lengths, so it hands out those of the past in this order.

# %%
past = sorted(trace(1000, 1, seed=99), key=lambda job: job.output)
places = defaultdict(list)
for place, job in enumerate(past):
    places[job.words].append(place)

bucketed, ranked, so_far = {}, {}, 0
for words, found in sorted(places.items(), key=lambda item: fmean(item[1])):
    quarter = mode(place // 250 for place in found)
    bucketed[words] = past[250 * quarter + 125].output  # in its middle
    ranked[words] = past[so_far + len(found) // 2].output
    so_far += len(found)

# %% [markdown]
# ## Five rushes, seven policies
#
# How hard a rush is hangs on a few long answers, so five are drawn. `run` (in `simulator.py`) serves them in 16
# places, with 64 tokens a step and chapter 07's model of step time. `Shortest`, which adds the prompt to the
# prediction, and `MLFQ`, whose level i is for up to 32 * 2**i tokens, are the engine's own. `Readers` is new: a
# request's key is the time at which its reader will have read all there is. So who runs far ahead of the reader makes
# room for who falls behind. Experience is 100 % if no reader waits (chapter 03).

# %%
class Readers(Policy):
    rekeys = True  # the key changes while a request runs

    def key(self, request):
        return request.params.at + FIRST + request.num_output / READS  # params is the Job

    def outranks(self, waiting, running):
        return self.key(running) - self.key(waiting) > 60


POLICIES = {  # swap: what moving a block takes
    "first come": {"policy": Policy()},
    "shortest, exact": {"policy": Shortest(lambda request: request.params.output)},
    "shortest, bucketed": {"policy": Shortest(lambda request: bucketed[request.params.words])},
    "shortest, ranked": {"policy": Shortest(lambda request: ranked[request.params.words])},
    "feedback, recomputed": {"policy": MLFQ(quantum=32)},
    "feedback, swapped": {"policy": MLFQ(quantum=32), "swap": 1 / 64},
    "readers, swapped": {"policy": Readers(), "swap": 1 / 64},
}
rushes = [trace(400, 0.26, seed) for seed in range(5)]
runs, first, computed, rows = {}, {}, {}, []
for name, how in POLICIES.items():
    five = runs[name] = [run(rush, **how) for rush in rushes]
    waits = [wait for r in five for wait in r.waits()]
    short = [wait for r in five for wait in r.waits(lambda job: job.output <= 16)]
    long = [wait for r in five for wait in r.waits(lambda job: job.output >= 128)]
    first[name] = fmean(waits), fmean(short), fmean(long), max(waits)
    last = fmean(record.times[-1] - record.due for r in five for record in r.records)
    experience = fmean(r.experience(FIRST, READS) for r in five)
    computed[name] = sum(r.rows for r in five)
    rows.append((name, *first[name], last, experience, computed[name]))
book.table("policy | first token, mean | of the short | of the long | worst | last token, mean | experience % | rows",
    rows, "five rushes; times are in steps of one token; short: at most 16 tokens out, long: 128 or more")

gain = first["first come"][0] / first["shortest, exact"][0]
gains = [fmean(a.waits()) / fmean(b.waits()) for a, b in zip(runs["first come"], runs["shortest, exact"])]
either = fmean(job.output for rush in rushes for job in rush)
shorter = fmean(min(a.output, b.output) for rush in rushes for a, b in combinations(rush, 2))
book.predicted("first token, first come against shortest first", PREDICT, gain,
    f"of two that wait, who goes first delays the other by its length: {either:.0f} tokens if that is either of them, "
    f"{shorter:.0f} if the shorter, {either / shorter:.1f} times less; but not everybody is there to choose from. By "
    f"rush it is {min(gains):.1f} to {max(gains):.1f}")

# %% [markdown]
# Who pays? *Shortest first* takes from the long: their mean wait doubles, and the worst more so. *Feedback* cannot
# tell long from short before the first token, and lets the long pay afterwards; if it recomputes, the average pays too.
# *Readers* keeps the worst wait as short as first come does. Who chooses the measure chooses the policy.
#
# ## Tenants
#
# A crowd sends 300 requests at once, and behind it a guest 60 longer ones. Service is counted: a prompt token 1, a
# generated one 2. VTC's bound: while both have requests waiting it differs by at most 2 U, where U is what one may get
# without being chosen again: here a longest prompt, and longest outputs in all 16 places.

# %%
crowd = [job._replace(at=0.0, tenant="crowd") for job in trace(300, 1)]
guest = [job._replace(at=0.0, tenant="guest", output=min(512, 3 * job.output)) for job in trace(60, 1, seed=8)]
U = max(job.prompt for job in crowd + guest) + 2 * PLACES * max(job.output for job in crowd + guest)


def service(r):
    """(The guest, all others): what they were served while every tenant had requests waiting."""
    served, waiting = Counter(), Counter(job.tenant for job in r.jobs)
    for plan in r.server.plans:
        for number, before, n in plan:  # the request; its tokens computed before, and in this step
            job = r.jobs[number]
            if before == 0:
                served[job.tenant] += job.prompt
                waiting[job.tenant] -= 1
            if before + n >= job.prompt:
                served[job.tenant] += 2
        if 0 in waiting.values():
            return served["guest"], served.total() - served["guest"]


rows, served = [], {}
for name, policy in (("first come", Policy()), ("fair", Fair())):
    r = run(crowd + guest, policy=policy)
    served[name] = service(r)
    guest_waits = r.waits(lambda job: job.tenant == "guest")
    rows.append((name, *served[name], fmean(guest_waits), fmean(r.waits())))
book.table("policy | guest is served | crowd is served | guest's first token, mean | everybody's", rows,
    f"a crowd and a guest, while both have requests waiting; 2 U is {2 * U:,}")

# %% [markdown]
# ## Which wins where, and where it does not help
#
# *calm*: nobody waits, and no policy can help. *wild*: the words say little; who needs none, and swaps, does better.
# *drifted*: the words have changed their meaning, and the ranking is worse than first come, first served. *alike*:
# nobody is shorter, and interrupting only costs. (Fairness, above, costs too: look at everybody's first token.)

# %%
alike = {"prompt": 60, "output": 40, "words": (0, 0, 0)}
loads = {  # two draws of each
    "calm": [trace(400, 0.15, seed) for seed in (0, 1)],
    "wild": [trace(400, 0.18, seed, noise=1.2) for seed in (0, 1)],
    "drifted": [trace(400, 0.21, seed, meaning=(1.2, 0.0, -1.4)) for seed in (0, 1)],
    "alike": [[job._replace(**alike) for job in rush] for rush in rushes[:2]],
}
grid = {}
for load, draws in loads.items():
    grid[load] = {}
    for name, how in POLICIES.items():
        grid[load][name] = fmean(run(jobs, **how).experience(FIRST, READS) for jobs in draws)
rows = [(load, *values.values()) for load, values in grid.items()]
book.table("workload | " + " | ".join(POLICIES), rows, "experience %")

# %%
with book.figure(args, "ch08_scheduling", size=(8, 3.6)) as axes:
    if axes is not None:
        _, short, long, _ = zip(*first.values())
        axes.barh([y - 0.2 for y in range(len(first))], short, 0.38, color=book.BLUE, label="short answers")
        axes.barh([y + 0.2 for y in range(len(first))], long, 0.38, color=book.ORANGE, label="long answers")
        axes.set(title="Who waits for the first token", xlabel="mean wait, in steps of one token")
        axes.set_yticks(range(len(first)), list(first))
        axes.invert_yaxis()
        axes.legend(loc="lower right")

# %% [markdown]
# ## Why
#
# The sum of all waits is the number waiting, added up over time: it falls if those go first who soon give back their
# place. That is why only the order matters. Interrupting pays if who comes in is much shorter than who goes out.
#
# ## At scale
#
# FastServe reports up to 31.4 times vLLM's throughput at the same mean latency; the ranking paper 2.8 times lower
# latency for a chatbot; Andes up to 4.7 times the experience (second version); VTC proves its bound, tight to a factor
# of two. All on traces of their own: compare directions, not sizes.
#
# ## Try this
#
# 1. `noise=0` in `rushes`: the words say everything. What is left of the gap between `ranked` and `exact`?
# 2. Moving a block of 16 tokens takes 1/16 of a step, or 1/8. From where on is it cheaper to compute it again?
# 3. The crowd takes four names (`tenant=f"crowd {i % 4}"`, with `enumerate`). What is the guest served? What fails?
#
# **Exercise 07** (`python tutorial/check.py 07`): a bug hunt in preemption. **10** is the fairness counter.

# %% The claim, on counters.
fcfs, best, ranking = first["first come"], first["shortest, exact"], first["shortest, ranked"]
assert gain > 1.5 and ranking[0] < 1.1 * best[0], "the order is nearly as good as the lengths"
assert best[2] > 1.8 * fcfs[2] and best[3] > 2 * fcfs[3], "the long pay"
assert computed["feedback, recomputed"] > 1.2 * computed["first come"] == 1.2 * computed["readers, swapped"]
assert max(served["fair"]) - min(served["fair"]) < U / 10, "VTC's bound"
assert max(served["first come"]) - min(served["first come"]) > 2 * U, "which others do not have"
assert grid["drifted"]["shortest, ranked"] < grid["drifted"]["first come"], "a wrong order"
assert grid["alike"]["feedback, swapped"] < 0.9 * grid["alike"]["first come"], "among equals, do not interrupt"
