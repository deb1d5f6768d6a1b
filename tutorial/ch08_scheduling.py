"""Whoever goes first makes somebody else wait: a policy does not add capacity, it decides who pays

Survey: A IV.A, V.B, VI.C · B 3.2.4 · C Request Scheduling: Inter-Request Scheduling, Decoding Length Prediction, Fairness
Papers: FastServe arXiv:2305.05920 · VTC arXiv:2401.00588 · Learning to rank arXiv:2408.15792 · Andes arXiv:2404.16283
Code: scheduler.Policy, scheduler.Shortest, scheduler.MLFQ, scheduler.Fair, scheduler.Scheduler.preempt
Minutes: read 15, run 1, exercises 30, 35
Kind: simulated; the engine's own scheduler and block pool, without a model, under chapter 07's model of step time
Exercise: 07, 10
Effect: a learned ranking brings first tokens 1.7 times sooner on average, and the longest wait grows from 235 to 742
"""

# %% [markdown]
# ## The idea
#
# Chapter 07 filled every step. What is left to decide is *whose* tokens fill it, and that moves waiting from one request to
# another:
#
# - **first come, first served** is blind to work: who comes behind a long request waits for it (head-of-line blocking).
# - **shortest first** has the least mean wait, if lengths are known. They are not; so predict them in buckets, or only
#   their *order*, which is all that a queue needs. The long ones pay.
# - **feedback queues** (MLFQ) predict nothing: who has used up a quantum drops a level and is interrupted. That one pays,
#   and the server pays once more, for computing or moving what was there.
# - **fairness counters** (VTC) look at tenants, not at requests: who was served least goes first.
# - **quality of experience** (Andes) looks at readers: nobody needs a token before the one in front of it is read.
#
# *Invariant:* a policy changes who runs, never what is generated; if nobody is interrupted, all compute the same rows.
# *Cost:* waiting, for those who go last; with interruption also rows computed twice, or blocks moved.

# %% Before you run it: 400 requests in a rush, outputs of 3 to 456 tokens, a third of them of at most 16.
PREDICT = 3.0  # How many times sooner comes the first token, on average, if the shortest go first?

# %%
import math
import random
from collections import Counter, namedtuple

import book
import numpy as np
from simulator import Simulator, serve

from cache import BlockPool
from scheduler import MLFQ, Fair, Policy, Request, Shortest

args = book.options(__doc__)
PLACES, BUDGET, LIMIT = 16, 64, 512  # requests at once; tokens in a step; the max_tokens that everybody asks for
PER_TOKEN, SWAP = 1 / 64, 1 / 64  # times are in steps of one token: what a token adds, and what moving a block does
SHORT, LONG = {"most": 16}, {"least": 128}  # tokens out
FIRST, GAP, READS = 60, 8, 0.25  # targets: until the first token, between two; and how many tokens a reader reads


# output is known to nobody but `exact`; words are what can be seen in the prompt
Job = namedtuple("Job", "at prompt output words tenant text", defaults=((), "", 0))


def trace(count, rate, seed=5, noise=0.5, burst=1.0, meaning=(-1.2, 0.9, 1.4)):
    """Requests, and the rule behind their lengths. IT IS MADE UP: three words in a prompt say how long its answer gets.

    Real prompts say it less plainly. `noise` is what the words do not tell: the sigma of the lognormal around them.
    """
    rng, at, jobs = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.gammavariate(1 / burst**2, burst**2 / rate) if rate < math.inf else 0.0
        words = tuple(rng.random() < share for share in (0.4, 0.3, 0.15))  # "briefly", "explain", "story"
        prompt = min(400, max(8, round(rng.lognormvariate(math.log(60), 0.6))))
        mean = 3.2 + sum(weight * word for weight, word in zip(meaning, words))
        jobs.append(Job(at, prompt, min(LIMIT, max(2, round(rng.lognormvariate(mean, noise)))), words))
    return jobs


