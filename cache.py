"""The memory: who owns which block of the KV cache, and the tensors the blocks live in.

An operating system gives a process pages; a server gives a request *blocks*. A block holds the keys and values of
`block_size` consecutive tokens in every layer. A request's `block_table` lists its blocks in order, so token i of the
request lives in block `block_table[i // block_size]` at offset `i % block_size`, and nothing needs to be contiguous.

    request A  "Once upon a time there"      block_table [3, 7]            refs  3:2  7:1
    request B  "Once upon a time a fox"      block_table [3, 5]            refs  3:2  5:1
                ^^^^^^^^^^^^^^^^^ computed once, shared: the blocks hold exactly the same tokens after the same prefix

`BlockPool` is bookkeeping over integers and knows no torch, so that simulators and tests can drive it anywhere.
`KVCache` owns the tensors and knows nothing of requests. What a preempted request has computed may wait in *host slots*,
each of which holds a copy of one block in main memory.

Invariants (tests/test_oracle.py checks them after every step):
  * refs[b] is the number of tables that hold block b; b is in the free list exactly when refs[b] == 0.
  * A free block keeps its contents and its place in the prefix index until it is reused, least recently freed first;
    blocks that were taken for rejected drafts come before all others.
  * Only blocks that are full *and computed* enter the index, under an exact key: no hash can collide.
  * Block 0 is scratch. Nobody owns it; rows that pad a batch write there.
  * A host slot is free or belongs to one waiting request; one that is read in a step is not written before the next.

Survey A III.A · B 3.2.3 · C KV Cache Optimization: Memory Management, Reuse Strategies.
Paging: PagedAttention (arXiv:2309.06180). Prefix sharing: RadixAttention (arXiv:2312.07104).
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count

SCRATCH = 0  # the block that nobody owns


class BlockPool:
    """Hands out block numbers 1 .. num_blocks-1, counts who holds them, and remembers what full blocks contain."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, num_host_slots: int = 0):
        if block_size < 1 or num_blocks < 2:
            raise ValueError(f"a pool needs block_size >= 1 and num_blocks >= 2 (one is scratch), "
                             f"got {block_size} and {num_blocks}")
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self.refs = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(1, num_blocks))  # an ordered set: least recently freed first
        # The prefix index is a tree of blocks. Every published content gets a number of its own, never used again;
        # a child's key names its parent by that number rather than by the parent's block, which may be recycled.
        self.index: dict[tuple, int] = {}  # (content of the parent, or ("root", root); tokens) -> block
        self.key: list[tuple | None] = [None] * num_blocks  # by block: the key it was published under
        self.content: list[int | None] = [None] * num_blocks  # by block: the number of its content
        self._numbers = count(1)
        self.num_host_slots, self.free_slots = num_host_slots, list(range(num_host_slots))
        # Due before the next step runs, see `take_moves`:
        self.swaps_out: dict[int, int] = {}  # host slot -> block
        self.copies: dict[int, int] = {}  # copy-on-write: destination -> source
        self.swaps_in: dict[int, int] = {}  # block -> host slot
        self._read_slots: list[int] = []  # free once the swaps due have been made

    @property
    def num_usable(self) -> int:
        """Blocks that requests can own: all but scratch."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, whether or not they still hold a reusable prefix."""
        return len(self.free)

    def stats(self) -> dict[str, int]:
        """Blocks in use, blocks free but still matching a prefix, and blocks free and empty."""
        cached = self.num_free_in(self.index.values())
        return {"blocks_used": self.num_usable - self.num_free, "blocks_cached": cached,
                "blocks_free": self.num_free - cached}

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

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

    def release(self, table: list[int]) -> None:
        """Drop one reference on every block and empty the table.

        Last block first: under pressure the tail of a prefix is then reused before its head, and a prefix without
        its head could never be matched.
        """
        while table:
            block = table.pop()
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free[block] = None
                self.copies.pop(block, None)

    def trim(self, table: list[int], num_tokens: int) -> None:
        """Undo `extend`: give back the blocks beyond `num_tokens` tokens, which must be unshared and unpublished.

        They go to the head of the free list, where they came from: they hold nothing that could be found again, so
        whoever needs a block next takes them before anything that still matches a prefix.
        """
        while len(table) > self.blocks_for(num_tokens):
            block = table.pop()
            self.refs[block], self.free[block] = 0, None
            self.free.move_to_end(block, last=False)

    def blocks_missing(self, table: list[int], start: int, end: int) -> int:
        """How many free blocks `extend` would take to let tokens `start .. end-1` be written through `table`."""
        shared = start % self.block_size and self.refs[table[start // self.block_size]] > 1
        return max(0, self.blocks_for(end) - len(table)) + bool(shared)

    def extend(self, table: list[int], start: int, end: int) -> None:
        """Make tokens `start .. end-1` writable: copy a shared block that is about to change, then append new ones.

        Only a partly filled last block can be both shared and written: whole blocks are never written again.
        """
        i = start // self.block_size
        if start % self.block_size and self.refs[table[i]] > 1:
            source, self.refs[table[i]] = table[i], self.refs[table[i]] - 1
            table[i] = self.allocate()
            self.copies[table[i]] = source
        while len(table) * self.block_size < end:
            table.append(self.allocate())

    def swap_out(self, blocks: list[int]) -> list[int]:
        """Host slots that these blocks will be copied to before the next step; [] if too few are free, or if one of the
        blocks has yet to be filled itself.
        """
        if len(blocks) > len(self.free_slots) or not self.swaps_in.keys().isdisjoint(blocks):
            return []
        slots = [self.free_slots.pop() for _ in blocks]
        # What a copy-on-write that is due would put into a block is still in the block it comes from.
        self.swaps_out.update((slot, self.copies.get(block, block)) for slot, block in zip(slots, blocks))
        return slots

    def swap_in(self, slots: list[int], blocks: list[int]) -> None:
        """Before the next step, fill the blocks from the last of the slots (prefix hits spare the rest); then free all."""
        self.swaps_in.update(zip(blocks, slots[len(slots) - len(blocks) :]))
        self._read_slots += slots

    def take_moves(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """What `KVCache.move` has to do now: {slot: block} out, copies {destination: source}, {block: slot} in."""
        due = self.swaps_out, self.copies, self.swaps_in
        self.swaps_out, self.copies, self.swaps_in = {}, {}, {}
        self.free_slots += self._read_slots
        self._read_slots = []
        return due

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

    def num_free_in(self, blocks: Iterable[int]) -> int:
        """How many of these blocks sit in the free list, and would leave it if `adopt`ed."""
        return sum(1 for block in blocks if self.refs[block] == 0)

    def adopt(self, blocks: list[int]) -> list[int]:
        """A new table of these blocks, one more reference on each: those that `match`, or all of another table, which is a
        fork. Sharing costs no memory until somebody writes (see `extend`).
        """
        for block in blocks:
            if self.refs[block] == 0:
                del self.free[block]
            self.refs[block] += 1
        return list(blocks)

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
        self.content[block] = next(self._numbers) if first == block else self.content[first]

    def withdraw(self, blocks: list[int]) -> None:
        """Take blocks out of the prefix index: what they hold is not to be trusted."""
        for block in blocks:
            self._unindex(block)

    def _unindex(self, block):
        # The index may point at another block with the same content: only *this* block's entry goes.
        if self.index.get(self.key[block]) == block:
            del self.index[self.key[block]]
        self.key[block] = None

    def forget(self) -> None:
        """Empty the prefix index, for measuring without hits. Requests that run meanwhile go on publishing."""
        self.withdraw(list(self.index.values()))

    def check(self, tables: list[list[int]], slots: list[int] | tuple = ()) -> None:
        """Raise AssertionError unless every invariant holds for these tables and host slots, which must be all there are."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            for block in table:
                held[block] += 1
        assert held == self.refs, "reference counts differ from the tables"
        assert held[SCRATCH] == 0, "somebody owns the scratch block"
        assert set(self.free) == {b for b in range(1, self.num_blocks) if not held[b]}, "free list differs"
        for key, block in self.index.items():
            assert self.key[block] == key and len(key[1]) == self.block_size, f"stale index entry for block {block}"
        assert all(self.refs[dst] for dst in self.copies), "a copy is due into a free block"
        all_slots = sorted([*slots, *self.free_slots, *self._read_slots])
        assert all_slots == list(range(self.num_host_slots)), "a host slot is lost, or held twice"


class KVCache:
    """The tensors: for every layer keys and values of shape [num_blocks, block_size, kv_heads, head_dim].

    dtype torch.int8: also their scales, [num_blocks, kv_heads, block_size] bfloat16, one per token and head. The scales of a
    head in a block are neighbours, so that 16 of them are one memory access. (bfloat16 has the range of float32, and its few
    bits cost nothing, as values are quantized with the rounded scale.) Survey A III.C · B 3.2.1 · C KV Cache Optimization:
    Compression Techniques.

    host: for each of these tensors, main memory for num_host_slots more blocks: [num_host_slots, num_layers, 2, ...]. With a
    GPU it is pinned; torch rounds pinned memory up to a power of two bytes.

    Memory comes uninitialised, and from the operating system only when first written. Nothing ever reads a slot that
    was not written (attention stops at the context's end), so there is nothing to clear.
    """

    def __init__(self, num_layers, num_blocks, block_size, kv_heads, head_dim, dtype, device, num_host_slots=0):
        import torch  # here, so that BlockPool can be used where there is no torch

        shape = (num_layers, 2, num_blocks, block_size, kv_heads, head_dim)
        self.data, self.scales = torch.empty(shape, dtype=dtype, device=device), None
        scales = [None] * num_layers
        if dtype is torch.int8:
            shape = (num_layers, 2, num_blocks, kv_heads, block_size)
            self.scales = torch.empty(shape, dtype=torch.bfloat16, device=device)
            scales = [(layer[0], layer[1]) for layer in self.scales]
        # What the operations of kernels.py take: (keys, values, None or (scales of keys, scales of values))
        self.layers = [(layer[0], layer[1], scale) for layer, scale in zip(self.data, scales)]
        self.tensors = [self.data] if self.scales is None else [self.data, self.scales]
        # Pinned, so that copies run in the order of the device's stream, and nobody waits for them.
        self.host = [torch.empty((num_host_slots, *tensor.shape[:2], *tensor.shape[3:]), dtype=tensor.dtype,
                                 pin_memory=tensor.is_cuda and num_host_slots > 0) for tensor in self.tensors]

    @staticmethod
    def bytes_per_block(num_layers, block_size, kv_heads, head_dim, itemsize) -> int:
        """Bytes that one block takes in all layers, keys and values together; of int8 (itemsize 1) with the scales."""
        return num_layers * 2 * block_size * kv_heads * (head_dim * itemsize + (2 if itemsize == 1 else 0))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def move(self, swaps_out: dict[int, int], copies: dict[int, int], swaps_in: dict[int, int]) -> None:
        """Copy blocks to the host, {slot: block}, then blocks to others, {destination: source}, all read before any is
        written, then slots from the host, {block: slot}. In this order, because a block that is read may have a new owner
        by now, for whom a later move fills it. Survey B 3.2.3.
        """
        for tensor, host in zip(self.tensors, self.host):
            for slot, block in swaps_out.items():
                host[slot].copy_(tensor[:, :, block], non_blocking=True)
            if copies:
                tensor[:, :, list(copies)] = tensor[:, :, list(copies.values())]
            for block, slot in swaps_in.items():
                tensor[:, :, block].copy_(host[slot], non_blocking=True)
