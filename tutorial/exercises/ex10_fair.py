"""A policy: share the server among tenants, whatever they ask for, and keep a bound that can be proved.

First come, first served lets whoever sends most have most. VTC (arXiv:2401.00588) counts instead: each tenant has a
counter of what it was served, a prompt token weighs self.input_weight (1) and a generated token self.output_weight (2), and
the waiting tenant with the least goes first. Three functions do that:

  level     what the queue sorts tenants by, the smallest first. It may grow while a tenant waits, but never shrink.
  admitted  called when a request leaves the queue to run; is_empty says that it was the last one there. A preempted request
            comes by a second time (request.num_preemptions > 0), and what is computed again costs nothing.
  sampled   called when a step has generated n tokens for a request.

The catch is who comes back. A tenant that was away for an hour has the least counter of all, and would have the server to
itself until it has caught up: nobody saves up. So keep a floor, below which no counter counts.

You need: self.counters, an empty dict {tenant: number} at first; self.floor, 0 at first; the two weights; request.tenant,
request.num_prompt. `lane` is the tenant. What is asked for, on the trace of this exercise, in which two run at a time:

    while two tenants both have requests waiting, the service they get never differs by more than 2 U = 88,
    where U is what one of them can get without being chosen again: a longest prompt, and longest outputs in both places

    first come, first served:              320
    counters without a floor:              153
    the engine's:                           50
"""

import random
from itertools import combinations

from cache import BlockPool
from exercises import prompt
from scheduler import Fair, Request, Scheduler

TITLE = "policy: a fair share, with a bound"
CHAPTER, KIND = "ch08_scheduling.py", "policy"
MINUTES, DIFFICULTY, IMPORTANCE = 35, 3, 3
MODULE, NAMES = "scheduler", ("Fair.level", "Fair.admitted", "Fair.sampled")
HEADER = ""
HINTS = (
    "Without the floor it is three lines: level looks the tenant up in self.counters (0 if it is not there), admitted adds "
    "the prompt's weight, sampled adds the output's.",
    "The floor is the counter of the tenant that was admitted last, at that moment: it had the least of all that waited, so "
    "nobody who waits is below it.",
    "level is then max(counter, floor). And admitted has to begin from that, too: what lies below the floor is lost.",
    "is_empty: once nobody waits, there is nobody to be fair to. If the floor then stays where it was, whoever comes next "
    "starts a prompt behind; lift it by what the tenant is charged.",
)
MUTANTS = {
    "lets tenants save up": (("return max(self.counters.get(lane, 0), self.floor)", "return self.counters.get(lane, 0)"),),
    "does not count what is generated": (("n * self.output_weight", "0"),),
    "does not count prompts": (("self.counters[request.tenant] = self.floor + cost",
                                "self.counters[request.tenant] = self.floor"),),
    "serves the most served first": (("return max(self.counters.get(lane, 0), self.floor)",
                                      "return -max(self.counters.get(lane, 0), self.floor)"),),
    "has one counter for all": (("return max(self.counters.get(lane, 0), self.floor)",
                                 "return max([*self.counters.values(), self.floor])"),),
    "first come, first served": (("return max(self.counters.get(lane, 0), self.floor)", "return 0"),),
    "gives everybody's output to whoever was admitted": (
        ("self.counters.get(request.tenant, 0) + n", "self.floor + n"),),
}
PLACES, LONGEST_PROMPT, LONGEST_OUTPUT = 2, 12, 8
# (arrives, tenant, prompt, output): a crowd with long prompts, a writer with long outputs, and one that comes late
JOBS = ([(0, "crowd", 12, 2)] * 24 + [(2, "writer", 3, 8)] * 14 + [(40, "late", 5, 5)] * 14 + [(90, "writer", 4, 4)] * 3)
ENGINE = {"policy": "fair", "max_batch_requests": PLACES, "prefix_caching": False}
REQUESTS = [(arrives, prompt(length, i), {"temperature": 0, "max_tokens": output, "tenant": tenant})
            for i, (arrives, tenant, length, output) in enumerate(JOBS)]
COUNTERS = ("output_tokens",)
EFFECT = ("steps", "service differs by", "at most")
BOUND = 2 * (LONGEST_PROMPT + 2 * PLACES * LONGEST_OUTPUT)