class Run(Simulator):
    """A trace served in chapter 03's simulator. swap: the time to move a block."""

    def __init__(self, jobs, policy="fcfs", swap=None):
        pool = BlockPool(2048, 16, prefix_caching=False, num_host_slots=0 if swap is None else 8192)
        super().__init__((1, PER_TOKEN, 0, 0), pool, (FIRST, GAP), swap or 0.0, policy=policy, max_batch_tokens=BUDGET,
                         max_batch_requests=PLACES, max_model_len=1024)
        # Tenants: requests not yet admitted, service so far, and the last one's lead while all have some waiting.
        self.jobs, self.waiting, self.leads, self.admitted = jobs, 0.0, [0], set()
        self.left = Counter(job.tenant for job in jobs)
        self.served = dict.fromkeys(self.left, 0)
        self.times = [record.times for record in serve(self, jobs)]
        self.rows = sum(n for plan in self.plans for *_, n in plan)
        self.end = sum(times[-1] - job.at for times, job in zip(self.times, jobs)) / len(jobs)
        self.goodput = 100 * self.scheduler.num_in_time / self.scheduler.num_with_targets  # % that met both targets
        self.experience = 100 * sum(book.experience(job.at, times, FIRST, READS)
                                    for times, job in zip(self.times, jobs)) / len(jobs)

    def add(self, ids, job):
        return super().add(ids, job, max_tokens=LIMIT, tenant=job.tenant)

    def step(self):
        before, sampled = self.now, super().step()
        self.waiting += (self.now - before) * self.scheduler.num_waiting
        for number in {number for number, *_ in self.plans[-1]} - self.admitted:
            self.admitted.add(number)
            self.left[self.jobs[number].tenant] -= 1
            self.served[self.jobs[number].tenant] += self.jobs[number].prompt
        for request in sampled:
            self.served[request.tenant] += 2
        if len(self.left) > 1 and min(self.left.values()):
            first, *_, last = self.served.values()
            self.leads.append(last - first)
            self.share = 100 * last / sum(self.served.values())
        return sampled

    def first(self, share=None, least=0, most=LIMIT, tenant=""):
        """Time to first token of those with so many tokens out: a quantile, or without `share` the mean."""
        waits = [times[0] - job.at for times, job in zip(self.times, self.jobs)
                 if least <= job.output <= most and job.tenant.startswith(tenant)]
        return sum(waits) / len(waits) if share is None else book.quantile(waits, share)


# %% [markdown]
# ## Predicting lengths
#
# A thousand past requests and what they turned into. `bucketed` is least squares on the logarithm of the length, of which
# only the quarter is used. `ranked` learns which of two requests was longer (logistic regression on differences), and its
# score becomes a length by its place among the past. Kendall's tau: share of pairs in the right order, less in the wrong.

# %%
past = trace(1000, math.inf, seed=1)
lengths = np.array([job.output for job in past])


def seen(job):
    return np.array([1, math.log(job.prompt), *job.words])


X = np.array([seen(job) for job in past])
by_length, *_ = np.linalg.lstsq(X, np.log(lengths), rcond=None)
edges = np.quantile(X @ by_length, (0.25, 0.5, 0.75))
quarter = np.searchsorted(edges, X @ by_length)
middles = [float(np.median(lengths[quarter == i])) for i in range(4)]

rng, by_rank = np.random.default_rng(0), np.zeros(X.shape[1])
for _ in range(300):
    a, b = rng.integers(len(past), size=(2, 256))
    longer = (X[a] - X[b]) * np.sign(lengths[a] - lengths[b])[:, None]
    by_rank += 0.5 * np.mean(longer / (1 + np.exp(longer @ by_rank))[:, None], 0)
scores = np.sort(X @ by_rank)


PREDICTORS = {
    "exact": lambda request: request.params.output,
    "bucketed": lambda request: middles[np.searchsorted(edges, seen(request.params) @ by_length)],
    "ranked": lambda request: np.quantile(lengths, np.searchsorted(scores, seen(request.params) @ by_rank) / len(scores)),
}


