"""Exercise 05: the schedule of one step

Decide who computes how many tokens in the next step. This is continuous batching and chunked prefill, whole.

Two functions: `schedule`, and `_fitting`, which looks whether a waiting request can be admitted.

The rules, in order:
  1. The tokens of a step add up to at most self.max_batch_tokens.
  2. Running requests first, those with the fewest tokens behind (`request.num_behind`) before the others; each gets
     min(what it is behind, what is left of the budget).
  3. If the pool has too few free blocks for that (`pool.blocks_missing(table, start, end)` against `pool.num_free`),
     preempt the least urgent running request (largest `request.urgency`) until there are enough, or until it was this
     request itself that had to go. A victim that was planned in this step already leaves the plan, and its tokens go
     back to the budget.
  4. Then waiting requests, most urgent first, while budget and places (self.max_batch_requests, counting `width`) last,
     but nobody in a step that preempted. First match the prefix; admit only if the pool has room for the whole request
     as it stands, where cached blocks that lie in the free list count as taken. Who does not fit stops the line.

You need: self.running (a list), self.preempt(request) (takes it out of there, and its blocks away), self._most_urgent()
(a waiting request or None), self._dequeue(request) (moves it to running), self._plan(plan, request, n) (plan is a dict
{request: n}; extends the request's block table and notes it), self.num_hit_tokens (add hits to it); of self.pool num_free,
block_size, blocks_for(number of tokens), blocks_missing, match(tokens, root), num_free_in(blocks), adopt(blocks) (takes
references, returns the table); of a request status, tokens, root, num_computed, num_behind, block_table, width. A request
whose `reuse_prefix` is False matches nothing. The engine's own `schedule` also serves deadlines, drafts, swapping and
policies by which a waiting request pushes out a running one. Leave these out: nobody here uses them.

The unit cases show for each step ([(request, n), ...], free blocks after it, preemptions so far).
"""

from scheduler import RUNNING, Request


def schedule(self) -> list[tuple[Request, int]]:
    """Plan one step: [(request, n), ...], n tokens to compute for each; tables are extended to hold them.

    Running requests go first, those closest to catching up before the others: with the budget at least as large
    as the running limit, a long prompt can never make another request wait for its next token. What is left of the
    budget admits waiting requests in order of urgency.

    Survey A IV.A · B 3.2.4 · C Request Scheduling: Intra-Request Scheduling.
    """
    raise NotImplementedError


def _fitting(self, request) -> list[int] | None:
    """The blocks that match a waiting request, or None if there is no room for the others that it needs."""
    raise NotImplementedError
