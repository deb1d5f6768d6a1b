"""Exercise 07: bug hunt: preemption

A bug hunt: five requests on a small pool, and one of them gets a strange answer.

One of the three functions below has a bug that somebody shipped: it kept its mouth shut in every test in which memory
was plentiful. Here there are 16 blocks of four tokens, and a step computes at most 5 tokens:

    request   0    1    2    3    4
    prompt   12    9   14    6    3    tokens
    output   18   16   12   10    9    tokens asked for
    arrives   0    0    1    1    9    at step

Find it and put it right; then say in BROKEN whose answer it spoiled, and in WHY what was wrong with that answer.
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


def preempt(self, request: Request) -> None:
    """Take a running request's blocks away and queue it again. Its tokens stay; their K and V are recomputed."""
    self.running.remove(request)
    self.pool.release(request.block_table)
    request.num_computed = 0
    request.num_prompt = len(request.tokens)  # its output is context now
    request.num_preemptions += 1
    self.num_preemptions += 1
    self._enqueue(request)
