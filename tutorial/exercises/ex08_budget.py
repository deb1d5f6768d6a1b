"""A policy: choose the token budget of each step, so that nobody who is reading has to wait, and nobody's time is
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

from types import SimpleNamespace

from exercises import prompt

TITLE = "policy: a token budget that does not stall"
CHAPTER, KIND = "ch07_batching.py", "policy"
MINUTES, DIFFICULTY, IMPORTANCE = 25, 2, 4
MODULE, NAMES = "exercises.ex08_budget", ("budget",)
HINTS = (
    "When does a large budget hurt nobody?",
    "A request is decoding once it has generated something: request.num_output > 0.",
    "Nobody decodes: take LARGEST. Somebody decodes: how many tokens may the step compute at most?",
)
HEADER = "STALL_FREE, LARGEST = 16, 64  # tokens a step may compute while somebody decodes; and at most\n"
MUTANTS = {
    "always the largest": (("return LARGEST if not decoding else STALL_FREE", "return LARGEST"),),
    "always the smallest": (("return LARGEST if not decoding else STALL_FREE", "return STALL_FREE"),),
    "looks at the queue instead": (("for request in running", "for request in waiting"),),
    "the wrong way round": (("if not decoding", "if decoding"),),
    "takes running for decoding": (("any(request.num_output > 0 for request in running)", "bool(running)"),),
}
STALL_FREE, LARGEST = 16, 64


def budget(running: list, waiting: list) -> int:
    """How many tokens the next step may compute, from 8 to LARGEST.

    `running` and `waiting` are lists of Request; those that generated something already (num_output > 0) and run are
    decoding. While anybody decodes, at most STALL_FREE tokens; no budget may be smaller than the number of running requests.
    """
    decoding = any(request.num_output > 0 for request in running)
    return LARGEST if not decoding else STALL_FREE


ENGINE = {"max_batch_tokens": 64, "blocks": 100}
REQUESTS = [(arrives, prompt(length, arrives + length), {"temperature": 0, "max_tokens": output})
            for arrives, length, output in ((0, 100, 6), (0, 90, 8), (26, 110, 6), (44, 5, 9), (46, 60, 4), (66, 105, 6),
                                            (84, 95, 9))]
COUNTERS = ("output_tokens",)
EFFECT = ("stalled_steps", "first_token_at", "longest_gap", "steps")
MOST_WAITING = 15


def before_step(llm):
    """The engine's loop asks the policy."""
    llm.scheduler.max_batch_tokens = budget(list(llm.scheduler.running), llm.scheduler.waiting)


def goal(counters: dict) -> str:
    """What is missing, or an empty text."""
    stalled = counters["stalled_steps"]
    waited = sum(first - arrival for first, (arrival, _, _) in zip(counters["first_token_at"], REQUESTS))
    return "" if not stalled and waited <= MOST_WAITING else (
        f"the tokens are right; {stalled} steps stalled (none may), and first tokens were waited for {waited} steps in all "
        f"(at most {MOST_WAITING})")


def cases():
    """(call, value, likely cause)"""
    new, half, old = (SimpleNamespace(num_output=output, num_behind=behind, num_computed=computed)
                      for output, behind, computed in ((0, 90, 0), (0, 20, 64), (3, 1, 80)))

    def asked(running, waiting, least=STALL_FREE + 1, most=LARGEST):
        n = budget(running, waiting)
        return f"from {least} to {most}" if isinstance(n, int) and least <= n <= most else f"{n}"

    yield "nobody there", asked([], [], 8), "a number from 8 to 64"
    yield "one prompt runs, one waits", asked([new], [new]), "nobody is reading yet, so nobody can be stalled"
    yield "a half computed prompt runs", asked([half], []), "a prompt under way is not decoding"
    yield "one decodes, one prompt waits", asked([old], [new], 8, STALL_FREE), "at most 16 while somebody decodes"
    yield "one decodes beside a prompt", asked([half, old], [], 8, STALL_FREE), "it does not matter who comes first"
    yield "a preempted request waits", asked([new], [old]), "who waits is not decoding"
    yield "eight decode", asked([old] * 8, [], 8, STALL_FREE), "every running request needs a token"
