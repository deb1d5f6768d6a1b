"""Exercise 01: sampling with temperature, top-k, top-p and min-p

From logits to the probabilities a token is drawn from.

Write the function that sampling rests on: temperature, then top-k, then top-p, then min-p, each row with its own
settings. `kernels.sample` calls it for every row that is not greedy, and then draws. Each filter looks at what the one
before it left: top-p at probabilities that sum to 1 again after top-k. Sorting the whole row is fine here; the engine is
smarter about that, and `--diff` shows how once you have passed.
"""

import math

import torch


def token_probabilities(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
                        min_p: torch.Tensor) -> torch.Tensor:
    """What a token is drawn from: logits [S, V] after temperature, top-k, top-p and min-p, in this order. [S, V] float32.

    All parameters are [S]; temperature > 0; top_k 0, top_p 1 and min_p 0 are off. Top-k keeps ties with the k-th
    logit, top-p the token that crosses p and its ties (arXiv:1904.09751), min-p whatever has at least min_p times the
    largest probability (arXiv:2407.01082). Survey B v1 3.2.5 (Sampling optimization).
    """
    raise NotImplementedError
