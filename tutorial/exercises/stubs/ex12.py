"""Exercise 12: bug hunt: a block with a past

A bug hunt: somebody is handed a part of somebody else's cache.

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

BROKEN = None  # the number, from 0, of the request whose tokens come out wrong
WHY = ""  # in a sentence or two: what happens to it, and why to no other


def allocate(self) -> int:
    """Take the least recently freed block. Raises IndexError when none is free: callers ask `num_free` first."""
    if not self.free:
        raise IndexError("no free block")
    block, _ = self.free.popitem(last=False)
    self._unindex(block)
    self.swaps_in.pop(block, None)  # due for an owner that is gone
    self.content[block] = None
    self.refs[block] = 1
    return block


def match(self, tokens: list[int], root=None) -> list[int]:
    """The longest chain of published blocks that begins `tokens`; takes no reference.

    At least one token is always left over: without computing it there would be no logits to sample from.
    `root` is whatever else changes keys and values: an adapter, a tenant's salt. Equal prompts under unequal
    roots share nothing. Survey A III.A · B 3.2.3 · C KV Cache Optimization: Reuse Strategies.
    """
    blocks, parent = [], ("root", root)
    for end in range(self.block_size, len(tokens), self.block_size):
        block = self.index.get((parent, tuple(tokens[end - self.block_size : end])))
        if block is None:
            break
        blocks.append(block)
        parent = self.content[block]
    return blocks


def publish(self, table: list[int], i: int, tokens: list[int], root=None) -> None:
    """Enter block i of `table`, full and computed, into the prefix index; `tokens` are the request's.

    Blocks must be published in order. If an equal block is there already (two equal prompts ran in one step), the
    index keeps the first, and both get the same content number: whoever extends either continues the same chain.
    """
    if not self.prefix_caching:
        return
    parent = self.content[table[i - 1]] if i else ("root", root)
    key = (parent, tuple(tokens[i * self.block_size : (i + 1) * self.block_size]))
    block, first = table[i], self.index.setdefault(key, table[i])
    self.key[block] = key
    self.content[block] = first  # equal contents go by one name, the block that had them first
