"""Exercise 09: goodput: who was served in time

Write the account that a scheduler keeps of who was served in time: goodput.

Two functions. `_time_token` is called for each token of a request that has targets or a deadline, just before the token is
appended; `_count_goodput` when such a request has ended, for whatever reason.

You need: self.clock() (the time now, in seconds); of the request ttft_target, itl_target and deadline (seconds, each None if
there is none), arrival_time and last_token_time (equal before the first token), in_time (True until a target is missed),
num_output (tokens appended so far) and finish_reason ("stop", "length" or "abort"); and the counters
self.num_with_targets and self.num_in_time. Here the clock does not tick in seconds: a step takes as long as it has tokens.

The unit cases show ([in_time after each step, ...], num_with_targets, num_in_time).
"""

from scheduler import Request


def _time_token(self, request: Request) -> None:
    """Hold the token that is about to be appended against its target: the first against `ttft_target`, in seconds since
    the request arrived, any other against `itl_target`, since the token before it. None is no target, and just in time
    is in time. A request that misses one is not `in_time` any more, however fast its other tokens come.
    """
    raise NotImplementedError


def _count_goodput(self, request: Request) -> None:
    """Count a request that has ended and had targets or a deadline; in `num_in_time` too unless it was aborted, missed a
    target, or ended more than `deadline` seconds after it arrived, in a step that began before.
    """
    raise NotImplementedError
