"""Exercise 03: allocate and release blocks with reference counts

Hand out blocks, and take them back.

A block may be in several tables at once, so it has a count of references: `self.refs[block]`. It is free when the
count is 0, and then it stands in `self.free`, an OrderedDict used as an ordered set whose first key is the least
recently freed block. A free block may still hold a prefix that somebody could reuse (chapter 06): that ends when the
block is handed out again.

You need: self.refs (list), self.free (OrderedDict), self.content (list; None for a block that holds nothing known),
self.copies (dict {block: source}: copies that are still to be made; when a block becomes free nobody needs the one into
it, so that entry goes, if there is one), and self._unindex(block), which takes a block out of the prefix index and does
nothing if it is not there.
"""


def allocate(self) -> int:
    """Take the least recently freed block. Raises IndexError when none is free: callers ask `num_free` first."""
    raise NotImplementedError


def release(self, table: list[int]) -> None:
    """Drop one reference on every block and empty the table.

    Last block first: under pressure the tail of a prefix is then reused before its head, and a prefix without
    its head could never be matched.
    """
    raise NotImplementedError
