"""A bug hunt: one request in this trace comes out wrong, and the others are perfect.

The functions below lay the tokens of a step end to end and work out where each one stands, where its keys and values
go and how far it may look. Somebody has made a change that looked harmless. Seven requests were served with at most
16 tokens a step:

    request   0    1    2    3    4    5    6
    prompt   11    5    2   13   28   16    7    tokens
    arrives   0    0    3    6   14   26   27    at step

Prefix caching is off. Find the change and put it right; then say in BROKEN which request it hurt, and in WHY why only
that one.
"""

import torch

from exercises import engine, prompt
from nanoserve import SamplingParams

TITLE = "bug hunt: a position gone wrong"
CHAPTER, KIND = "ch07_batching.py", "bug hunt"
MINUTES, DIFFICULTY, IMPORTANCE = 30, 3, 4
MODULE, NAMES = "nanoserve", ("LLM.pack", "LLM.lay_out")
HEADER = ("import numpy as np\nimport torch\n\n"
          "from cache import SCRATCH\nfrom nanoserve import Batch, Request, Sampler, Span\n")
HINTS = (
    "Before reading code: which of the seven has a step that no other has? Work out what each computes in its first steps.",
    "A step computes tokens[num_computed : num_computed + n]. List who may have num_computed > 0 with n > 1.",
    "Follow `starts` through `lay_out`: what is computed from it, and what from that?",
)
PLANTED = ("(query_start[:-1] - starts)[owner]",
           "(query_start[:-1] - starts * [r.num_output > 0 for r, *_ in spans])[owner]")
MUTANTS = {
    "still starts later chunks at zero": (
        ("(query_start[:-1] - starts)[owner]", "(query_start[:-1] - np.where(counts > 1, 0, starts))[owner]"),),
    "starts everything at zero": (("(query_start[:-1] - starts)[owner]", "query_start[:-1][owner]"),),
    "forgets the new tokens in the context": (("rows, ends, query_start", "rows, np.maximum(starts, 1), query_start"),),
    "samples the first row of a chunk": (("sampled.append((row + last + j,", "sampled.append((row + start + j,"),),
    "writes to the neighbour's slot": (("+ positions % size\n", "+ (positions + 1) % size\n"),),
}
ENGINE = {"max_batch_tokens": 16, "prefix_caching": False}
REQUESTS = [(arrives, prompt(length, arrives + length), {"temperature": 0, "max_tokens": 9})
            for arrives, length in ((0, 11), (0, 5), (3, 2), (6, 13), (14, 28), (26, 16), (27, 7))]
COUNTERS = ("steps", "computed_tokens")
EFFECT = ("steps", "computed_tokens")


def cases():
    """(call, value, likely cause)"""
    llm = engine(max_batch_tokens=10, prefix_caching=False)
    for length in (4, 17, 3):
        llm.add_request(prompt(length, length), SamplingParams(temperature=0, max_tokens=4))
    for i in range(6):
        plan = llm.scheduler.schedule()
        batch, samplers, _ = llm.pack(plan)
        step = f"step {i}, {', '.join(f'{n} of request {r.arrival} from {r.num_computed}' for r, n in plan)}"
        yield f"{step}: positions", batch.positions, "a chunk goes on where the last one ended"
        yield f"{step}: slots", batch.slots, "token p lies in block block_table[p // size] at offset p % size"
        yield f"{step}: context_lens", batch.context_lens, "what was computed before plus what is computed now"
        yield f"{step}: query_start", batch.query_start, "one more than there are requests"
        yield f"{step}: rows", batch.rows, "who catches up with this step is sampled at its last row"
        tokens = [1] * len(samplers)
        llm.commit(plan, tokens, [None] * len(tokens))
    yield "dtypes", [batch.tokens.dtype, batch.block_tables.dtype] == [torch.int64, torch.int32], "int64 and int32"