def compare(predict, jobs):
    said, true = np.array([(predict(Request([1], params=job)), job.output) for job in jobs], dtype=float).T
    a, b = np.triu_indices(len(jobs), 1)
    signs = np.sign(said[a] - said[b]) * np.sign(true[a] - true[b])
    return float(abs(said - true).mean()), float(signs[true[a] != true[b]].mean())


rush = trace(400, 0.26)
loads = {
    "calm": trace(400, 0.15), "rush": rush, "bursty": trace(400, 0.2, burst=4),
    "wild": trace(400, 0.18, noise=1.2),  # the words tell less
    "drifted": trace(400, 0.21, meaning=(1.2, 0.0, -1.4)),  # the words have changed their meaning
    "alike": [job._replace(prompt=60, output=40, words=(0, 0, 0)) for job in rush],
}
book.table("predictor | on rush: tokens off | tau | on wild: tokens off | tau | on drifted: tokens off | tau",
    [(n, *(x for load in ("rush", "wild", "drifted") for x in compare(p, loads[load]))) for n, p in PREDICTORS.items()],
    "what was learned of the made-up rule")

# %% [markdown]
# ## One trace, eight policies
#
# All are the engine's own but the last. `Shortest` adds the prompt to what its predictor says: with `max_tokens`, which
# is the same for all, only prompts are left. The last one a few lines add: *earliest need first*, after Andes. A
# request's key is the time at which its reader will have read all there is: fixed while it waits, later with every
# token it gets. Who runs far ahead of the reader makes room for whoever falls behind.

# %%


class Readers(Policy):
    rekeys = True

    def key(self, request):
        return request.params.at + FIRST + request.num_output / READS

    def outranks(self, waiting, running):
        return self.key(running) - self.key(waiting) > 60


POLICIES = {
    "first come": lambda: ("fcfs",), "shortest, max_tokens": lambda: (Shortest(),),
    **{f"shortest, {name}": lambda p=p: (Shortest(p),) for name, p in PREDICTORS.items()},
    "feedback, recomputed": lambda: (MLFQ(32),), "feedback, swapped": lambda: (MLFQ(32), SWAP),
    "readers, swapped": lambda: (Readers(), SWAP),
}
runs = {name: Run(rush, *make()) for name, make in POLICIES.items()}
book.table("policy | first token, mean | short | p99 | long | p99 | all, worst | last token, mean | goodput % | "
    "experience % | interrupted | rows | time in all",
    [(name, r.first(), r.first(**SHORT), r.first(0.99, **SHORT), r.first(**LONG), r.first(0.99, **LONG), r.first(1),
      r.end, r.goodput, r.experience, r.scheduler.num_preemptions, r.rows, r.now) for name, r in runs.items()],
    f"{len(rush)} requests, {sum(j.output <= 16 for j in rush)} short (at most 16 out), "
    f"{sum(j.output >= 128 for j in rush)} long (128 or more), {np.mean([j.output for j in rush]):.0f} out on average")
fcfs, best = runs["first come"], runs["shortest, exact"]
gain = fcfs.first() / best.first()
book.predicted("first token, first come against shortest first", PREDICT, gain,
    f"Little: a mean wait is the mean queue over the rate of arrival; {fcfs.waiting / fcfs.now:.1f} requests wait, or "
    f"{best.waiting / best.now:.1f} if those go first who soon give back their place")

# %% [markdown]
# Who pays? *Shortest first* takes from the long: their mean wait doubles, and so does the worst. The rush also ends later,
# as the long are left over and run in a half empty batch. The ranking is off by nearly half the mean answer, and its mean
# wait is that of knowing: only order counts. *Feedback* treats long and short alike up to the first token, and lets the
# long pay afterwards, in gaps: see goodput. If it recomputes, everybody pays. *Readers* has the shortest worst wait and
# little goodput: to the target a gap its reader never notices is a gap. Who chooses the measure chooses the policy.
#
# ## Starvation, and what aging costs
#
# One long request among a stream of short ones that by itself is more than the server can do. `patience` says how many
# steps of waiting a token of length is worth.