def largest_difference(jobs, times) -> int:
    """The most by which the service of two tenants drifted apart while both had requests waiting.

    jobs: (arrives, tenant, prompt, output); times: for each the steps in which it got its tokens. It waits until the first.
    """
    apart, since = 0, {}  # pair -> least and largest lead since both are waiting
    for step in range(max(map(max, times)) + 1):
        served = dict.fromkeys(sorted({tenant for _, tenant, *_ in jobs}), 0)
        for (_, tenant, length, _), steps in zip(jobs, times):
            served[tenant] += length * (steps[0] <= step) + 2 * sum(s <= step for s in steps)
        waiting = {tenant for (arrives, tenant, *_), steps in zip(jobs, times) if arrives <= step < steps[0]}
        for a, b in combinations(served, 2):
            lead = served[a] - served[b]
            low, high = since.get((a, b), (lead, lead)) if {a, b} <= waiting else (lead, lead)
            since[a, b] = min(low, lead), max(high, lead)
            apart = max(apart, since[a, b][1] - since[a, b][0])
    return apart


def measure(llm, counters: dict) -> dict:
    """The exact counter that the goal is about."""
    return {"service differs by": largest_difference(JOBS, counters["token_steps"]), "at most": BOUND}


def goal(counters: dict) -> str:
    """What is missing, or an empty text."""
    apart = counters["service differs by"]
    return "" if apart <= BOUND else (
        f"the tokens are right; two tenants that both had requests waiting were served {apart} apart (at most {BOUND})")


def run(jobs, blocks=60, places=PLACES):
    """Drive the scheduler without a model: for each job the steps in which it got its tokens, and the policy."""
    s = Scheduler(BlockPool(blocks + 1, 4, prefix_caching=False), max_batch_tokens=32, max_batch_requests=places,
                  max_model_len=100, policy=Fair())
    left, times, requests = list(enumerate(jobs)), [[] for _ in jobs], {}
    for step in range(400):
        while left and left[0][1][0] <= step:
            i, (_, tenant, length, output) = left.pop(0)
            requests[s.add(Request([1] * length, output, tenant=tenant))] = i
        for request, n in s.schedule():
            if s.advance(request, n):
                request.tokens.append(7)
                times[requests[request]].append(step)
                if request.num_output == request.max_tokens:
                    s.finish(request, "length")
        s.check()
    return times, s.policy


def order(times) -> list[int]:
    """Who was admitted, in order."""
    return sorted(range(len(times)), key=lambda i: times[i][0])


def cases():
    """(call, value, likely cause)"""
    one_by_one = [(0, "a", 4, 3), (0, "a", 4, 3), (0, "a", 4, 3), (0, "b", 4, 3), (0, "b", 4, 3)]
    yield "one place; a has three waiting, b two: who is admitted", order(run(one_by_one, places=1)[0]), (
        "the tenant that was served least goes first; among equals whoever came first")
    flood = [(0, "a", 4, 2)] * 10 + [(5, "b", 4, 2)]
    yield "one place; ten of a, and b comes at step 5", run(flood, places=1)[0][-1][0], "whoever was served nothing is next"
    outputs = [(0, "a", 2, 8)] * 8 + [(0, "b", 2, 1)] * 16
    yield ("one place; a asks for 8 tokens at a time, b for 1", order(run(outputs, places=1)[0])[:12],
           "output counts, 2 for a token: b gets several requests for one of a's")
    prompts = [(0, "a", 12, 1)] * 8 + [(0, "b", 2, 1)] * 16
    yield ("one place; a brings prompts of 12, b of 2", order(run(prompts, places=1)[0])[:12],
           "prompts count, 1 for a token, as soon as they are admitted")
    away = [(0, "a", 6, 6)] * 12 + [(30, "b", 6, 6)] * 6
    yield ("one place; b comes at step 30", order(run(away, places=1)[0]),
           "who was away has not saved up: from then on they take turns")
    long_away = [(0, "b", 6, 6), *away]
    yield ("the same, but b was there at the very start", order(run(long_away, places=1)[0]),
           "an old counter below the floor counts as the floor, in `level` and in `admitted`")
    alone = [(0, "a", 12, 2), (20, "a", 12, 2), (40, "a", 12, 2)] + [(60, "a", 4, 2)] * 3 + [(60, "b", 4, 2)] * 3
    yield ("one place; a was alone until b comes at step 60", order(run(alone, places=1)[0]),
           "is_empty: then the floor goes up by the prompt as well; it is never left behind, and never goes down")
    times, policy = run([(0, "a", 5, 8), (0, "a", 6, 8)], blocks=4)
    yield "a alone, preempted on the way: its counter", policy.counters, "5 + 6 for prompts and 2 * 16, nothing twice"
    for seed in range(3):
        rng = random.Random(seed)
        jobs = sorted((rng.randrange(60), rng.choice("abc"), rng.randint(1, 12), rng.randint(1, 8)) for _ in range(40))
        apart = largest_difference(jobs, run(jobs)[0])
        yield f"forty requests at random, seed {seed}: apart by", f"at most {BOUND}" if apart <= BOUND else f"{apart}", (
            "the least served goes first, prompts and outputs count, and nobody saves up")
