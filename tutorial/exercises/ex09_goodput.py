"""Write the account that a scheduler keeps of who was served in time: goodput.

Two functions. `_time_token` is called for each token of a request that has targets or a deadline, just before the token is
appended; `_count_goodput` when such a request has ended, for whatever reason.

You need: self.clock() (the time now, in seconds); of the request ttft_target, itl_target and deadline (seconds, each None if
there is none), arrival_time and last_token_time (equal before the first token), in_time (True until a target is missed),
num_output (tokens appended so far) and finish_reason ("stop", "length" or "abort"); and the counters
self.num_with_targets and self.num_in_time. Here the clock does not tick in seconds: a step takes as long as it has tokens.

The unit cases show ([in_time after each step, ...], num_with_targets, num_in_time).
"""

from types import SimpleNamespace

from cache import BlockPool
from exercises import prompt
from scheduler import Request, Scheduler

TITLE = "goodput: who was served in time"
CHAPTER, KIND = "ch03_measuring.py", "fill in"
MINUTES, DIFFICULTY, IMPORTANCE = 20, 2, 3
MODULE, NAMES = "scheduler", ("Scheduler._time_token", "Scheduler._count_goodput")
HEADER = "from scheduler import Request\n"
HINTS = (
    "A token that comes `now` took now - request.last_token_time: since the request arrived if it is the first, since the "
    "token before it if not. Whoever was preempted in between has waited like anybody else: nothing is to be done about it.",
    "request.num_output is 0 when the first token is timed: it is appended a moment later. Remember `now` for the next one.",
    "in_time only ever goes from True to False: combine what it was with what is new, do not replace it.",
    "An abort may come before anything was missed. And a request can end too late without being aborted: deadlines are "
    "looked at before a step, and its last step may have begun in time. So _count_goodput asks the clock as well.",
)
MUTANTS = {
    "a mean gap in time is enough": (
        ("now - request.last_token_time <= target",
         "(now - request.arrival_time) / (request.num_output + 1) <= target"),),
    "a token in time makes up for a late one": (("request.in_time &= ", "request.in_time = "),),
    "the first token has the target of the others": (
        ("request.itl_target if request.num_output else request.ttft_target", "request.itl_target"),),
    "all tokens are timed from the arrival": (("    request.last_token_time = now\n", ""),),
    "just in time is too late": (("<= target", "< target"),),
    "no target is a missed one": (("target is None or ", "target is not None and "),),
    "an aborted request counts if it was in time so far": (('request.finish_reason != "abort" and ', ""),),
    "who ends after the deadline is in time": ((" and not late", ""),),
    "who was late is not counted at all": (("self.num_with_targets += request.width",
                                            "self.num_with_targets += request.in_time"),),
}
ENGINE = {"blocks": 14, "max_batch_tokens": 8, "max_batch_requests": 6, "prefix_caching": False}
REQUESTS = [(arrives, prompt(length, arrives + length), {"temperature": 0, "max_tokens": output, **targets})
            for arrives, length, output, targets in (
                (0, 5, 14, {"itl_target": 6}), (4, 12, 5, {"ttft_target": 16}), (5, 3, 9, {"itl_target": 8}),
                (6, 9, 8, {"ttft_target": 40, "itl_target": 20}), (8, 4, 9, {"deadline": 55}), (9, 11, 6, {"deadline": 45}))]
REQUESTS.append((12, prompt(6, 6), {"temperature": 1.2, "seed": 7, "n": 2, "max_tokens": 9, "itl_target": 8}))
COUNTERS = ("steps", "computed_tokens", "with_targets", "goodput")
EFFECT = ("with_targets", "goodput", "preemptions", "output_tokens")


def before_step(llm):
    """A client hangs up."""
    if llm.counts["steps"] == 9:
        llm.abort(next(request for request in llm.scheduler.running if request.arrival == 2))


def served(*gaps, others=(), places=4, output=3, hangs_up=None, **options):
    """A request after steps that took so long: whether it was in time after each, and both counters at the end.

    others: prompts of so many tokens came before it, without targets; hangs_up: after which step its client does
    """
    clock, shown = SimpleNamespace(now=100.0), []
    s = Scheduler(BlockPool(61, 4, prefix_caching=False), max_batch_tokens=8, max_batch_requests=places, max_model_len=100,
                  clock=lambda: clock.now)
    *_, request = [s.add(Request([1] * length, 4)) for length in others] + [s.add(Request([2] * 4, output, **options))]
    for i, gap in enumerate(gaps):
        plan = s.schedule()
        clock.now += gap
        for planned, n in plan:
            if s.advance(planned, n):
                for sample in s.fork(planned):
                    sample.tokens.append(7)
                    if sample.num_output >= sample.max_tokens:
                        s.finish(sample, "length")
        shown.append(request.in_time)
        if i == hangs_up:
            s.finish(request, "abort")
    return shown, s.num_with_targets, s.num_in_time


def cases():
    """(call, value, likely cause)"""
    for gaps, options, cause in (
            ((4, 1, 1), {"ttft_target": 5}, "who ends without having missed anything counts in both"),
            ((5, 1, 1), {"ttft_target": 5}, "a token that comes just in time is in time"),
            ((1, 1, 4, 1, 1), {"itl_target": 3, "output": 5}, "one gap too long is a miss, whatever the mean"),
            ((1, 4, 0, 0, 0), {"itl_target": 3, "output": 5}, "who has missed a target is never in time again"),
            ((6, 1, 1), {"ttft_target": 5}, "the first token has a target of its own"),
            ((9, 2, 2), {"itl_target": 2}, "the first token has the ttft_target, and here there is none"),
            ((1, 9, 9), {"ttft_target": 2}, "None is no target"),
            ((3, 3, 3), {"itl_target": 3}, "a gap begins with the token before, not with the arrival"),
            ((1, 0, 0), {"ttft_target": 0, "itl_target": 0}, "0 is a target, None is not"),
            ((2,) * 9, {"ttft_target": 9, "others": (3, 3), "places": 2}, "waiting in the queue belongs to the first token"),
            ((2,) * 4, {"ttft_target": 4, "width": 3}, "each of the three samples is counted when it ends"),
            ((2, 2, 2), {"deadline": 6}, "an end just in time is in time"),
            ((2, 2, 3), {"deadline": 6}, "the last step began in time and ended too late: ask the clock again at the end"),
            ((1,), {"deadline": 0, "output": 1}, "0 is a deadline, None is not"),
            ((2, 5, 1), {"deadline": 6}, "who was ended by its deadline had targets, and was not in time"),
            ((1, 1, 1), {"ttft_target": 5, "hangs_up": 1}, "who was aborted is not goodput: look at finish_reason"),
            ((1, 1, 1), {}, "for a request without targets the scheduler does not call you")):
        said = ", ".join(f"{name} {value}" for name, value in options.items())
        yield f"steps of {', '.join(map(str, gaps))}; {said or 'no targets'}", served(*gaps, **options), cause
