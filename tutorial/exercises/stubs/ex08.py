"""Exercise 08: policy: a token budget that does not stall

A policy: choose the token budget of each step, so that nobody who is reading has to wait, and nobody's time is
wasted.

A large budget computes long prompts quickly, but everybody who is decoding waits for that step: a *stalled* step is
one that computes more than 16 tokens while somebody decodes. A small budget never stalls, and takes many steps. The
engine asks your function before each step. There is no one right answer. What is asked for, on the trace of this
exercise:

    no stalled step, and at most 15 steps of waiting for first tokens, all seven requests together

    a fixed budget of 64:  2 stalled steps,  6 steps of waiting
    a fixed budget of 32:  4 stalled steps, 17 steps of waiting
    a fixed budget of 16:  0 stalled steps, 38 steps of waiting
"""

STALL_FREE, LARGEST = 16, 64  # tokens a step may compute while somebody decodes; and at most


def budget(running: list, waiting: list) -> int:
    """How many tokens the next step may compute, from 8 to LARGEST.

    `running` and `waiting` are lists of Request; those that generated something already (num_output > 0) and run are
    decoding. While anybody decodes, at most STALL_FREE tokens; no budget may be smaller than the number of running requests.
    """
    raise NotImplementedError