# %%
stream = [job._replace(prompt=30, output=12) for job in trace(1600, 0.78)]
stream.insert(200, Job(stream[200].at, 200, 300))
patience = {"no aging": 1e9, "patience 1": 1, "patience 0.5": 0.5, "patience 0.25": 0.25}
aging = {name: Run(stream, Shortest(PREDICTORS["exact"], x)) for name, x in patience.items()}
aging["first come"] = Run(stream)
book.table("shortest first with | the long one waits | the short ones, mean | p99 | time in all",
    [(n, r.first(**LONG), r.first(**SHORT), r.first(0.99, **SHORT), r.now) for n, r in aging.items()],
    f"one long request, and {len(stream) - 1} short ones")

# %% [markdown]
# ## Recompute or swap
#
# A block of 16 tokens costs 16 / 64 of a step to compute again, and two moves to keep. So swapping ought to be cheaper
# below an eighth of a step per move; `Scheduler(prefers_swap=...)` is asked each time.

# %%
prices = {"recompute": runs["feedback, recomputed"]}
prices |= {f"swap, a move takes 1/{n} of a step": Run(rush, MLFQ(32), 1 / n) for n in (64, 16, 8, 4)}
book.table("when interrupted | rows | blocks moved | first token, mean | last token, mean | experience % | time in all",
    [(n, r.rows, r.num_moved, r.first(), r.end, r.experience, r.now) for n, r in prices.items()],
    "feedback queues on the rush")

# %% [markdown]
# ## Tenants
#
# A crowd sends 300 requests at once, and behind it a guest 60 longer ones. VTC: while both have requests waiting, what
# they are served (a prompt token counts 1, a generated one 2) differs over any span of time by at most 2 U, where U is
# the most one can get without being chosen again: here a longest prompt, and longest outputs in all places.

# %%
crowd = [job._replace(at=0.0, tenant="crowd") for job in trace(300, 1)]
guest = [job._replace(at=0.0, output=min(LIMIT, 3 * job.output), tenant="guest") for job in trace(60, 1, seed=8)]
both, four = crowd + guest, [job._replace(tenant=f"crowd {i % 4}") for i, job in enumerate(crowd)] + guest
U = max(job.prompt for job in both) + 2 * PLACES * max(job.output for job in both)
tenants = {"first come": Run(both), "shortest, exact": Run(both, *POLICIES["shortest, exact"]()), "fair": Run(both, Fair()),
           "fair, the crowd has 4 names": Run(four, Fair())}
difference = {name: max(r.leads) - min(r.leads) for name, r in tenants.items()}
book.table("policy | first token, guest | crowd | all | service differs by | 2 U | guest's share % | time in all",
    [(n, r.first(tenant="guest"), r.first(tenant="crowd"), r.first(), difference[n], 2 * U, r.share, r.now)
     for n, r in tenants.items()], "a crowd and a guest")

# %% [markdown]
# ## Which wins where, and where it does not help
#
# *calm*: nobody waits, and no policy can help. *alike*: nobody is shorter; interrupting buys first tokens and delays every
# end. *wild*: the words say little, and who asks for no prediction gives the better experience. *drifted*: the words have
# changed their meaning, and the ranking is worse than first come, first served. Above: fairness loses to a tenant with
# four names, and its mean over all is worse.

