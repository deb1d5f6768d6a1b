"""From logits to the probabilities a token is drawn from.

Write the function that sampling rests on: temperature, then top-k, then top-p, then min-p, each row with its own
settings. `kernels.sample` calls it for every row that is not greedy, and then draws. Each filter looks at what the one
before it left: top-p at probabilities that sum to 1 again after top-k. Sorting the whole row is fine here; the engine is
smarter about that, and `--diff` shows how once you have passed.
"""

import torch

import kernels

TITLE = "sampling with temperature, top-k, top-p and min-p"
CHAPTER, KIND = "ch01_generate.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 25, 2, 4
MODULE, NAMES = "kernels", ("token_probabilities",)
HEADER = "import math\n\nimport torch\n"
HINTS = (
    "Everything can be said with one threshold per row: logits below it become -inf, the rest go through softmax.",
    "For top-k the threshold is the k-th largest logit. Rows with top_k 0 must keep everything: torch.where.",
    "For top-p, sort what top-k left in descending order and take the softmax's cumulative sum. A token stays as long as "
    "the sum *before* it is below p: that keeps the one that crosses p.",
    "min-p compares with the largest probability. In logits: keep x >= max + log(min_p), and log(0) is -inf, which is off.",
)
MUTANTS = {
    "drops the token that crosses p": ((".clamp(max=size - 1)", ".sub(1).clamp(0, size - 1)"),),
    "measures top-p before top-k": (("total = kept.logsumexp", "total = logits.logsumexp"),),
    "multiplies by the temperature": ((") / temperature[:, None]", ") * temperature[:, None]"),),
    "keeps one token too many for top-k": (("(top_k.clamp(1, size) - 1)", "top_k.clamp(1, size - 1)"),),
    "takes min-p for an absolute probability": (("logits.masked_fill(logits < min_p.log()",
                                                 "logits.masked_fill(logits.log_softmax(-1) < min_p.log()"),),
}
ENGINE = {}
REQUESTS = [
    (0, [5, 9, 2], {"temperature": 1.5, "top_p": 0.7, "seed": 1, "max_tokens": 24}),
    (0, [7, 7, 1, 30, 12], {"temperature": 2.0, "top_k": 3, "seed": 2, "max_tokens": 24}),
    (1, [60, 4], {"temperature": 8.0, "top_k": 5, "top_p": 0.6, "seed": 3, "max_tokens": 30}),
    (2, [33, 21, 8, 8], {"temperature": 2.5, "min_p": 0.2, "seed": 4, "max_tokens": 24}),
    (3, [11] * 6, {"temperature": 0, "max_tokens": 10}),
    (4, [40, 41, 42], {"temperature": 3.0, "top_p": 0.3, "seed": 5, "max_tokens": 30}),
]
COUNTERS = ("output_tokens",)
EFFECT = ("steps", "output_tokens")


def cases():
    """(call, value, likely cause)"""
    def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
        settings = [torch.tensor(x if isinstance(x, list) else [x] * len(logits))
                    for x in (temperature, top_k, top_p, min_p)]
        settings = [settings[0].float(), settings[1], *(s.float() for s in settings[2:])]
        return kernels.token_probabilities(logits.clone(), *settings)

    row = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).log()[:, :4]  # probabilities 0.4 0.3 0.2 0.1
    logits = "logits of 0.4 0.3 0.2 0.1"
    yield f"{logits}, nothing else", probabilities(row), "with everything off this is softmax"
    yield f"{logits}, temperature 0.5", probabilities(row, 0.5), "logits are divided by the temperature, before softmax"
    yield f"{logits}, top_k 2", probabilities(row, top_k=2), "top-k keeps exactly the k largest (and ties with the last)"
    yield f"{logits}, top_p 0.5", probabilities(row, top_p=0.5), "top-p keeps the token that crosses p"
    yield f"{logits}, top_p 0.1", probabilities(row, top_p=0.1), "the most likely token always stays"
    yield (f"{logits}, top_k 2 and top_p 0.5", probabilities(row, top_k=2, top_p=0.5),
           "top-p looks at the probabilities that top-k left, which sum to 1 again: here 0.57 and 0.43")
    yield f"{logits}, min_p 0.3", probabilities(row, min_p=0.3), "min-p is a share of the largest probability, not absolute"
    yield ("logits of 0.2 0.4 0.1 0.3, top_p 0.75", probabilities(row[:, [2, 0, 3, 1]], top_p=0.75),
           "the answer must be in the tokens' own order, not sorted")
    yield ("two equal logits at the k-th place, top_k 2", probabilities(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), top_k=2),
           "tokens that tie with the k-th stay")
    mixed = torch.randn(6, 301, generator=torch.Generator().manual_seed(0)) * 3
    yield ("six rows of 301 logits, each with its own settings",
           probabilities(mixed, [1.0, 0.7, 2.0, 1.0, 5.0, 0.1], [0, 5, 0, 300, 1, 0], [0.9, 0.5, 1.0, 0.99, 0.5, 0.9],
                         [0.0, 0.0, 0.05, 0.1, 0.0, 0.5]), "every row has its own settings; 0 and 1 mean off, row by row")
    yield "large logits", probabilities(torch.tensor([[800.0, 790.0, -800.0]]), 0.5), "subtract the maximum before exp"
    given = row.clone()
    kernels.token_probabilities(given, *(torch.tensor([x]) for x in (0.5, 2, 0.5, 0.1)))
    yield f"{logits}, after the call", given, "they belong to the caller: write into a tensor of your own"
