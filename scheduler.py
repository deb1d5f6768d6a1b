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

                     add                 schedule                    advance, append
        (client) ───────────► waiting ───────────────► running ───────────────────────────► finished
                                 ▲                        │
                                 └──── preempt: blocks freed, num_computed = 0, tokens kept

Invariants (numbered as the tests quote them):
  1. 0 <= num_computed <= len(tokens); a step computes (tokens + drafts)[num_computed : num_computed + n], n >= 1.
  2. A request samples in a step exactly when that step brings it to len(tokens), and once more for each draft accepted.
  3. The block table covers num_computed + n tokens before the step runs.
  7. The n of a step add up to at most the token budget; running requests <= their limit; running go before waiting.
     Nobody waits, shrinks or is preempted for a draft; no draft makes a step longer than `ridge` tokens.
  8. Nothing generated is ever lost.
  9. After the last request ends every block is free.

No torch here: this file and `cache.BlockPool` also drive simulators and the oracle test.

Survey A IV.A · B 3.2.4 · C Request Scheduling: Inter-Request Scheduling, Intra-Request Scheduling.
Iteration-level batching: Orca (OSDI'22). Chunked prefill: Sarathi-Serve (arXiv:2403.02310).
"""

import copy
import heapq
from collections.abc import Callable
from itertools import count

from cache import BlockPool

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


class Request:
    """A list of tokens on its way through the engine. Its integers tell the whole story.

    `tokens` is the prompt followed by what was generated; `width` is how many running requests it will become (n samples
    of one prompt are one request until the prompt is computed); `root` separates prefix caches (see `BlockPool.match`).
    What the scheduler never looks at belongs to the engine.
    """

    def __init__(self, prompt: list[int], max_tokens: int = 16, *, priority: int = 0, width: int = 1, root=None,
                 reuse_prefix: bool = True, params=None):
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.max_tokens = max_tokens
        self.priority = priority  # smaller is more urgent
        self.width = width
        self.root = root
        self.reuse_prefix = reuse_prefix  # False: compute every prompt token, as prompt logprobs need
        self.params = params
        self.num_computed = 0
        self.max_drafts = 0  # how many drafts it would take in the next step; whoever drives the scheduler adapts it
        self.drafts: list[int] = []  # those of the step under way, empty between steps
        self.block_table: list[int] = []
        self.status = WAITING
        self.finish_reason: str | None = None  # "stop" | "length" | "abort" once finished
        self.arrival = -1  # the how-manieth request this was, the same for all its samples; set when added
        self.urgency: tuple = ()  # (policy's key, arrival, sample): smaller goes first; set when added
        self.num_preemptions = 0
        # The engine's:
        self.samples = [self]  # the requests this one was forked into, itself first
        self.sample_index = 0
        self.seed = 0
        self.acceptance = 1.0  # share of its drafts that come true, as far as one can tell
        self.logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[dict[int, float] | None] = []
        self.ended_by_token = False  # the last token is a stop token, and not part of the text
        self.detokenizer = self.edits = None
        self.error: str | None = None

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_behind(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def __repr__(self):
        return (f"Request({self.arrival}: {self.status}, {self.num_computed}/{len(self.tokens)} computed, "
                f"{self.num_output}/{self.max_tokens} generated)")


# A policy is a key function over requests: the smallest key is admitted first and preempted last. The key is taken once,
# when a request arrives; ties go to whoever came first. C Request Scheduling: Inter-Request Scheduling.
POLICIES: dict[str, Callable[[Request], object]] = {
    "fcfs": lambda request: 0,
    "priority": lambda request: request.priority,
    "shortest": lambda request: request.num_prompt + request.max_tokens,  # the exact length is unknown, this bounds it
}


class Scheduler:
    """Two queues over one `BlockPool`: `waiting`, in order of urgency, and `running`, in order of admission."""

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_batch_requests: int, max_model_len: int,
                 policy: str | Callable[[Request], object] = "fcfs", ridge: int = 0):
        if not callable(policy) and policy not in POLICIES:
            raise ValueError(f"policy: {policy!r} is not one of {', '.join(POLICIES)}, nor a function of a request")
        if not 1 <= max_batch_requests <= max_batch_tokens:
            raise ValueError(f"max_batch_requests: must be from 1 to max_batch_tokens ({max_batch_tokens}), so that "
                             f"every running request can get a token in every step; got {max_batch_requests}")
        self.pool, self.policy = pool, POLICIES[policy] if isinstance(policy, str) else policy
        self.max_batch_tokens, self.max_batch_requests = max_batch_tokens, max_batch_requests
        self.max_model_len = max_model_len
        # Up to so many tokens a step takes no longer than for one, as it waits for the weights from memory (the ridge of
        # the roofline); beyond, each takes its time, and a draft costs what it could save.
        self.ridge = ridge
        self.running: list[Request] = []
        self._heap: list[tuple[tuple, Request]] = []  # waiting; holds aborted requests until they surface
        self.num_waiting = 0
        self._arrivals = count()
        self.num_preemptions = self.num_hit_tokens = 0

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
        request.arrival = next(self._arrivals)
        request.urgency = (self.policy(request), request.arrival, 0)
        try:
            self._enqueue(request)
        except TypeError:  # raised half-way through: undo
            self.num_waiting -= 1
            self._heap = [entry for entry in self._heap if entry[1] is not request]
            heapq.heapify(self._heap)
            raise ValueError(f"policy: its key {request.urgency[0]!r} can not be compared with the others'") from None
        return request

    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.running or self.num_waiting)

    @property
    def waiting(self) -> list[Request]:
        """The waiting requests, most urgent first. A copy: for looking at, not for the step."""
        return [request for _, request in sorted(self._heap) if request.status == WAITING]

    def schedule(self) -> list[tuple[Request, int]]:
        """Plan one step: [(request, n), ...], n tokens to compute for each; tables are extended to hold them.

        Running requests go first, those closest to catching up before the others: with the budget at least as large
        as the running limit, a long prompt can never make another request wait for its next token. What is left of the
        budget admits waiting requests in order of urgency.

        Survey A IV.A · B 3.2.4 · C Request Scheduling: Intra-Request Scheduling.
        """
        plan: dict[Request, int] = {}
        budget, preempted = self.max_batch_tokens, False
        for request in sorted(self.running, key=lambda request: request.num_behind):
            if not budget:
                break
            if request.status != RUNNING:  # preempted a moment ago, for somebody above
                continue
            n = min(request.num_behind, budget)
            while self.pool.blocks_missing(request.block_table, request.num_computed,
                                           request.num_computed + n) > self.pool.num_free:
                victim = max(self.running, key=lambda request: request.urgency)
                self.preempt(victim)
                preempted = True
                budget += plan.pop(victim, 0)  # a victim that was already planned gives its share back
                if victim is request:
                    break
            else:
                self._plan(plan, request, n)
                budget -= n
        places = self.max_batch_requests - sum(request.width for request in self.running)
        # Whoever had to make room goes first again; admitting others now would only move the shortage to them.
        while budget and not preempted and (request := self._most_urgent()) and request.width <= places:
            blocks = self.pool.match(request.tokens, request.root) if request.reuse_prefix else []
            hit = len(blocks) * self.pool.block_size
            # Ask for room for the whole request as it stands, though only n tokens of it are computed now: admitting
            # a prompt that does not fit would preempt somebody in the middle of it. Cached blocks that lie in the free
            # list count as taken the moment they are adopted.
            room = self.pool.num_free - self.pool.num_free_in(blocks)
            if self.pool.blocks_for(len(request.tokens)) - len(blocks) > room:
                break
            self._dequeue(request)
            request.block_table = self.pool.adopt(blocks)
            request.num_computed = hit
            self.num_hit_tokens += hit
            n = min(request.num_behind, budget)
            self._plan(plan, request, n)
            budget -= n
            places -= request.width
        if self.ridge:
            self._plan_drafts(plan, budget)
        return list(plan.items())

    def advance(self, request: Request, n: int) -> bool:
        """Record that a step computed n tokens; publish the blocks this filled. True if the request now samples."""
        size = self.pool.block_size
        filled = range(request.num_computed // size, (request.num_computed + n) // size)
        request.num_computed += n
        for i in filled:
            self.pool.publish(request.block_table, i, request.tokens, request.root)
        return request.num_behind == 0

    def accept(self, request: Request) -> bool:
        """Whether the token just appended is the next draft, and so computed already: the request samples once more.

        If not, or if it has ended, the remaining drafts were for nothing: they are forgotten, and the blocks given back
        that only they needed. They never count as computed, so nothing of them was published.
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
            child.detokenizer = child.edits = None
            child.block_table = self.pool.fork(request.block_table)
            child.sample_index = i
            child.urgency = (*request.urgency[:2], i)  # right behind its siblings, before whoever came later
            self.running.append(child)
            request.samples.append(child)  # one list, shared by all of them
        return request.samples if width > 1 else [request]

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks away and queue it again. Its tokens stay; their K and V are recomputed."""
        self.running.remove(request)
        self.pool.release(request.block_table)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)

    def finish(self, request: Request, reason: str) -> None:
        """End a request, whichever queue it is in; a second call changes nothing."""
        if request.status == FINISHED:
            return
        if request.status == RUNNING:
            self.running.remove(request)
            self.pool.release(request.block_table)
        else:
            self.num_waiting -= 1  # its heap entry is dropped when it surfaces, or when such entries are the majority
            if len(self._heap) > 2 * self.num_waiting + 64:
                self._heap = [entry for entry in self._heap if entry[1].status == WAITING and entry[1] is not request]
                heapq.heapify(self._heap)
        request.status, request.finish_reason = FINISHED, reason

    def check(self) -> None:
        """Raise AssertionError unless all invariants hold between steps."""
        self.pool.check([request.block_table for request in self.running])
        assert sum(request.width for request in self.running) <= self.max_batch_requests
        for request in self.running:
            assert 0 <= request.num_computed <= len(request.tokens), request
            assert len(request.block_table) >= self.pool.blocks_for(request.num_computed), request
        assert not any(request.block_table for request in self.waiting)
        assert len(self.waiting) == self.num_waiting

    def _plan_drafts(self, plan, budget):
        """Raise n by up to `max_drafts` where a request catches up: with what everybody else has left, in equal shares.

        The last token a request may generate is never a draft: the step that accepts all before it samples it.
        """
        spare = min(budget, self.ridge - sum(plan.values()))
        takers = [request for request, n in plan.items()
                  if request.max_drafts and n == request.num_behind and request.width == 1]
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

    def _enqueue(self, request):
        request.status = WAITING
        self.num_waiting += 1
        heapq.heappush(self._heap, (request.urgency, request))

    def _most_urgent(self) -> Request | None:
        while self._heap and self._heap[0][1].status != WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def _dequeue(self, request):
        heapq.heappop(self._heap)
        self.num_waiting -= 1
        request.status = RUNNING
        self.running.append(request)
