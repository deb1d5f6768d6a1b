"""Exercise 04: match the longest cached prefix

Find the blocks that somebody else has computed already.

The prefix index is a tree. `self.index` maps (parent, tokens of one whole block) to a block, where the parent of a
first block is ("root", root) and the parent of any other is `self.content[block before it]`: not the block's number,
which may be recycled, but the number of what it contains. So a key says exactly what was computed, and after what.

One trap has caught several engines: a prompt that is in the cache *completely*.
"""


def match(self, tokens: list[int], root=None) -> list[int]:
    """The longest chain of published blocks that begins `tokens`; takes no reference.

    At least one token is always left over: without computing it there would be no logits to sample from.
    `root` is whatever else changes keys and values: an adapter, a tenant's salt. Equal prompts under unequal
    roots share nothing. Survey A III.A · B 3.2.3 · C KV Cache Optimization: Reuse Strategies.
    """
    raise NotImplementedError
