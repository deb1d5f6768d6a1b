"""A bug hunt: five requests on a small pool, and one of them gets a strange answer.

One of the three functions below has a bug that somebody shipped: it kept its mouth shut in every test in which memory
was plentiful. Here there are 16 blocks of four tokens, and a step computes at most 5 tokens:

    request   0    1    2    3    4
    prompt   12    9   14    6    3    tokens
    output   18   16   12   10    9    tokens asked for
    arrives   0    0    1    1    9    at step

Find it and put it right; then say in BROKEN whose answer it spoiled, and in WHY what was wrong with that answer. (It shows
`schedule`: whoever means to write that, in exercise 05, does so before.)
"""

from cache import BlockPool
from exercises import prompt
from scheduler import Request, Scheduler

TITLE = "bug hunt: preemption"
CHAPTER, KIND = "ch08_scheduling.py", "bug hunt"
MINUTES, DIFFICULTY, IMPORTANCE = 30, 3, 4
MODULE, NAMES = "scheduler", ("Scheduler.schedule", "Scheduler.advance", "Scheduler.preempt")
HEADER = "from scheduler import RUNNING, Request\n"
HINTS = (
    "Add up the blocks that requests 0 to 3 need at their full length. Who is the least urgent when the pool runs dry?",
    "A preempted request loses its blocks and nothing else. List what a Request remembers, and who reads it later.",
    "How does the engine know when a request has generated enough? Which of the two numbers in that sum changed?",
)
PLANTED = ("    request.num_computed = 0\n",
           "    request.num_computed = 0\n    request.num_prompt = len(request.tokens)  # its output is context now\n")
MUTANTS = {
    "still takes the output for a prompt": (("    request.num_computed = 0\n",
                                             "    request.num_computed, request.num_prompt = 0, len(request.tokens)\n"),),
    "throws the generated tokens away and counts on": (
        ("    request.num_computed = 0\n",
         "    request.num_computed = 0\n    request.max_tokens -= request.num_output\n"),),
    "forgets to queue it again": (("    self._enqueue(request)", "    request.status = 'waiting'"),),
    "leaks the blocks": (("    self.pool.release(request.block_table)\n", "    request.block_table = []\n"),),
    "samples as soon as the prompt is computed": (("    if request.num_behind:\n",
                                                   "    if request.num_computed < request.num_prompt:\n"),),
}
ENGINE = {"blocks": 16, "max_batch_tokens": 5, "max_batch_requests": 5, "prefix_caching": False}
REQUESTS = [(arrives, prompt(length, length), {"temperature": 0, "max_tokens": output})
            for arrives, length, output in ((0, 12, 18), (0, 9, 16), (1, 14, 12), (1, 6, 10), (9, 3, 9))]
COUNTERS = ("steps", "computed_tokens", "preemptions")
EFFECT = ("steps", "computed_tokens", "preemptions", "peak_blocks")


def cases():
    """(call, value, likely cause)"""
    s = Scheduler(BlockPool(10, 2, prefix_caching=False), max_batch_tokens=4, max_batch_requests=4, max_model_len=40)
    requests = [s.add(Request([i] * n, m)) for i, (n, m) in enumerate(((4, 8), (3, 9), (5, 5)))]
    for i in range(40):
        if not s.has_work():
            break
        sampled = []
        for request, n in s.schedule():
            if s.advance(request, n):
                request.tokens.append(9)
                sampled.append(request.arrival)
                if request.num_output >= request.max_tokens:
                    s.finish(request, "length")
        s.check()
        yield (f"step {i}: who sampled, who runs, who waits", (sampled, [r.arrival for r in s.running],
               [r.arrival for r in s.waiting]), "who is preempted queues again; who catches up samples, and nobody else")
        yield (f"step {i}: prompt, output and preemptions of each", [(r.num_prompt, r.num_output, r.num_preemptions)
               for r in requests], "preemption takes blocks away, and changes nothing that was said or asked")
    yield "at the end", (s.has_work(), s.pool.num_free), "everything finished, every block free"
