"""A discrete-event simulator: the engine's own queue and block pool, and instead of the model a formula for seconds.

`serve` sends requests to a `Simulator`, or to the `Engine` itself, and writes down when the tokens came. Chapter 03 holds
one against the other. Times are in whatever unit the formula has. `run` is `serve` as chapters 07 and 08 use it.
"""

import heapq
import math
from itertools import pairwise
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

    @property
    def ttft(self) -> float:
        """Time to first token, from when it was due."""
        return self.times[0] - self.due


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

    def add(self, ids, job):
        """What is known of the job: its prompt, the length of its answer, and its tenant if it has one."""
        ttft_target, itl_target = self.targets
        return self.scheduler.add(Request(ids, job.output, params=job, tenant=getattr(job, "tenant", None),
                                          ttft_target=ttft_target, itl_target=itl_target))

    def step(self) -> list[Request]:
        """Those that got a token."""
        plan, moved = self.scheduler.schedule(), sum(map(len, self.scheduler.pool.take_moves()))
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
        llm.overlap = False  # on a GPU it is on, but the simulator plans a step only when it knows the last one's tokens

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
            request.arrival_time = request.last_token_time = job.at  # it came during the step
            records.append(Record(job.at, max(job.at, heapq.heappop(free)), len(server.plans), []))
            whose[request] = records[-1]
        for request in server.step():
            whose[request].times.append(server.now)
            if request.is_over:
                heapq.heappush(free, server.now)
    return records


class Run(NamedTuple):
    """Jobs that were served: a record of each, and the server, or whatever has its `plans` and `now`."""

    jobs: list
    records: list[Record]
    server: Simulator | Engine

    @property
    def rows(self) -> int:
        """Tokens computed, over all steps."""
        return sum(n for plan in self.server.plans for *_, n in plan)

    @property
    def throughput(self) -> float:
        """Tokens out per unit of time."""
        return sum(len(record.times) for record in self.records) / self.server.now

    @property
    def longest_gap(self) -> float:
        """The longest time from one token to the next."""
        return max(later - earlier for record in self.records for earlier, later in pairwise(record.times))

    def waits(self, which=lambda job: True) -> list[float]:
        """Times to first token of those jobs."""
        return [record.ttft for job, record in zip(self.jobs, self.records) if which(job)]

    def experience(self, first: float, reads: float) -> float:
        """Mean of `book.experience`, %."""
        total = sum(book.experience(record.due, record.times, first, reads) for record in self.records)
        return 100 * total / len(self.records)


# Chapters 07 and 08. What a step takes, in steps of one token: 1 for reading the weights, and 1 / 64 more for each token.
STEP = (1, 1 / 64, 0, 0)
PLACES = 16  # requests that run at once


def run(jobs: list, budget: int = 64, policy="fcfs", swap: float | None = None) -> Run:
    """Serve jobs in `PLACES` places and steps of `STEP`, with memory for all of them and nothing reused.

    budget: tokens in a step; swap: what moving a block to main memory or back takes, None to compute it again
    """
    pool = BlockPool(4096, 16, prefix_caching=False, num_host_slots=8192 if swap else 0)
    server = Simulator(STEP, pool, swap=swap or 0.0, policy=policy, max_batch_tokens=budget,
                       max_batch_requests=PLACES, max_model_len=1024)
    return Run(jobs, serve(server, jobs), server)
