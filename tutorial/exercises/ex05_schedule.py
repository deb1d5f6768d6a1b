"""Decide who computes how many tokens in the next step. This is continuous batching and chunked prefill, whole.

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

from cache import BlockPool
from exercises import prompt
from scheduler import Request, Scheduler

TITLE = "the schedule of one step"
CHAPTER, KIND = "ch07_batching.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 60, 4, 5
MODULE, NAMES = "scheduler", ("Scheduler.schedule", "Scheduler._fitting")
HEADER = "from scheduler import RUNNING, Request\n"
HINTS = (
    "Keep `plan` as a dict {request: n} and `budget` as what is left. Write rules 1 and 2 first: the unit cases come in "
    "this order.",
    "A request that was preempted for somebody earlier in the loop has status != RUNNING: skip it.",
    "Python's while/else is made for rule 3: the else branch runs when the loop ended without `break`, so plan there.",
    "Rule 4's room is pool.num_free - pool.num_free_in(blocks); what must fit is pool.blocks_for(len(request.tokens)) - "
    "len(blocks). After self._dequeue: block_table = pool.adopt(blocks), num_computed = the tokens they hold.",
)
MUTANTS = {
    "serves those farthest behind first": (
        ("key=lambda request: request.num_behind)", "key=lambda request: -request.num_behind)"),),
    "preempts the most urgent": (("victim = max(", "victim = min("),),
    "admits in a step that preempts": (("while budget and not preempted and", "while budget and"),),
    "counts cached blocks as room": (("self.pool.num_free - self.pool.num_free_in(blocks)", "self.pool.num_free"),),
    "asks for room for the chunk alone": (
        ("self.pool.blocks_for(length) - len(blocks) > room",
         "self.pool.blocks_for(min(len(request.tokens), 8)) - len(blocks) > room"),),
    "never looks for a prefix": (("self.pool.match(request.tokens, request.root) if request.reuse_prefix else []", "[]"),),
}
LONG = [i * 7 % 64 for i in range(33)]
ENGINE = {"blocks": 18, "max_batch_tokens": 8, "max_batch_requests": 5, "policy": "priority"}
REQUESTS = [(arrives, tokens, {"temperature": 0, "max_tokens": output, "priority": priority})
            for arrives, tokens, output, priority in (
                (0, LONG, 10, 7), (4, [*prompt(3, 3), 3], 4, 5), (7, [*LONG[:3], 0], 4, 7), (8, [*prompt(5, 1), 1], 4, 4),
                (8, [*LONG[:14], 2], 8, 2), (10, [*prompt(30, 5), 5], 12, 2), (12, [*LONG[:5], 4], 12, 5))]
REQUESTS.append((13, [9, 9, 8, 7], {"temperature": 1.2, "seed": 7, "n": 2, "max_tokens": 12, "priority": 6}))
COUNTERS = ("steps", "computed_tokens", "hit_tokens", "preemptions", "first_token_at")
EFFECT = ("steps", "preemptions", "hit_tokens", "first_token_at", "longest_gap")


def step(s, token=7):
    """Schedule and compute one step. What was planned, and what is left of the pool."""
    plan = s.schedule()
    shown = [(request.arrival, n) for request, n in plan]
    for request, n in plan:
        if s.advance(request, n):
            for sample in s.fork(request):
                sample.tokens.append(token)
                if sample.num_output >= sample.max_tokens:
                    s.finish(sample, "length")
    s.check()
    return shown, s.pool.num_free, s.num_preemptions


def make(*requests, blocks=40, budget=8, places=4, size=2):
    """A scheduler with requests given as (prompt, max_tokens). Smaller priority is more urgent."""
    s = Scheduler(BlockPool(blocks + 1, size), max_batch_tokens=budget, max_batch_requests=places, max_model_len=100,
                  policy="priority")
    for ids, max_tokens in requests:
        s.add(Request(ids, max_tokens))
    return s


def cases():
    """(call, value, likely cause)"""
    s = make(([1] * 5, 3))
    yield "a prompt of 5, budget 8", [step(s) for _ in range(4)], "the whole prompt in one step, then one token a step"
    s = make(([1] * 20, 2))
    yield "a prompt of 20, budget 8", [step(s) for _ in range(4)], "chunks of 8, 8, 4: what is left of the budget"
    s = make(([1] * 3, 4), ([2] * 20, 2), ([3] * 2, 3))
    yield "prompts of 3, 20 and 2", [step(s) for _ in range(7)], "fewest tokens behind first, so that decoding never waits"
    s = make(([1] * 3, 4), ([2] * 20, 2), budget=4)
    trace = [step(s)]
    s.running.reverse()
    yield ("a prompt of 20 stands before one that decodes, budget 4", trace + [step(s) for _ in range(3)],
           "whatever order self.running is in, the fewest tokens behind go first")
    s = make(*(([i] * 2, 3) for i in range(6)), places=4)
    yield "six requests, four places", [step(s) for _ in range(6)], "at most max_batch_requests run at once"
    s = make(([1] * 6, 8), ([2] * 6, 8), ([3] * 6, 8), blocks=11, budget=16)
    yield "three that grow out of eleven blocks", [step(s) for _ in range(20)], (
        "the least urgent goes; nobody is admitted in a step that preempts; a planned victim's tokens go back to the budget")
    s = make(([1] * 4, 9), ([2] * 4, 9), ([3] * 15, 4), blocks=14, budget=5, places=3)
    yield "a long prompt among two that grow", [step(s) for _ in range(26)], "a half computed prompt can be preempted too"
    s, trace = make(blocks=4, budget=3, places=3, size=4), []
    for ids, max_tokens, priority in (([1] * 2, 8, 9), ([2], 8, 5), ([3] * 8, 1, 1)):
        s.add(Request(ids, max_tokens, priority=priority))
        trace.append(step(s))
    yield "a planned victim", trace + [step(s) for _ in range(8)], "the victim leaves the plan, and its token goes to others"
    s = make(blocks=4)
    for ids, max_tokens, priority in (([1] * 3, 6, 1), ([2] * 3, 6, 9)):
        s.add(Request(ids, max_tokens, priority=priority))
    trace = [step(s), step(s)]
    s.add(Request([3], 1, priority=5))
    yield ("a small one waits while others make room", trace + [step(s) for _ in range(8)],
           "nobody is admitted in a step that preempts")
    s = make((list(range(8)), 1))
    step(s)
    s.add(Request(list(range(8)) + [9], 2))
    yield "a prompt of 9 whose first 8 are cached", [step(s), s.num_hit_tokens], "match first, then count what is left"
    s.add(Request(list(range(8)) + [9], 2, reuse_prefix=False))
    yield "the same, with reuse_prefix False", [step(s), s.num_hit_tokens], "who wants every token computed matches nothing"
    s = make((list(range(12)), 1), blocks=7, budget=20)
    step(s)
    s.add(Request([5] * 2, 9))
    step(s)
    s.add(Request(list(range(12)) + [9] * 2, 1))
    yield "a hit in free blocks, little room", [step(s) for _ in range(12)], "cached blocks in the free list count as taken"
    s = make(([1] * 4, 7), ([2] * 12, 2), blocks=7, budget=6)
    yield "a prompt that fits only by its first chunk", [step(s) for _ in range(14)], "ask for room for the whole request"
    s = make(([1] * 2, 5), places=4)
    s.add(Request([2] * 3, 2, width=4))
    yield "four samples of one prompt beside a runner", [step(s) for _ in range(8)], "a request takes `width` places"
