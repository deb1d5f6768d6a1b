"""Attention over scattered blocks, for a batch in which every request brings another number of tokens.

One function serves prefill, decode and everything between. Request b owns rows query_start[b] .. query_start[b + 1] -
1 of q; its keys and values lie in the blocks that row b of block_tables names, in that order, and end at
context_lens[b]. A loop over the requests is fine: that is how the engine's own definition goes, and its fast bodies
are checked against it.

q is [T, Hq, D]; k_cache and v_cache are [blocks, block_size, Hkv, D]; block_tables [B, N], context_lens [B] and
query_start [B + 1] are int32. What lies in a block behind the context is not zero: it is whatever was there before, and
here it is NaN. This exercise has no int8 cache: leave `scales` and the docstring's last paragraph out.
"""

import torch

import kernels

TITLE = "causal attention of a ragged batch over a paged cache"
CHAPTER, KIND = "ch04_kernels.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 40, 3, 5
MODULE, NAMES = "kernels", ("paged_attention",)
HEADER = "import math\n\nimport torch\n"
HINTS = (
    "For one request: gather its blocks with k_cache[blocks], flatten blocks and offsets into one dimension, cut at its "
    "context length. Now it is ordinary attention between n queries and `length` keys.",
    "The n queries are the *last* n positions. Query i stands at length - n + i and sees keys 0 .. length - n + i.",
    "Grouped queries: reshape q [n, Hq, D] to [n, Hkv, Hq // Hkv, D]. Neighbouring query heads share a key/value head.",
    "A window of w lets position p see keys p - w + 1 .. p: `key > p - w`. A window of 0 is none.",
)
MUTANTS = {
    "aligns the causal mask with the first key": (("query = key[length - (end - start):, None]",
                                                   "query = key[: end - start, None]"),),
    "spreads heads over key heads in turn": (
        (".view(end - start, kv_heads, -1, head_dim)", ".view(end - start, -1, kv_heads, head_dim).transpose(1, 2)"),
        ("\"hgnl,lhd->nhgd\", probs, v).reshape", "\"hgnl,lhd->nghd\", probs, v).reshape")),
    "lets the window reach one key too far": (("(key > query - window)", "(key >= query - window)"),),
    "forgets the scale": ((", k) * scale", ", k)"),),
    "reads the blocks in the cache's order": ((".long()\n", ".sort().values.long()\n"),),
    "does not mask the future": (("visible = key <= query if", "visible = key < length if"),
                                   ("else (key <= query) &", "else (key < length) &")),
}
ENGINE = {"window": 9, "max_batch_tokens": 16}
REQUESTS = [(step, [(7 * step + 3 * i) % 64 for i in range(length)], {"temperature": 0, "max_tokens": 12})
            for step, length in ((0, 21), (0, 3), (1, 30), (2, 1), (5, 17))]
COUNTERS = ("steps", "computed_tokens")
EFFECT = ("steps", "computed_tokens", "peak_blocks")


def cases():
    """(call, value, likely cause)"""
    def attend(counts, lengths, heads=4, kv_heads=2, size=3, window=0, seed=0):
        rng = torch.Generator().manual_seed(seed)
        need = [-(-length // size) for length in lengths]
        blocks = iter((torch.randperm(sum(need), generator=rng) + 1).tolist())
        tables = torch.zeros(len(need), max(need), dtype=torch.int32)
        for b, n in enumerate(need):
            tables[b, :n] = torch.tensor([next(blocks) for _ in range(n)])
        cache = torch.full((2, sum(need) + 1, size, kv_heads, 8), torch.nan, dtype=torch.float64)
        for b, length in enumerate(lengths):
            for i in range(length):
                cache[:, tables[b, i // size], i % size] = torch.randn(2, kv_heads, 8, dtype=torch.float64, generator=rng)
        start = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
        q = torch.randn(sum(counts), heads, 8, dtype=torch.float64, generator=rng)
        call = f"queries {counts}, contexts {lengths}, {heads} heads over {kv_heads}, blocks of {size}, window {window}"
        return call, kernels.paged_attention(q, *cache, tables, torch.tensor(lengths, dtype=torch.int32), start, 0.3, window)

    yield *attend([1], [1], 1, 1), "one query that sees one key gets exactly that key's value"
    yield *attend([1], [7], 1, 1), "a decoding request sees its whole context: blocks in the table's order, times the scale"
    yield *attend([4], [4], 1, 1), "causal: query i sees keys 0 .. i"
    yield *attend([3], [8], 1, 1), "a later chunk: its first query stands at position 5, not 0"
    yield *attend([1, 1, 1], [5, 2, 9], 1, 1), "each request has its own row of the block table, and its own length"
    yield *attend([2, 1, 5], [4, 11, 5], 6, 2), "query head h reads key head h // (Hq // Hkv): here 0 0 0 1 1 1"
    yield *attend([5, 1], [9, 12], window=4), "a window of 4: a position sees itself and the 3 before it"
    yield *attend([1, 7, 2, 1], [16, 7, 33, 1], 4, 4, 5), "slots behind the context are NaN: cut at its length"
