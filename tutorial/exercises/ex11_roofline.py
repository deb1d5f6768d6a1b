"""What a step has to read, and what it has to compute.

`nanoserve.Roofline` watches the engine and asks this function before each step; from its two numbers come chapter 02's
tables, and the share of the roofline that `python nanoserve.py bench` reports. A step is a plan: a list of (request, n).
The request has `num_computed` tokens in the cache and computes n more, so that it sees keys from 0 on up to the last of
them. With these n it may catch up: its last row is then sampled, and goes through the head.

You need: self.body and self.head (weights that every row goes through, and those that only sampled rows go through: the
output layer, and what comes after attention in the last layer before it), self.weight_bytes (bytes of one weight),
self.kv_bytes (bytes of one token's keys and values, all layers), self.per_pair (FLOPs for one query and one key, all heads
and layers); of a request num_computed and num_behind, the tokens it still has to compute before it can sample. Nobody here
has drafts, for which the engine's own function has one more term.
"""

import math

from exercises import engine, prompt
from nanoserve import Roofline
from scheduler import Request

TITLE = "bytes and FLOPs of a step"
CHAPTER, KIND = "ch02_roofline.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 20, 2, 4
MODULE, NAMES = "nanoserve", ("Roofline.cost",)
HEADER = "from nanoserve import Request\n"
HINTS = (
    "Which of the two numbers grows with the tokens of the step, which with the requests' contexts, which with neither?",
    "Weights are read once, however many tokens the step has: that is why a batch pays. Caches are read once per request.",
    "A request samples if n == request.num_behind. A chunk that is not the last one does nothing in the head.",
    "The query at position p sees the keys 0 .. p, so p + 1 of them. Positions are num_computed .. num_computed + n - 1; "
    "their sum is n * num_computed + n * (n + 1) / 2.",
)
MUTANTS = {
    "reads the weights for every token": (("self.weight_bytes + context", "self.weight_bytes * tokens + context"),),
    "reads the cache for every query": (
        ("context = sum(request.num_computed + n for", "context = sum(n * (request.num_computed + n) for"),),
    "forgets what the step itself writes": (("sum(request.num_computed + n for", "sum(request.num_computed for"),),
    "lets queries see the future": (("n * request.num_computed + n * (n + 1) // 2", "n * (request.num_computed + n)"),),
    "puts every row through the head": (("self.head * sampled", "self.head * tokens"),),
    "samples every chunk": (("sum(max(0, n - request.num_behind + 1) for request, n in plan)", "len(plan)"),),
    "counts a multiply and an add as one": (("2 * (self.body", "(self.body"),),
}
ENGINE = {"max_batch_tokens": 16}
REQUESTS = [(arrives, prompt(length, arrives + length), {"temperature": 0, "max_tokens": output})
            for arrives, length, output in ((0, 40, 12), (0, 3, 20), (2, 21, 9), (9, 1, 12), (12, 30, 6))]
COUNTERS = ("steps", "computed_tokens", "bytes", "FLOPs")
EFFECT = ("steps", "bytes", "FLOPs", "FLOPs per byte")


def before_step(llm):
    """Two rooflines watch, from the first step on. At a rate of infinity FLOPs take no time, and what is left is bytes."""
    if not hasattr(llm, "rooflines"):
        llm.rooflines = Roofline(llm, 1.0, math.inf), Roofline(llm, math.inf, 1.0)


def measure(llm, counters: dict) -> dict:
    """What they have seen."""
    moved, flops = (roofline.seconds for roofline in llm.rooflines)
    return {"bytes": int(moved), "FLOPs": int(flops), "FLOPs per byte": round(flops / moved, 2)}


def cases():
    """(call, value, likely cause)"""
    roofline = Roofline(engine(), 1.0, 1.0)
    sizes = {"body": 1000, "head": 200, "weight_bytes": 2, "kv_bytes": 10, "per_pair": 40}
    vars(roofline).update(sizes)

    def cost(*step):
        """A step in which requests with so many tokens, of which so many are computed, compute n more."""
        plan = []
        for length, computed, n in step:
            plan.append((Request([1] * length), n))
            plan[-1][0].num_computed = computed
        shown = ", ".join(f"{n} of {length} tokens after {computed}" for length, computed, n in step)
        return f"{shown}; {sizes}", roofline.cost(plan)

    yield *cost((1, 0, 1)), "one token: every weight read once, two FLOPs each, and one key to see"
    yield *cost((100, 99, 1)), "decoding: one query sees 100 keys, and its cache is read once"
    yield *cost((100, 99, 1), (50, 49, 1)), "two requests share one reading of the weights, but each has its own cache"
    yield *cost((8, 0, 8)), "a whole prompt: query i sees i + 1 keys, and only the last row goes through the head"
    yield *cost((20, 0, 8)), "a chunk that is not the last samples nothing: no FLOPs in the head"
    yield *cost((20, 12, 8)), "the last chunk: its queries see what was computed before as well"
    yield *cost((20, 8, 5), (60, 59, 1), (3, 0, 3), (90, 89, 1)), "all at once: four sums over the requests"
    yield "no requests", roofline.cost([])[1] == 0, "nothing to compute"
