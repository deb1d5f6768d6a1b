"""Exercise 07: bug hunt: preemption

A bug hunt: five requests on a small pool, and one of them gets a strange answer.

One of the three functions below has a bug that somebody shipped: it kept its mouth shut in every test in which memory
was plentiful. Here there are 16 blocks of four tokens, and a step computes at most 5 tokens:

    request   0    1    2    3    4
    prompt   12    9   14    6    3    tokens
    output   18   16   12   10    9    tokens asked for
    arrives   0    0    1    1    9    at step

Find it and put it right; then say in BROKEN whose answer it spoiled, and in WHY what was wrong with that answer. (It shows
`schedule`: whoever means to write that, in exercise 05, does so before.)
"""

from scheduler import RUNNING, Request

BROKEN = None  # the number, from 0, of the request whose tokens come out wrong
WHY = ""  # in a sentence or two: what happens to it, and why to no other


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
    request.num_prompt = len(request.tokens)  # its output is context now
    self.pool.release(request.block_table)
    request.num_preemptions += 1
    self.num_preemptions += 1
    self._enqueue(request)
