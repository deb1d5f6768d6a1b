"""A discrete-event simulator: the engine's own queue and block pool, and instead of the model a formula for seconds.

`serve` sends requests to a `Simulator`, or to the `Engine` itself, and writes down when the tokens came. Chapter 03 holds
one against the other. Times are in whatever unit the formula has.
"""

import heapq
import math
from typing import NamedTuple

import book

from cache import BlockPool
from nanoserve import LLM, SamplingParams
from scheduler import Request, Scheduler


class Record(NamedTuple):
    """An answer: when it was due, when it was asked for, before which step, and when each of its tokens came."""

    due: float
    sent: float
    step: int
    times: list[float]


def work(plan: list[tuple[int, int, int]]) -> tuple[float, ...]:
    """What a step has to do whose plan is [(request, tokens computed before, tokens to compute now), ...].

    Once whatever a step takes, such as reading the weights; the tokens; the context whose keys and values are read; and
    the pairs of query and key that attention looks at.
    """
    return (1, sum(n for *_, n in plan), sum(start + n for _, start, n in plan),
            sum(n * (start + (n + 1) / 2) for _, start, n in plan))


def price(weights, plan) -> float:
    """The time that a step takes: its `work`, weighed."""
    return sum(weight * amount for weight, amount in zip(weights, work(plan)))


class Simulator:
    """The engine without its model. A step takes the sum of `weights` times its `work`.

    targets: of each request, for the first token and for the others; swap: what moving a block to main memory or back
    takes; still: (when it once stands still, for how long); limits are those of `Scheduler`.
    """

    def __init__(self, weights, pool: BlockPool, targets=(None, None), swap=0.0, still=(math.inf, 0), **limits):
        self.weights, self.targets, self.swap, self.still = weights, targets, swap, still
        self.now, self.plans, self.num_moved = 0.0, [], 0
        self.scheduler = Scheduler(pool, **limits, clock=lambda: self.now)

    def add(self, ids, job, **more):
        """What is known of the job is its prompt and, if `max_tokens` is not given, the length of its answer."""
        ttft_target, itl_target = self.targets
        more = {"max_tokens": job.output, "params": job, **more}
        return self.scheduler.add(Request(ids, ttft_target=ttft_target, itl_target=itl_target, **more))

    def step(self) -> list[Request]:
        """Those that got a token."""
        plan, moved = self.scheduler.schedule(), sum(map(len, self.scheduler.pool.take_swaps()))
        self.plans.append([(request.arrival, request.num_computed, n) for request, n in plan])
        self.now += price(self.weights, self.plans[-1]) + self.swap * moved
        self.num_moved += moved
        if self.now >= self.still[0]:
            self.now, self.still = self.now + self.still[1], (math.inf, 0)
        sampled = [request for request, n in plan if self.scheduler.advance(request, n)]
        for request in sampled:
            request.tokens.append(-1 - request.arrival)  # whatever it says: nobody's prompt has it
            if request.num_output == request.params.output:
                self.scheduler.finish(request, "stop")
        return sampled


class Engine:
    """An LLM behind the same face. Its clock runs only while it steps, so nobody waits for the next arrival; with `weights`
    it is the simulator's.
    """

    def __init__(self, llm: LLM, weights=None):
        self.llm, self.weights, self.scheduler, self.now, self.plans, self.seconds = llm, weights, llm.scheduler, 0.0, [], []

    def add(self, ids, job):
        return self.llm.add_request(ids, SamplingParams(temperature=0, max_tokens=job.output, ignore_eos=True))

    def step(self) -> list[Request]:
        with book.Timer() as t:
            sampled = self.llm.step()
        self.plans.append([(request.arrival, request.num_computed - n, n) for request, n in self.llm._plan])
        self.seconds.append(t.seconds)
        self.now += price(self.weights, self.plans[-1]) if self.weights else t.seconds
        return sampled


def serve(server: Simulator | Engine, jobs: list, clients: int | None = None, system=()) -> list[Record]:
    """A Record for each job: sent when it is due and, in a closed loop, when one of so many clients is free to send it.

    jobs: whatever has the fields of `book.Arrival`; system: tokens with which every prompt begins.
    """
    free, records, whose = [0.0] * (clients or len(jobs)), [], {}  # a heap: when each client became free
    while len(records) < len(jobs) or server.scheduler.has_work():
        if not server.scheduler.has_work():
            server.now = max(server.now, jobs[len(records)].at, free[0])
        while len(records) < len(jobs) and free and max(jobs[len(records)].at, free[0]) <= server.now:
            job = jobs[len(records)]
            request = server.add([*system, *book.token_ids(job.prompt, job.text, 1000)], job)
            request.arrived = request.last_token = job.at  # it came during the step
            records.append(Record(job.at, max(job.at, heapq.heappop(free)), len(server.plans), []))
            whose[request] = records[-1]
        for request in server.step():
            whose[request].times.append(server.now)
            if request.is_over:
                heapq.heappush(free, server.now)
    return records
