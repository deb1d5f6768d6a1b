"""Exercise 02: causal attention of a ragged batch over a paged cache

Attention over scattered blocks, for a batch in which every request brings another number of tokens.

One function serves prefill, decode and everything between. Request b owns rows query_start[b] .. query_start[b + 1] -
1 of q; its keys and values lie in the blocks that row b of block_tables names, in that order, and end at
context_lens[b]. A loop over the requests is fine: that is how the engine's own definition goes, and its fast bodies
are checked against it.

q is [T, Hq, D]; k_cache and v_cache are [blocks, block_size, Hkv, D]; block_tables [B, N], context_lens [B] and
query_start [B + 1] are int32. What lies in a block behind the context is not zero: it is whatever was there before, and
here it is NaN. This exercise has no int8 cache: leave `scales` and the docstring's last paragraph out.
"""

import math

import torch


def paged_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
                    context_lens: torch.Tensor, query_start: torch.Tensor, scale: float, window: int = 0,
                    scales: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Causal attention of a ragged batch over the paged cache: any mix of query lengths in one call. Returns [T, Hq, D].

    The n > 0 queries of a request are its last n positions, so query i of n stands at position context_len - n + i and
    sees the keys up to there; with a `window` only the last `window` of them, itself included. Query head h reads
    key/value head h // (Hq // Hkv). Softmax in at least float32. Survey A III.A · B 3.2.3, 3.2.5. (arXiv:2309.06180)

    An int8 cache needs no dequantized copy: a key has one scale, so its score is multiplied by that instead, and the
    probability by the scale of the value that it weighs.
    """
    raise NotImplementedError