# %%
chosen = [name for name in POLICIES if name not in ("shortest, max_tokens", "feedback, recomputed")]
grid = {load: {n: runs[n] if load == "rush" else Run(jobs, *POLICIES[n]()) for n in chosen} for load, jobs in loads.items()}
for title, measure, pick in (("first token, mean", Run.first, min), ("first token, p99", lambda r: r.first(0.99), min),
                             ("last token, mean", lambda r: r.end, min), ("experience, %", lambda r: r.experience, max)):
    rows = []
    for load, line in grid.items():
        values = {n: f"{measure(r):.3g}" for n, r in line.items()}
        best_guess = pick((x for n, x in values.items() if n != "shortest, exact"), key=float)
        rows.append((load, *(x + " *" * (x == best_guess) for x in values.values())))
    book.table("workload | " + " | ".join(chosen), rows, f"{title} (* the best of those that do not know lengths)")

# %%
with book.figure(args, "ch08_scheduling", columns=2, size=(9, 3.6)) as axes:
    if axes is not None:
        left, right = axes
        for y, r in enumerate(runs.values()):
            left.barh(y - 0.2, r.first(**SHORT), 0.38, color=book.BLUE, label="short" if not y else None)
            left.barh(y + 0.2, r.first(**LONG), 0.38, color=book.ORANGE, label="long" if not y else None)
        left.set(title="Who waits for the first token", xlabel="mean wait, steps of one token", yticks=range(len(runs)),
                 yticklabels=list(runs), ylim=(len(runs) - 0.4, -0.6))
        left.legend(loc="lower right")
        for (name, r), style, colour in zip(tenants.items(), (":", "--", "-"), (book.RED, book.ORANGE, book.BLUE)):
            right.plot([lead / 1000 for lead in r.leads], style, color=colour, label=name)
        right.axhspan(-2 * U / 1000, 2 * U / 1000, color="#EEEEEE", zorder=0, label="within 2 U")
        right.set(title="The guest's lead over the crowd", xlabel="step", ylabel="thousand tokens of service")
        right.legend(fontsize=9, loc="lower left")

# %% [markdown]
# ## Why
#
# The sum of all waits is the number waiting, added up over time: it falls if those go first who give back their place
# soonest. That is why only the order matters. The worst wait belongs to the longest, until `patience` stops it. An
# interruption pays if who comes in is much shorter than who goes out; its price is what that one had computed.
#
# ## At scale
#
# FastServe reports up to 31.4 times vLLM's throughput at the same mean latency (17.9 at the same tail); the ranking paper
# 2.8 times lower latency for a chatbot; VTC proves its bound, and that it is tight to a factor of two; Andes reports up to
# 3.2 times the experience in its first version, 4.7 in its second. On traces of their own: compare directions, not sizes.
#
# ## Try this
#
# 1. `trace(400, 0.26, noise=0)`: the words say everything. What is still missing between `ranked` and `exact`?
# 2. MLFQ(8) and MLFQ(128): how often is somebody interrupted, and who gains?
# 3. Weigh goodput by GAP = 40 instead of 8. Which policy rises most, and did anything change for its readers?
#
# **Exercise 07** (`python tutorial/check.py 07`): a bug hunt in what becomes of a request that was interrupted. **10** is
# the fairness counter, and its bound.

# %% The claim, on counters.
ranking, feedback = runs["shortest, ranked"], runs["feedback, recomputed"]
assert gain > 1.5 and ranking.first() < 1.1 * best.first(), "the order is nearly as good as the lengths"
assert best.first(**LONG) > 1.8 * fcfs.first(**LONG) and best.first(1) > 2 * fcfs.first(1), "the long pay"
assert len({r.rows for r in runs.values()}) == 2 and feedback.rows > 1.2 * fcfs.rows and feedback.first() > fcfs.first()
assert aging["no aging"].first(**LONG) > 2 * aging["patience 1"].first(**LONG), "aging ends starvation"
assert difference["fair"] < 2 * U < difference["first come"] and difference["fair"] < U / 10, "VTC's bound, and who has none"
assert grid["drifted"]["shortest, ranked"].first() > grid["drifted"]["first come"].first(), "a wrong order"
assert grid["alike"]["feedback, swapped"].end > 1.5 * grid["alike"]["first come"].end, "among equals, do not interrupt"
