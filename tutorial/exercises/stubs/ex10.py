"""Exercise 10: policy: a fair share, with a bound

A policy: share the server among tenants, whatever they ask for, and keep a bound that can be proved.

First come, first served lets whoever sends most have most. VTC (arXiv:2401.00588) counts instead: each tenant has a
counter of what it was served, a prompt token weighs self.input_weight (1) and a generated token self.output_weight (2), and
the waiting tenant with the least goes first. Three functions do that:

  level     what the queue sorts tenants by, the smallest first. It may grow while a tenant waits, but never shrink.
  admitted  called when a request leaves the queue to run; is_empty says that it was the last one there. A preempted request
            comes by a second time (request.num_preemptions > 0), and what is computed again costs nothing.
  sampled   called when a step has generated n tokens for a request.

The catch is who comes back. A tenant that was away for an hour has the least counter of all, and would have the server to
itself until it has caught up: nobody saves up. So keep a floor, below which no counter counts.

You need: self.counters, an empty dict {tenant: number} at first; self.floor, 0 at first; the two weights; request.tenant,
request.num_prompt. `lane` is the tenant. What is asked for, on the trace of this exercise, in which two run at a time:

    while two tenants both have requests waiting, the service they get never differs by more than 2 U = 88,
    where U is what one of them can get without being chosen again: a longest prompt, and longest outputs in both places

    first come, first served:              320
    counters without a floor:              153
    the engine's:                           50
"""


def level(self, lane):
    """The counter of the tenant `lane`, lifted to the floor."""
    raise NotImplementedError


def admitted(self, request, is_empty):
    """Lift the floor to the tenant's counter, then the counter by the prompt; if nobody waits now, the floor as well."""
    raise NotImplementedError


def sampled(self, request, n):
    """Count n tokens of output."""
    raise NotImplementedError
