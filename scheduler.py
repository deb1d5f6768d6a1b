"""The queue: who computes how many tokens next.

There is no prefill phase and no decode phase. A request is a list of tokens, the cache holds keys and values for the
first `num_computed` of them, and every step hands out a budget of tokens that brings requests closer to

    num_computed == len(tokens)

Whoever gets there has one sampled token appended, and is one behind again. A new prompt is far behind, a decoding
request is one behind, a preempted one is far behind once more. Chunked prefill, mixed batches, prefix hits and resuming
after preemption are all this one inequality, and nothing below asks which of them it is looking at.

A draft is a guess at a token that is not there yet, computed all the same: a request with k drafts computes k more
tokens in the same step, and samples k + 1 times instead of once. A guess that comes true is a token that is computed
already: the request has caught up again (`accept`). Drafts only fill what a step has left over, see `_plan_drafts`.

The engine may plan a step before it has read the token that the last one sampled. That token counts all the same
(`num_pending`), though nobody knows it yet, and the planned step computes it (see `advance`).

                     add                 schedule                    advance, append
        (client) ───────────► waiting ───────────────► running ───────────────────────────► finished
                                 ▲                        │
                                 └──── preempt: blocks freed, tokens kept; num_computed = 0, or blocks swapped out

A beam search goes in rounds: a hypothesis that is ready before the others is `park`ed, in neither queue. Once all are
ready, `branch` gives each its next token.

Invariants (numbered as the tests quote them; 4 to 6 are those of cache.py):
  1. 0 <= num_computed <= len(tokens); a step computes (tokens + drafts)[num_computed : num_computed + n], n >= 1; a pending
     token comes right after `tokens`, and there are no drafts then.
  2. A request samples in a step exactly when that step brings it to len(tokens), and once more for each draft accepted.
  3. The block table covers num_computed + n tokens before the step runs.
  7. The n of a step add up to at most the token budget; running requests <= their limit; running go before waiting.
     Nobody waits, shrinks or is preempted for a draft; no draft makes a step longer than `ridge` tokens.
  8. Nothing generated is ever lost.
  9. After the last request ends every block is free.
 10. A waiting request holds no block: either host slots hold all that it has computed, or it has computed nothing. A parked
     one holds nothing and has computed nothing.

No torch here: this file and `cache.BlockPool` also drive simulators and the oracle test.

Survey A IV.A · B 3.2.4 · C Request Scheduling: Inter-Request Scheduling, Intra-Request Scheduling.
Iteration-level batching: Orca (OSDI'22). Chunked prefill: Sarathi-Serve (arXiv:2403.02310).
"""

import copy
import heapq
import time
from collections.abc import Callable, Hashable
from itertools import count
from numbers import Real
from sys import float_info

from cache import BlockPool

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
PARKED = "parked"  # in neither queue and without blocks, until `branch` gives it new tokens


