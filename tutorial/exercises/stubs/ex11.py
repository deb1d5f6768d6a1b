"""Exercise 11: bytes and FLOPs of a step

What a step has to read, and what it has to compute.

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

from nanoserve import Request


def cost(self, plan: list[tuple[Request, int]]) -> tuple[float, float]:
    """(bytes, FLOPs) of a step that brings each request of the plan n tokens forward.

    Bytes: all weights once, of `weight_bytes` each; and `kv_bytes` for each token of each request's context, with those
    of this step. FLOPs: two per weight and token, through `body` weights all tokens, through `head` (the output layer,
    and what comes after attention in the last layer) only those that are sampled; and `per_pair` for each query and
    each key that it sees.
    """
    raise NotImplementedError
