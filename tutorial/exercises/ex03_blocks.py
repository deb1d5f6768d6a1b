"""Hand out blocks, and take them back.

A block may be in several tables at once, so it has a count of references: `self.refs[block]`. It is free when the
count is 0, and then it stands in `self.free`, an OrderedDict used as an ordered set whose first key is the least
recently freed block. A free block may still hold a prefix that somebody could reuse (chapter 06): that ends when the
block is handed out again.

You need: self.refs (list), self.free (OrderedDict), self.content (list; None for a block that holds nothing known),
self.copies (dict {block: source}: copies that are still to be made; when a block becomes free nobody needs the one into
it, so that entry goes, if there is one), and self._unindex(block), which takes a block out of the prefix index and does
nothing if it is not there.
"""

from collections import OrderedDict

from cache import BlockPool

TITLE = "allocate and release blocks with reference counts"
CHAPTER, KIND = "ch05_paging.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 20, 2, 5
MODULE, NAMES = "cache", ("BlockPool.allocate", "BlockPool.release")
HEADER = ""
HINTS = (
    "allocate: nothing free is an IndexError. Else take the first key of self.free: popitem(last=False).",
    "A block that is handed out holds nothing any more: out of the prefix index, content None, one reference.",
    "release: pop blocks off the end of the table until it is empty. Why from the end? Read the docstring again.",
    "Only a block whose count reaches 0 goes to the end of self.free, and a copy that was due into it is dropped.",
)
MUTANTS = {
    "hands out the most recently freed block": (("popitem(last=False)", "popitem()"),),
    "leaves a reused block in the prefix index": (("    self._unindex(block)\n", ""),),
    "frees the head of a table first": (("block = table.pop()", "block = table.pop(0)"),),
    "frees blocks that others still hold": (("if self.refs[block] == 0", "if self.refs[block] <= 1"),),
    "does not count the first holder": (("    self.refs[block] = 1\n", ""),),
    "does not empty the table": (("while table:\n        block = table.pop()", "for block in reversed(table):"),),
}
SYSTEM = list(range(9, 29))
ENGINE = {"blocks": 22}
REQUESTS = [
    (0, SYSTEM + [1, 2, 3], {"temperature": 0, "max_tokens": 14}),
    (1, SYSTEM + [4, 5], {"temperature": 0, "max_tokens": 9}),
    (1, [60 - i for i in range(18)], {"temperature": 0, "max_tokens": 16}),
    (3, [50, 51, 52], {"temperature": 1.5, "seed": 3, "n": 2, "max_tokens": 12}),
    (22, SYSTEM + [1, 2, 3], {"temperature": 0, "max_tokens": 6}),
    (30, [60 - i for i in range(18)] + [7], {"temperature": 0, "max_tokens": 30}),
    (34, SYSTEM + [4, 5, 6], {"temperature": 0, "max_tokens": 20}),
]
COUNTERS = ("steps", "computed_tokens", "hit_tokens", "preemptions")
EFFECT = ("peak_blocks", "hit_tokens", "preemptions")


def cases():
    """(call, value, likely cause)"""
    pool = BlockPool(6, 2)
    a = [pool.allocate() for _ in range(3)]
    yield "three blocks of a pool of five", (a, pool.refs, pool.num_free), (
        "least recently freed first: 1, 2, 3; one reference each")
    for i in range(3):
        pool.publish(a, i, [10, 11, 12, 13, 14, 15])
    b = pool.adopt(a)
    pool.release(a)
    yield ("release one of two tables over the same blocks", (a, b, pool.refs, list(pool.free)),
           "the table that was released is empty; the other holds its blocks still")
    pool.release(b)
    yield "release the other", (b, pool.refs, list(pool.free)), "last block first: 3, 2, 1 come behind what was free before"
    yield "match the prefix they still hold", pool.match([10, 11, 12, 13, 14, 15, 16]), "a free block keeps its contents"
    c = [pool.allocate() for _ in range(3)]
    yield "three blocks more", (c, pool.content), "the two that were free longest, then 3; nobody knows what they will hold"
    yield "match again", pool.match([10, 11, 12, 13, 14, 15, 16]), "block 3 was handed out again: it left the prefix index"
    pool.release(c)
    pool.check([])
    d = [pool.allocate() for _ in range(5)]
    try:
        pool.allocate()
        answer = "no error"
    except IndexError:
        answer = "IndexError"
    yield "a sixth block of five", answer, "nothing is free: IndexError"
    pool.copies = {d[0]: d[1], d[2]: d[3]}
    pool.refs[d[2]] += 1
    pool.release(d)
    yield ("release with copies due, one into a block that stays", (pool.copies, pool.refs, pool.free),
           "a copy into a block that becomes free is off; the other is still due")
    empty = BlockPool(2, 4)
    empty.release([])
    yield "release an empty table", empty.free == OrderedDict.fromkeys([1]), "nothing happens"
