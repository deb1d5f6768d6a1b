"""Find the blocks that somebody else has computed already.

The prefix index is a tree. `self.index` maps (parent, tokens of one whole block) to a block, where the parent of a
first block is ("root", root) and the parent of any other is `self.content[block before it]`: not the block's number,
which may be recycled, but the number of what it contains. So a key says exactly what was computed, and after what.

One trap has caught several engines: a prompt that is in the cache *completely*.
"""

from cache import BlockPool

TITLE = "match the longest cached prefix"
CHAPTER, KIND = "ch06_prefix_reuse.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 20, 2, 5
MODULE, NAMES = "cache", ("BlockPool.match",)
HEADER = ""
HINTS = (
    "Walk block by block: look (parent, tuple of the block's tokens) up in self.index; at the first miss stop.",
    "After a hit the parent of the next block is self.content[block].",
    "The trap: the last token must be computed, or there are no logits to sample from. Which block ends may you look at?",
    "Ends from block_size to len(tokens) - 1 in steps of block_size: exactly range(block_size, len(tokens), block_size).",
)
MUTANTS = {
    "matches the prompt completely": (("range(self.block_size, len(tokens), ", "range(self.block_size, len(tokens) + 1, "),),
    "goes on after a miss": (("        break\n", "        continue\n"),),
    "keeps the root as everybody's parent": (("        parent = self.content[block]\n", ""),),
    "takes the block for its content": (("parent = self.content[block]", "parent = block"),),
    "shares between tenants": (('("root", root)', '("root", None)'),),
    "stops a block early": (("len(tokens), self.block_size)", "len(tokens) - self.block_size, self.block_size)"),),
}
SYSTEM, OTHER = list(range(9, 29)), [3, 1, 4, 1, 5, 9, 2, 6]
ENGINE = {"blocks": 40}
REQUESTS = [
    (0, SYSTEM, {"temperature": 0, "max_tokens": 6}),
    (1, SYSTEM + OTHER + [7], {"temperature": 0, "max_tokens": 8}),
    (8, SYSTEM, {"temperature": 0, "max_tokens": 12}),  # exactly five blocks, all of them cached
    (9, SYSTEM, {"temperature": 0, "max_tokens": 5, "cache_salt": "another tenant"}),
    (10, SYSTEM[:8] + [40, 41, 42, 43] + SYSTEM[8:16] + [44], {"temperature": 0, "max_tokens": 8}),  # a stranger between
    (14, OTHER + SYSTEM, {"temperature": 0, "max_tokens": 8}),
    (24, SYSTEM + OTHER + [7, 8], {"temperature": 0, "max_tokens": 8}),
    (26, SYSTEM, {"temperature": 0, "max_tokens": 5, "cache_salt": "another tenant"}),
]
COUNTERS = ("computed_tokens", "hit_tokens", "steps")
EFFECT = ("hit_tokens", "computed_tokens", "peak_blocks")


def cases():
    """(call, value, likely cause)"""
    pool = BlockPool(20, 3)

    def compute(tokens, root=None):
        table = []
        pool.extend(table, 0, len(tokens))
        for i in range(len(tokens) // 3):
            pool.publish(table, i, tokens, root)
        return table

    pool.allocate()
    a = compute([1, 2, 3, 4, 5, 6, 7, 8, 9])
    yield f"1..10 after 1..9 was computed in blocks {a}", pool.match([*range(1, 11)]), "three whole blocks"
    yield "1..9 itself", pool.match([*range(1, 10)]), "the full hit: one token must be left over to compute"
    yield "1..4", pool.match([1, 2, 3, 4]), "one whole block; a block that is only partly the same is no hit"
    yield "1..3, 4, 5, 0", pool.match([1, 2, 3, 4, 5, 0, 7]), "stop at the first block that differs"
    b = compute([7, 8, 9, 4, 5, 6, 1, 2, 3])
    yield f"4..7 after {b} as well", pool.match([4, 5, 6, 7]), "equal tokens after another prefix are another block"
    yield "7 8 9 4 5 6 7", pool.match([7, 8, 9, 4, 5, 6, 7]), "the second block is the one computed after 7 8 9"
    yield "1..3, 0 0 0, 4..6", pool.match([1, 2, 3, 0, 0, 0, 4, 5, 6, 7]), "nothing behind a miss can match"
    yield "1..9 of tenant x", pool.match([*range(1, 11)], "x"), "another root shares nothing"
    c = compute([1, 2, 3, 4, 5, 6], "x")
    yield f"once tenant x has computed its own, {c}", pool.match([*range(1, 11)], "x"), "its own blocks, and only those"
    pool.release(a)
    d = compute([9] * 30)
    yield f"1..9 after its blocks were recycled for {d}", pool.match([*range(1, 11)]), "recycled blocks are not in the index"
    yield "an empty pool", BlockPool(4, 1).match([1, 2, 3]), "nothing computed, nothing matched"
    off = BlockPool(9, 2, prefix_caching=False)
    yield "with prefix caching off", off.match([1, 2, 3]), "no hits when self.prefix_caching is False"
