"""A bug hunt: somebody is handed a part of somebody else's cache.

One of the three functions below was made simpler by someone who saw no need for a counter. It passed every test with
a large pool. Here nine requests were served on 18 blocks of four tokens. A prompt is an instruction (A, B or C, of two
blocks), mostly a question (Q or R, of two blocks), and one token more that nobody else has:

    request   0    1    2    3    4    5    6    7    8
    prompt    A    AQ   AQ   BR   BQ   C    CQ   A    BR
    output    3    6    2    8    5    4    10   10   10   tokens asked for
    arrives   0    0    2    5    10   12   16   18   25   at step

Without prefix caching all nine are answered rightly. Find the change and put it right; then say in BROKEN whose answer it
spoiled, and in WHY what that request found in the cache, and how it came to be found. (It shows `allocate` and `match`:
whoever means to write these, in exercises 03 and 04, does so before.)
"""

from cache import BlockPool
from exercises import prompt

TITLE = "bug hunt: a block with a past"
CHAPTER, KIND = "ch06_prefix_reuse.py", "bug hunt"
MINUTES, DIFFICULTY, IMPORTANCE = 35, 4, 4
MODULE, NAMES = "cache", ("BlockPool.allocate", "BlockPool.match", "BlockPool.publish")
HEADER = ""
HINTS = (
    "A key in the index is (parent, tokens of one block). It must never be found after another prefix than the one it was "
    "entered after. What names the parent here, and for how long is that name good?",
    "Requests 0 and 1 begin in the same step with the same instruction, and both miss. Whose blocks does the index keep? "
    "Under which parent does request 1 then enter its question?",
    "Request 0 ends, and later its blocks are handed out again, to a request with another instruction. What does the index "
    "say of the question now?",
    "The counter that somebody saw no need for is still there: next(self._numbers) is a name that nothing ever had.",
)
PLANTED = ("next(self._numbers) if first == block else self.content[first]",
           "first  # equal contents go by one name, the block that had them first")
MUTANTS = {
    "still names contents by blocks": (("next(self._numbers) if first == block else self.content[first]", "block"),),
    "gives equal contents two numbers": (("next(self._numbers) if first == block else self.content[first]",
                                          "next(self._numbers)"),),
    "leaves a block in the index that is handed out again": (("    self._unindex(block)\n", ""),),
    "enters every block as a first one": (
        ("parent = self.content[table[i - 1]] if i else (\"root\", root)", "parent = (\"root\", root)"),),
    "looks for blocks in the place of contents": (("parent = self.content[block]\n", "parent = block\n"),),
}
A, B, C, Q, R = (prompt(8, seed) for seed in range(10, 15))
ENGINE = {"blocks": 18}
REQUESTS = [(arrives, [*tokens, i], {"temperature": 0, "max_tokens": output})
            for i, (arrives, tokens, output) in enumerate((
                (0, A, 3), (0, A + Q, 6), (2, A + Q, 2), (5, B + R, 8), (10, B + Q, 5), (12, C, 4), (16, C + Q, 10),
                (18, A, 10), (25, B + R, 10)))]
COUNTERS = ("steps", "computed_tokens", "hit_tokens")
EFFECT = ("hit_tokens", "computed_tokens", "peak_blocks")


def cases():
    """(call, value, likely cause)"""
    pool = BlockPool(8, 2)

    def compute(tokens, root=None):
        table = []
        pool.extend(table, 0, len(tokens))
        for i in range(len(tokens) // 2):
            pool.publish(table, i, tokens, root)
        return table

    a, q, r, c = [1, 2], [3, 4], [5, 6], [7, 8]
    first, second = compute(a), compute(a + q)
    yield f"two begin with {a}, the second goes on with {q}: their blocks", (first, second), "the least recently freed first"
    yield f"match {a + q + [0]}", pool.match(a + q + [0]), "the index keeps the first block, and the chain goes on from it"
    yield f"match {a + q}", pool.match(a + q), "one token is left over to compute"
    yield f"match {a + r + [0]}", pool.match(a + r + [0]), "the second block differs"
    yield "with another root", pool.match(a + q + [0], "x"), "another root shares nothing"
    pool.release(first)
    others = [compute(r + r), compute(r + c), compute(c)]
    yield f"the first ends, and others fill the pool: {r + r}, {r + c} and {c}", others, "a free block is handed out again"
    yield f"match {a + q + [0]} now", pool.match(a + q + [0]), "what was handed out again left the index"
    yield f"match {r + c + [0]}", pool.match(r + c + [0]), "the chain goes on from the block of who was there first"
    yield f"match {c + q + [0]}", pool.match(c + q + [0]), f"{q} was computed after {a}, and never after {c}"
    yield f"match {r + q + [0]}", pool.match(r + q + [0]), f"{q} was computed after {a}, and never after {r}"
    for table in others:
        pool.release(table)
    again = compute(a + r)
    yield f"{a + r} once more, and match {a + r + [0]}", (again, pool.match(a + r + [0])), "computed anew, and found anew"
    off = BlockPool(4, 2, prefix_caching=False)
    off.publish([off.allocate()], 0, a)
    yield "with prefix caching off", off.match(a + q), "no hits"