class Request:
    """A list of tokens on its way through the engine. Its integers tell the whole story.

    `tokens` is the prompt followed by what was generated; `width` is how many running requests it will become (n samples
    of one prompt are one request until the prompt is computed); `root` separates prefix caches (see `BlockPool.match`).
    `tenant` is whom its service is charged to (see `Fair`). Seconds: from arrival to the first token (`ttft_target`),
    between two tokens (`itl_target`), from arrival to the end (`deadline`).
    """

    def __init__(self, prompt: list[int], max_tokens: int = 16, *, priority: int = 0, width: int = 1, root=None,
                 reuse_prefix: bool = True, params=None, tenant: Hashable = None, ttft_target: float | None = None,
                 itl_target: float | None = None, deadline: float | None = None):
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.max_tokens = max_tokens
        self.priority = priority  # smaller is more urgent
        self.width = width
        self.root = root
        self.reuse_prefix = reuse_prefix  # False: compute every prompt token, as prompt logprobs need
        self.params = params
        self.tenant = tenant
        self.ttft_target, self.itl_target, self.deadline = ttft_target, itl_target, deadline
        self.has_targets = (ttft_target, itl_target, deadline) != (None, None, None)
        self.num_computed = 0
        self.num_pending = 0  # 1: a token behind `tokens` has been sampled, but nobody has read it yet (see `advance`)
        self.max_drafts = 0  # how many drafts it would take in the next step; the engine adapts it
        self.drafts: list[int] = []  # those of the step under way, empty between steps
        self.block_table: list[int] = []
        self.host_slots: list[int] = []  # while it waits: where the blocks of its num_computed tokens were swapped to
        self.status = WAITING
        self.finish_reason: str | None = None  # "stop" | "length" | "abort" once finished
        self.arrival = -1  # its number in order of arrival, the same for all its samples; set when added
        self.arrival_step = -1  # how many steps the scheduler had planned by then; set when added
        self.urgency: tuple = ()  # (policy's key, arrival, sample): smaller goes first; set when added
        self.num_preemptions = 0
        self.arrival_time = self.last_token_time = 0.0  # by the scheduler's clock; equal until the first token has come
        self.in_time = True  # no target was missed so far
        self.expired = False  # its deadline ended it
        # The engine's own:
        self.samples = [self]  # the requests this one was forked into, itself first
        self.search = None  # the beam search whose hypotheses the samples are
        self.cumulative_logprob: float | None = None  # of its output, once the search is over
        self.sample_index = 0
        self.seed = 0
        self.stop_ids = frozenset()  # tokens that end the output
        self.may_overlap = False  # its next token can be sampled before the last one was read
        self.acceptance = 0.75  # share of its drafts that come true, a guess until some have been tried
        self.logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self.detokenizer = self.edits = None
        self.error: str | None = None
        self.failures: dict[int, str] = {}  # {num_tokens: why nothing could be sampled after so many}

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_behind(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def ended_by_token(self) -> bool:
        """Whether its last token is what stopped it, and so not part of the text."""
        return self.finish_reason == "stop" and self.tokens[-1] in self.stop_ids

    @property
    def is_over(self) -> bool:
        """Whether all its samples have ended."""
        return all(sample.status == FINISHED for sample in self.samples)

    def __repr__(self):
        return (f"Request({self.arrival}: {self.status}, {self.num_computed}/{len(self.tokens)} computed, "
                f"{self.num_output}/{self.max_tokens} generated)")


class Policy:
    """Who goes first: the smallest `key` is admitted first and preempted last; ties go to whoever came first.

    A plain function of a request will do for a policy: it is the key, taken once, when a request arrives. More is needed
    where the order changes as requests are served. To keep the queue cheap, what may change is limited:
      * The key of a waiting request stays. With `rekeys` that of a running one may change.
      * Requests that are overtaken together wait in one `lane`. The `level` of a lane goes before any key, and may grow
        at any time but never shrink: then an entry that is out of date comes up too early, is seen to be, and put back.
    This one is first come, first served. Survey A VI.C · B 3.2.4 · C Request Scheduling: Inter-Request Scheduling.
    """

    uses_priority = False  # a server refuses priorities that make no difference
    rekeys = False  # take the key anew whenever a running request is compared with others
    outranks: Callable[[Request, Request], bool] | None = None  # may this waiting one take the place of that running one?

    def key(self, request: Request):
        """Smaller goes first, among the requests of a lane."""
        return 0

    def lane(self, request: Request) -> Hashable:
        """Which requests `request` rises and falls with."""
        return None

    def level(self, lane: Hashable):
        """Smaller goes first, among lanes."""
        return 0

    def admitted(self, request: Request, is_empty: bool) -> None:
        """`request` has left the queue to run, for the first time or again; is_empty: it was the last one there."""

    def sampled(self, request: Request, n: int) -> None:
        """A step has generated n tokens for `request`."""


class Aging(Policy):
    """Smaller `rank` first, but `patience` steps of waiting make up for one rank, so that nobody waits for ever.

    A rank that improves while one waits, rank - (now - arrival) / patience, orders requests as the constant
    rank + arrival / patience does, `now` being the same for all: nothing has to be looked at again as time goes by.
    """

    def __init__(self, patience: float = 100):
        self.patience = _number("patience", patience, 1e-9)

    def rank(self, request: Request) -> float:
        """Smaller goes first."""
        raise NotImplementedError

    def key(self, request):
        return self.patience * self.rank(request) + request.arrival_step


class Priority(Aging):
    """Smaller `priority` first. One level is worth `patience` steps of waiting."""

    uses_priority = True

    def rank(self, request):
        return request.priority


class Shortest(Aging):
    """Fewest tokens first, prompt and output. A token is worth `patience` steps of waiting.

    `predictor(request)` says how many tokens of output to expect, and is asked once; without one it is max_tokens, which
    bounds them. Survey C Decoding Length Prediction.
    """

    def __init__(self, predictor: Callable[[Request], float] = lambda request: request.max_tokens, patience: float = 1):
        super().__init__(patience)
        if not callable(predictor):
            raise ValueError(f"predictor: must be a function of a request, got {predictor!r}")
        self.predictor = predictor

    def rank(self, request):
        return request.num_prompt + _number("policy: what its predictor returns", self.predictor(request), 0)


class MLFQ(Aging):
    """Skip-join multi-level feedback queue, for lengths that nobody can predict (FastServe, arXiv:2305.05920).

    Level i is for requests of up to quantum * 2**i tokens. A prompt joins the level of its length, skipping those above;
    a request that outgrows its level drops to the next. Each `patience` steps of waiting lift it by one, and a request
    that is decoding makes room for one that is a whole level above it.
    """

    rekeys = True

    def __init__(self, quantum: int = 64, levels: int = 8, patience: float = 100):
        super().__init__(patience)
        self.quantum, self.levels = _number("quantum", quantum, 1, int), _number("levels", levels, 1, int)

    def rank(self, request):
        return min(((len(request.tokens) - 1) // self.quantum).bit_length(), self.levels - 1)

    def key(self, request):
        return super().key(request) + request.num_output  # a step that gave it a token was none of waiting

    def outranks(self, waiting, running):
        return self.key(running) - self.key(waiting) >= self.patience


class Fair(Policy):
    """The tenant that was served least goes first: a virtual token counter for each (VTC, arXiv:2401.00588).

    A counter grows by `input_weight` per prompt token on admission, by `output_weight` per token generated; what is
    computed again after preemption costs nothing. Who comes back after a while has saved nothing up: its counter is lifted
    to `floor`, that of the tenant admitted last; no waiting tenant's is less. (The paper lifts to the least of them, which
    at an admission is the same.) So waiting tenants' counters stay within U of each other, the most that a tenant
    can be served without another admission: a longest prompt, and longest outputs in all places of the batch. Two tenants
    with requests waiting get service that differs by at most 2 U, over any time. Survey A VI.C · C Miscellaneous Areas.
    """

    def __init__(self, input_weight: float = 1, output_weight: float = 2):
        self.input_weight = _number("input_weight", input_weight, 0)
        self.output_weight = _number("output_weight", output_weight, 0)
        self.counters: dict[Hashable, float] = {}  # a tenant that is not here is at the floor
        self.floor, self._prune_at = 0, 64

    def lane(self, request):
        return request.tenant

    def level(self, lane):
        """The counter of the tenant `lane`, lifted to the floor."""
        return max(self.counters.get(lane, 0), self.floor)

    def admitted(self, request, is_empty):
        """Lift the floor to the tenant's counter, then the counter by the prompt; if nobody waits now, the floor as well."""
        self.floor = self.level(request.tenant)
        is_first = not request.num_preemptions and not request.num_output  # else it was preempted, or parked
        cost = self.input_weight * request.num_prompt if is_first else 0
        self.counters[request.tenant] = self.floor + cost
        if is_empty:
            self.floor += cost
        if len(self.counters) > self._prune_at:  # forget tenants that the floor has overtaken, or they would pile up
            self.counters = {tenant: counter for tenant, counter in self.counters.items() if counter > self.floor}
            self._prune_at = 2 * len(self.counters) + 64

    def sampled(self, request, n):
        """Count n tokens of output."""
        self.counters[request.tenant] = self.counters.get(request.tenant, 0) + n * self.output_weight


def is_number(value, low: float = -float_info.max, high: float = float_info.max, kind=(int, float)) -> bool:
    """Whether a value is a number of this kind from low to high; not True or False, not infinite, not NaN."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def _number(name: str, value: float, least: float, kind=Real) -> float:
    if not is_number(value, least, kind=kind):
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}: must be {what} of at least {least:g}, got {value!r}")
    return value


POLICIES = {"fcfs": Policy, "priority": Priority, "shortest": Shortest, "mlfq": MLFQ, "fair": Fair}


class Scheduler:
    """Two queues over one `BlockPool`: `waiting`, in order of urgency, and `running`, in order of admission.

    policy: a name in POLICIES, a `Policy`, or a function of a request; clock: seconds, for targets and deadlines
    prefers_swap: (tokens, blocks) -> whether to swap so many blocks out and in rather than to compute the tokens again
    """

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_batch_requests: int, max_model_len: int,
                 policy: str | Policy | Callable[[Request], object] = "fcfs", ridge: int = 0,
                 clock: Callable[[], float] = time.monotonic,
                 prefers_swap: Callable[[int, int], bool] = lambda tokens, blocks: True):
        if isinstance(policy, str) and policy in POLICIES:
            policy = POLICIES[policy]()
        elif callable(policy) and not isinstance(policy, type):
            function, policy = policy, Policy()
            policy.key, policy.uses_priority = function, True  # for all we know
        if not isinstance(policy, Policy):
            raise ValueError(f"policy: {policy!r} is not one of {', '.join(POLICIES)}, a Policy or a function of a request")
        if not 1 <= max_batch_requests <= max_batch_tokens:
            raise ValueError(f"max_batch_requests: must be from 1 to max_batch_tokens ({max_batch_tokens}), so that "
                             f"every running request can get a token in every step; got {max_batch_requests}")
        self.pool, self.policy, self.clock, self.prefers_swap = pool, policy, clock, prefers_swap
        self.max_batch_tokens, self.max_batch_requests = max_batch_tokens, max_batch_requests
        self.max_model_len = max_model_len
        # Up to so many tokens, a step takes no longer than for one: it waits for the weights to come from memory (the ridge
        # of the roofline). Beyond, each token takes its time, and a draft costs what it could save.
        self.ridge = ridge
        self.running: list[Request] = []
        self._lanes: dict[Hashable, list[tuple[tuple, Request]]] = {}  # heaps of (urgency, request)
        self._heads: list[tuple] = []  # a heap of (level, urgency of who opened the lane, lane), one for each lane
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap; holds finished requests until they surface
        self._expired: list[Request] = []  # see `take_expired`
        self.num_waiting = self._num_gone = 0  # gone: ended while they waited, and still in a heap
        self._arrivals = count()
        self.num_steps = self.num_preemptions = self.num_hit_tokens = self.num_with_targets = self.num_in_time = 0
        self.num_swapped_out = self.num_swapped_in = self.num_swap_freed = 0  # blocks; freed: never swapped in

    def add(self, request: Request) -> Request:
        """Queue a request. One that could never finish is refused here with a ValueError that names the limit."""
        length, pool = request.num_prompt + request.max_tokens, self.pool
        if request.num_prompt < 1:
            raise ValueError("prompt: is empty; at least one token is needed to predict the next")
        if request.max_tokens < 1 or request.width < 1:
            raise ValueError(f"max_tokens and n must be at least 1, got {request.max_tokens} and {request.width}")
        if length > self.max_model_len:
            raise ValueError(f"prompt: {request.num_prompt} tokens and max_tokens={request.max_tokens} make {length}, "
                             f"more than max_model_len={self.max_model_len}")
        # The last token is sampled but never computed, hence the - 1.
        if pool.blocks_for(length - 1) > pool.num_usable:
            raise ValueError(f"prompt: {request.num_prompt} tokens and max_tokens={request.max_tokens} need "
                             f"{pool.blocks_for(length - 1)} KV blocks of {pool.block_size} tokens, the whole cache has "
                             f"{pool.num_usable}; lower max_tokens or raise kv_memory")
        if request.width > self.max_batch_requests:
            raise ValueError(f"n: {request.width} samples are more than max_batch_requests={self.max_batch_requests}")
        request.arrival, request.arrival_step = next(self._arrivals), self.num_steps
        request.urgency = (self.policy.key(request), request.arrival, 0)
        if request.urgency[0] != request.urgency[0]:
            raise ValueError("policy: its key is not a number (NaN), so it comes neither before nor after the others'")
        try:
            self._enqueue(request)
        except Exception as error:  # raised half-way through: undo
            self.num_waiting -= 1
            request.status = FINISHED
            self._sweep()
            if not isinstance(error, TypeError):  # the policy's own
                raise
            raise ValueError(f"policy: its key {request.urgency[0]!r} cannot be compared with the others'") from None
        request.arrival_time = request.last_token_time = self.clock()
        if request.deadline is not None:
            if len(self._deadlines) > 2 * (self.num_waiting + len(self.running)) + 64:
                self._deadlines = [entry for entry in self._deadlines if not entry[2].is_over]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.arrival_time + request.deadline, request.arrival, request))
        return request

    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.running or self.num_waiting)

    @property
    def waiting(self) -> list[Request]:
        """The waiting requests, most urgent first. A copy: for looking at, not for the step."""
        return self.first_waiting(self.num_waiting)

    def first_waiting(self, n: int) -> list[Request]:
        """The n most urgent waiting requests, without sorting them all: in a heap nobody comes before its parent."""
        first: list[Request] = []
        for *_, lane in sorted((self.policy.level(lane), opened, lane) for _, opened, lane in self._heads):
            heap = self._lanes[lane]
            reached = [(entry, 0) for entry in heap[:1]]  # each with its place in the heap
            while reached and len(first) < n:
                (_, request), i = heapq.heappop(reached)
                if request.status == WAITING:
                    first.append(request)
                for child in range(2 * i + 1, min(2 * i + 3, len(heap))):
                    heapq.heappush(reached, (heap[child], child))
        return first

    def schedule(self) -> list[tuple[Request, int]]:
        """Plan one step: [(request, n), ...], n tokens to compute for each; tables are extended to hold them.

        Running requests go first, those closest to catching up before the others: with the budget at least as large
        as the running limit, a long prompt can never make another request wait for its next token. What is left of the
        budget admits waiting requests in order of urgency.

        Survey A IV.A · B 3.2.4 · C Request Scheduling: Intra-Request Scheduling.
        """
        self.num_steps += 1
        self._expire()
        plan: dict[Request, int] = {}
        budget, preempted = self.max_batch_tokens, False
        for request in sorted(self.running, key=lambda request: request.num_behind):
            if not budget:
                break
            if request.status != RUNNING:  # preempted a moment ago, for somebody above
                continue
            if request.num_output + request.num_pending == request.max_tokens:  # it only waits for its last token to be read
                continue
            n = min(request.num_behind, budget)
            while self.pool.blocks_missing(request.block_table, request.num_computed,
                                           request.num_computed + n) > self.pool.num_free:
                victim = max(self.running, key=self._order)
                self.preempt(victim)
                preempted = True
                budget += plan.pop(victim, 0)  # a victim that was already planned gives its share back
                if victim is request:
                    break
            else:  # there are blocks enough, and it is still running
                self._plan(plan, request, n)
                budget -= n
        places = self.max_batch_requests - sum(request.width for request in self.running)
        # Whoever had to make room goes first again; admitting others now would only move the shortage to them.
        made_way: set[Request] = set()  # nobody is preempted and admitted again in one step
        while budget and not preempted and (request := self._most_urgent()) and request not in made_way:
            blocks = self._fitting(request) if request.width <= places else None
            if blocks is None:
                if not (victim := self._outranked(request)):
                    break
                self.preempt(victim)
                made_way.add(victim)
                budget, places = budget + plan.pop(victim, 0), places + victim.width
                continue
            hit = len(blocks) * self.pool.block_size
            self._dequeue(request)
            self.policy.admitted(request, not self.num_waiting)
            request.block_table = self.pool.adopt(blocks)
            self.num_hit_tokens += hit
            if request.host_slots:
                self._swap_in(request)
            request.num_computed = max(hit, request.num_computed)
            n = min(request.num_behind, budget)
            self._plan(plan, request, n)
            budget -= n
            places -= request.width
        if self.ridge:
            self._plan_drafts(plan, budget)
        return list(plan.items())

    def advance(self, request: Request, n: int, is_read: bool = True) -> bool:
        """Record that a step computed n tokens; publish the blocks this filled. True if the request now samples.

        With is_read=False the next step can be planned before the sampled token has been read: the request counts as one
        token longer from now on, and the caller calls `sampled` once the token is known.
        """
        size = self.pool.block_size
        filled = range(request.num_computed // size, (request.num_computed + n) // size)
        request.num_computed += n
        for i in filled:
            self.pool.publish(request.block_table, i, request.tokens, request.root)
        if request.num_behind:
            return False
        request.num_pending = 1
        if is_read:
            self.sampled(request)
        return True

    def sampled(self, request: Request) -> None:
        """Record that the sampled token is known; it is about to be appended."""
        request.num_pending = 0
        self.policy.sampled(request, request.width)
        if request.has_targets:
            self._time_token(request)

    def accept(self, request: Request) -> bool:
        """Whether the token just appended is the next draft, and so computed already: the request samples once more.

        If not, or if it has ended, the remaining drafts were for nothing: they are forgotten, and blocks that only they
        needed are given back. They never count as computed, so nothing of them was published.
        """
        if request.status == RUNNING and request.drafts and request.drafts[0] == request.tokens[-1]:
            del request.drafts[0]
            return self.advance(request, 1)
        if request.drafts:
            request.drafts = []
            self.pool.trim(request.block_table, request.num_computed)
        return False

    def fork(self, request: Request) -> list[Request]:
        """Split a request of width n that has computed its prompt into n requests that share its blocks."""
        width, request.width = request.width, 1
        for i in range(1, width):
            child = copy.copy(request)
            child.tokens, child.logprobs, child.num_preemptions = request.tokens.copy(), [], 0
            child.detokenizer, child.edits, child.failures = None, request.edits and request.edits.copy(), {}
            child.block_table = self.pool.adopt(request.block_table)
            child.sample_index = i
            child.urgency = (*request.urgency[:2], i)  # right behind its siblings, before whoever came later
            self.running.append(child)
            request.samples.append(child)  # one list, shared by all of them
        return request.samples if width > 1 else [request]  # one forked before is planned apart from its siblings

    def park(self, request: Request) -> None:
        """Take a request's place and blocks, if it runs: it has nothing to do until others have caught up."""
        if request.status == RUNNING:
            self.running.remove(request)
            self.pool.release(request.block_table)
            request.num_computed, request.status = 0, PARKED

    def branch(self, requests: list[Request], parents: list[Request], tokens: list[int]) -> None:
        """Make requests[i] a copy of parents[i] as it is now, followed by tokens[i]. All are samples of one request.

        It shares its parent's blocks, like a fork. One that is parked, or has a parked parent, queues to get blocks again.
        """
        states = [(parent.tokens + [token], parent.edits and parent.edits.copy(), parent.num_computed,
                   self.pool.adopt(parent.block_table)) for parent, token in zip(parents, tokens)]
        for request, state in zip(requests, states):
            self.pool.release(request.block_table)
            request.tokens, request.edits, request.num_computed, request.block_table = state
            if request.status != RUNNING or not request.block_table:
                self.pool.release(request.block_table)
                request.num_computed = 0
                self.park(request)
                self._enqueue(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks away and queue it again. Its tokens stay; their K and V are swapped to the host
        if there is room and that is cheaper, or else computed again.
        """
        self.running.remove(request)
        blocks = request.block_table[: self.pool.blocks_for(request.num_computed)]
        if self.pool.free_slots and self.prefers_swap(request.num_computed, len(blocks)):
            request.host_slots = self.pool.swap_out(blocks)
            self.num_swapped_out += len(request.host_slots)
        if not request.host_slots:
            request.num_computed = 0
        self.pool.release(request.block_table)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)

    def finish(self, request: Request, reason: str) -> None:
        """End a request, whichever queue it is in; a second call changes nothing."""
        if request.status == FINISHED:
            return
        status, request.status, request.finish_reason = request.status, FINISHED, reason
        if status == RUNNING:
            self.running.remove(request)
            self.pool.release(request.block_table)
        elif status == WAITING:
            self.num_swap_freed += len(request.host_slots)
            self.pool.free_slots += request.host_slots
            request.host_slots = []
            self.num_waiting -= 1  # its entry is dropped when it surfaces, or when such entries are the majority
            self._num_gone += 1
            if self._num_gone > self.num_waiting + 64:
                self._sweep()
        if request.has_targets:
            self._count_goodput(request)

    def take_expired(self) -> list[Request]:
        """Who was ended by a deadline since the last call."""
        expired, self._expired = self._expired, []
        return expired

    def check(self) -> None:
        """Raise AssertionError unless all invariants hold between steps."""
        slots = [slot for request in self.waiting for slot in request.host_slots]
        self.pool.check([request.block_table for request in self.running], slots)
        assert sum(request.width for request in self.running) <= self.max_batch_requests
        for request in self.running:
            assert 0 <= request.num_computed <= len(request.tokens), request
            assert len(request.block_table) >= self.pool.blocks_for(request.num_computed), request
        for request in self.waiting:
            assert not request.block_table and self.pool.blocks_for(request.num_computed) == len(request.host_slots), request
        assert not any(request.host_slots for request in self.running)
        assert len(self.waiting) == self.num_waiting
        assert sum(map(len, self._lanes.values())) == self.num_waiting + self._num_gone
        assert sorted(map(repr, self._lanes)) == sorted(repr(lane) for *_, lane in self._heads)

    def _time_token(self, request: Request) -> None:
        """Hold the token that is about to be appended against its target: the first against `ttft_target`, in seconds since
        the request arrived, any other against `itl_target`, since the token before it. None is no target, and just in time
        is in time. A request that misses one is not `in_time` any more, however fast its other tokens come.
        """
        now, target = self.clock(), request.itl_target if request.num_output else request.ttft_target
        request.in_time &= target is None or now - request.last_token_time <= target
        request.last_token_time = now

    def _count_goodput(self, request: Request) -> None:
        """Count a request that has ended and had targets or a deadline; in `num_in_time` too unless it was aborted, missed a
        target, or ended more than `deadline` seconds after it arrived, in a step that began before.
        """
        late = request.deadline is not None and self.clock() > request.arrival_time + request.deadline
        self.num_with_targets += request.width
        self.num_in_time += request.finish_reason != "abort" and request.in_time and not late

    def _plan_drafts(self, plan, budget):
        """Raise n by up to `max_drafts` where a request catches up: with what everybody else has left, in equal shares.

        The last token a request may generate is never a draft: the step that accepts all before it samples it.
        """
        spare = min(budget, self.ridge - sum(plan.values()))
        takers = [request for request, n in plan.items()
                  if spare > 0 and request.max_drafts and n == request.num_behind and request.width == 1]
        for i, request in enumerate(takers):
            end = len(request.tokens)
            room = (len(request.block_table) + self.pool.num_free) * self.pool.block_size - end
            share = -(-spare // (len(takers) - i))
            n = min(request.max_drafts, share, room, request.max_tokens - request.num_output - 1)
            if n > 0:
                self._plan(plan, request, plan[request] + n)
                spare -= n

    def _plan(self, plan, request, n):
        self.pool.extend(request.block_table, request.num_computed, request.num_computed + n)
        plan[request] = n

    def _order(self, request) -> tuple:
        """How urgent any request is, the smallest going first. Its key is taken anew where the policy `rekeys`."""
        if self.policy.rekeys:
            request.urgency = (self.policy.key(request), *request.urgency[1:])
        return (self.policy.level(self.policy.lane(request)), *request.urgency)

    def _fitting(self, request) -> list[int] | None:
        """The blocks that match a waiting request, or None if there is no room for the others that it needs."""
        blocks = self.pool.match(request.tokens, request.root) if request.reuse_prefix else []
        # Ask for room for the whole request as it stands, though only n tokens of it are computed now: admitting
        # a prompt that does not fit would preempt somebody in the middle of it. Cached blocks that lie in the free
        # list count as taken the moment they are adopted.
        room = self.pool.num_free - self.pool.num_free_in(blocks)
        length = len(request.tokens) + request.num_pending
        return None if self.pool.blocks_for(length) - len(blocks) > room else blocks

    def _outranked(self, request) -> Request | None:
        """Who should make way for a waiting request, if the policy wants that: the least urgent of those running.

        It must come after the request in order, or an inconsistent policy could let two push each other out for ever.
        """
        if not self.policy.outranks or not self.running:
            return None
        last = max(self.running, key=self._order)
        return last if self._order(last) > self._order(request) and self.policy.outranks(request, last) else None

    def _swap_in(self, request):
        """Copy what the prefix cache did not have from the host into new blocks, which others may then share again."""
        table, matched, size = request.block_table, len(request.block_table), self.pool.block_size
        self.pool.extend(table, matched * size, request.num_computed)
        self.pool.swap_in(request.host_slots, table[matched:])
        for i in range(matched, request.num_computed // size):
            self.pool.publish(table, i, request.tokens, request.root)
        self.num_swapped_in += len(table) - matched
        self.num_swap_freed += len(request.host_slots) - (len(table) - matched)
        request.host_slots = []

    def _expire(self):
        """End those past their deadlines, waiting or running: anything more would come too late."""
        while self._deadlines and self._deadlines[0][0] < self.clock():
            for request in heapq.heappop(self._deadlines)[2].samples:
                if request.status != FINISHED:
                    request.error = f"deadline: {request.deadline:g} seconds have passed since the request arrived"
                    request.expired = True
                    self.finish(request, "abort")
                    self._expired.append(request)

    def _enqueue(self, request):
        request.status = WAITING
        self.num_waiting += 1
        level, *urgency = self._order(request)
        lane = self.policy.lane(request)
        if lane not in self._lanes:
            self._lanes[lane] = []
            heapq.heappush(self._heads, (level, urgency, lane))
        heapq.heappush(self._lanes[lane], (request.urgency, request))

    def _most_urgent(self) -> Request | None:
        """The head of the lane of the least level. Levels are as old as the last look at them, and may have grown."""
        while self._heads:
            level, opened, lane = self._heads[0]
            heap = self._lanes[lane]
            if not heap:
                del self._lanes[lane]
                heapq.heappop(self._heads)
            elif heap[0][1].status != WAITING:
                heapq.heappop(heap)
                self._num_gone -= 1
            elif level < (now := self.policy.level(lane)):
                heapq.heapreplace(self._heads, (now, opened, lane))
            else:
                return heap[0][1]
        return None

    def _dequeue(self, request):
        heapq.heappop(self._lanes[self.policy.lane(request)])
        self.num_waiting -= 1
        request.status = RUNNING
        self.running.append(request)

    def _sweep(self):
        """Drop the entries of requests that wait no longer."""
        self._lanes = {lane: left for lane, heap in self._lanes.items()
                       if (left := [entry for entry in heap if entry[1].status == WAITING])}
        self._heads = [head for head in self._heads if head[2] in self._lanes]
        for heap in (self._heads, *self._lanes.values()):
            heapq.heapify(heap)
        self._num_gone = 0
