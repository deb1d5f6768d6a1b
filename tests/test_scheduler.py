"""The scheduler and the block pool, one behaviour at a time. Numbers name what other engines got wrong:

 1 full-prompt prefix hit     2 plan before match     3 stale index entry    4 keys that collide     5 equal prompts
 6 preemption                 7 impossible requests   8 limits and stalls    9 chunked prefill      10 abort

test_oracle.py searches for what is not thought of here.
"""

import pytest

from cache import SCRATCH, BlockPool
from scheduler import Request, Scheduler


def make(blocks=16, size=4, *, budget=64, requests=8, length=1000, policy="fcfs", caching=True) -> Scheduler:
    """A scheduler over a new pool with `blocks` blocks that requests can own."""
    return Scheduler(BlockPool(blocks + 1, size, caching), max_batch_tokens=budget, max_batch_requests=requests,
                     max_model_len=length, policy=policy)


def step(s: Scheduler, token=7, check=True) -> dict[Request, int]:
    """One step of an engine whose model always says `token`. Returns what was computed, by request."""
    plan = s.schedule()
    s.pool.take_copies()
    for request, n in plan:
        if s.advance(request, n):
            for sample in s.fork(request):
                sample.tokens.append(token)
                if sample.num_output == sample.max_tokens:
                    s.finish(sample, "length")
    if check:
        s.check()
    return dict(plan)


def drain(s: Scheduler) -> int:
    """Step until nothing is left to do; the number of steps."""
    for steps in range(10_000):
        if not s.has_work():
            return steps
        assert step(s), "work, but an empty plan"
    raise AssertionError("livelock")


def tokens(n: int, first=100) -> list[int]:
    """n tokens that occur nowhere else, if `first` is far enough from other prompts' first."""
    return list(range(first, first + n))


# ------------------------------------------------------------------------------------------------- the prefix index


@pytest.mark.parametrize("k", (1, 2, 3))
def test_prompt_of_whole_blocks_sent_twice(k):
    """1. A full hit would leave no token to compute, hence no logits: the last block is computed again."""
    s, prompt = make(size=4), tokens(4 * k)
    s.add(Request(prompt, 3))
    drain(s)
    again = s.add(Request(prompt, 3))
    assert step(s)[again] == 4 and s.num_hit_tokens == 4 * (k - 1)
    drain(s)
    assert again.tokens == prompt + [7, 7, 7]


def test_a_generated_answer_is_a_prefix_too():
    """1. The next turn of a chat hits the blocks of prompt and answer before it, as far as they were full."""
    s = make(size=4)
    first = s.add(Request(tokens(6), 7))  # 13 tokens, 12 of them computed
    drain(s)
    turn = s.add(Request(first.tokens + tokens(2, 900), 1))
    assert step(s) == {turn: 3} and s.num_hit_tokens == 12


def test_a_hit_in_free_blocks_is_charged_against_capacity():
    """2. Cached blocks in the free list count as taken once they are adopted: they cannot serve a second purpose."""
    s = make(blocks=4, size=4)
    s.add(Request(tokens(8), 1))
    drain(s)  # both blocks free, both still cached
    assert s.pool.stats() == {"blocks_used": 0, "blocks_cached": 2, "blocks_free": 2}
    running = s.add(Request(tokens(5, 500), 9))
    step(s)
    big = s.add(Request(tokens(15), 2))  # needs 2 blocks besides its hit; 2 are free, and they are the hit
    assert len(s.pool.match(big.tokens)) == s.pool.num_free == 2
    assert step(s) == {running: 1} and big.status == "waiting" and big.block_table == []
    s.finish(running, "abort")
    assert step(s) == {big: 7} and s.pool.num_free == 0


def test_a_reused_block_leaves_the_index():
    """3. Its old contents must not match any more."""
    pool = BlockPool(num_blocks=2, block_size=2)
    table = [pool.allocate()]
    pool.publish(table, 0, [1, 2])
    pool.release(table)
    assert pool.match([1, 2, 3]) == [1]
    pool.allocate()
    assert pool.match([1, 2, 3]) == [] and pool.index == {}


def test_a_reused_twin_leaves_the_entry_of_the_other_alone():
    """3. The index entry goes only if it points at the block that is reused."""
    pool = BlockPool(num_blocks=3, block_size=2)
    first, twin = [pool.allocate()], [pool.allocate()]
    pool.publish(first, 0, [1, 2])
    pool.publish(twin, 0, [1, 2])
    pool.release(twin)
    pool.allocate()  # the twin's block
    assert pool.match([1, 2, 3]) == first
    pool.check([first, [2]])


def test_equal_tokens_after_another_prefix_are_another_block():
    """3. A child's key names what its parent contained, not which block that was: blocks are recycled."""
    pool = BlockPool(num_blocks=4, block_size=2)
    table = [pool.allocate(), pool.allocate()]
    pool.publish(table, 0, [1, 1, 5, 5])
    pool.publish(table, 1, [1, 1, 5, 5])
    head = table[:1]
    pool.release(head)  # as if only the head were freed, and reused for another prefix
    other = [pool.allocate(), pool.allocate()]
    assert other[1] == table[0]
    pool.publish(other, 0, [2, 2])
    pool.publish(other[1:], 0, [3, 3])
    assert pool.match([1, 1, 5, 5, 0]) == [] and pool.match([3, 3, 5, 5, 0]) == other[1:]


def test_keys_are_exact_and_include_the_root():
    """4. Tokens that collide under Python's hash stay apart, and so do equal prompts under unequal roots."""
    assert hash((-1,)) == hash((-2,))
    s = make(size=1)
    s.add(Request([-1, 5], 1))
    drain(s)
    assert s.pool.match([-2, 5]) == []
    for root in (None, "adapter", ("adapter", "salt")):
        s.add(Request(tokens(9), 1, root=root))
        drain(s)
    assert s.num_hit_tokens == 0
    s.add(Request(tokens(9), 1, root=("adapter", "salt")))
    drain(s)
    assert s.num_hit_tokens == 8


def test_two_equal_prompts_in_one_step():
    """5. Both miss, both keep their own blocks, and the chain goes on from either."""
    s, prompt = make(size=4), tokens(9)
    a, b = s.add(Request(prompt, 1)), s.add(Request(prompt, 5))
    assert step(s) == {a: 9, b: 9} and s.num_hit_tokens == 0
    assert a.status == "finished" and s.pool.match(b.tokens) != b.block_table[:2]  # the index keeps a's, now free
    drain(s)
    late = s.add(Request([*prompt, 7, 7, 7, 0], 1))  # two blocks that a computed, one that only b did
    assert step(s) == {late: 1} and s.num_hit_tokens == 12


def test_a_block_is_published_when_computed_not_when_planned():
    """9. A prompt half-way through matches exactly as far as it was computed."""
    s, prompt = make(size=4, budget=6, requests=2), tokens(20)
    s.add(Request(prompt, 1))
    found = []
    for _ in range(3):
        s.schedule()
        found.append(len(s.pool.match(prompt)))
        s.advance(s.running[0], 6)
    assert found == [0, 1, 3]  # of 0, 6, 12 computed tokens


def test_reuse_is_optional():
    """Requests that need every position computed, and pools without an index, never hit."""
    s = make()
    s.add(Request(tokens(12), 1))
    drain(s)
    whole = s.add(Request(tokens(12), 1, reuse_prefix=False))
    assert step(s) == {whole: 12}
    s = make(caching=False)
    for _ in range(2):
        request = s.add(Request(tokens(12), 1))
        assert step(s) == {request: 12}
    assert s.pool.index == {} and s.num_hit_tokens == 0


def test_forget_empties_the_index_and_disturbs_nobody():
    """After `forget` nothing hits, and who is running goes on."""
    s, prompt = make(), tokens(9)
    running = s.add(Request(prompt, 9))
    step(s)
    s.pool.forget()
    assert s.pool.match(prompt) == []
    drain(s)
    assert running.tokens == prompt + [7] * 9
    other = s.add(Request(prompt, 1))
    assert step(s) == {other: 9}


def test_least_recently_freed_blocks_are_reused_first():
    """Never-used blocks first, then the prefix that was freed longest ago."""
    s = make(blocks=6, size=2)
    for first in (100, 200, 300):
        s.add(Request(tokens(4, first), 1))
        drain(s)
    s.add(Request(tokens(4, 100), 1))  # touches the oldest, which is thereby the newest
    drain(s)
    s.add(Request(tokens(4, 400), 1))  # needs two blocks
    step(s)
    left = [first for first in (100, 200, 300) if len(s.pool.match([*tokens(4, first), 0])) == 2]
    assert left == [100, 300]


def test_tails_are_reused_before_heads():
    """A prefix without its head could never be matched again; without its tail, most of it can."""
    pool = BlockPool(num_blocks=5, block_size=1)
    table = [pool.allocate() for _ in range(4)]
    for i in range(4):
        pool.publish(table, i, [1, 2, 3, 4])
    pool.release(table)
    for left in (3, 2, 1, 0):
        pool.allocate()
        assert len(pool.match([1, 2, 3, 4, 0])) == left


# ------------------------------------------------------------------------------------------------------ preemption


def test_preemption_loses_nothing():
    """6. Tokens are kept, recomputed on resume, and max_tokens is counted once; each resume samples exactly one."""
    s = make(blocks=5, size=2, requests=3)
    requests = [s.add(Request(tokens(2, 100 * i), 8)) for i in range(1, 4)]
    drain(s)
    assert s.num_preemptions > 0
    for i, request in enumerate(requests, 1):
        assert request.tokens == tokens(2, 100 * i) + [7] * 8 and request.finish_reason == "length"
    assert s.pool.num_free == 5


def test_the_least_urgent_is_preempted():
    """6. Not the one that asks for memory, and not the last that was admitted."""
    s = make(blocks=4, size=2, policy="priority")
    relaxed = s.add(Request(tokens(3, 100), 6, priority=9))
    step(s)
    urgent = s.add(Request(tokens(3, 200), 6, priority=1))
    step(s)
    assert step(s)[urgent] == 1 and relaxed.status == "waiting"  # both need a third block, none is left
    assert (relaxed.num_preemptions, urgent.num_preemptions) == (1, 0)
    assert relaxed.num_computed == 0 and relaxed.block_table == [] and relaxed.num_output == 2
    drain(s)
    assert relaxed.num_output == urgent.num_output == 6


def test_a_request_half_way_through_its_prompt_is_preemptible():
    """6. Otherwise a prompt that waits for memory holds on to memory others wait for."""
    s = make(blocks=6, size=2, budget=3, requests=2)
    decoding = s.add(Request(tokens(3), 9))
    step(s)
    prompt = s.add(Request(tokens(8, 500), 1))  # gets two tokens per step, while the other grows into its room
    while not s.num_preemptions:
        assert step(s)[decoding] == 1
    assert 0 < prompt.num_behind == 8 and prompt.status == "waiting"
    drain(s)
    assert prompt.num_output == 1 and decoding.num_output == 9


def test_a_planned_victim_leaves_the_plan_and_refunds_its_budget():
    """6. What was set aside for a victim goes to those behind it, in the same step."""
    s = make(blocks=4, size=4, budget=3, requests=3, policy="priority")
    victim = s.add(Request(tokens(2, 100), 8, priority=9))
    step(s)
    grower = s.add(Request(tokens(1, 200), 8, priority=5))
    step(s)
    long = s.add(Request(tokens(8, 300), 1, priority=1))
    for _ in range(3):
        assert step(s) == {victim: 1, grower: 1, long: 1}
    assert s.pool.num_free == 0 and grower.num_computed == 4
    assert step(s) == {grower: 1, long: 2}  # the victim was planned first, then the grower needed a block
    drain(s)
    assert (victim.num_output, grower.num_output, long.num_output) == (8, 8, 1) and s.num_preemptions == 1


def test_nobody_is_admitted_in_a_step_that_preempts():
    """6. The room a victim leaves is for those running, not for the next in line; the victim keeps its place there."""
    s = make(blocks=4, size=2, policy="priority")
    a, victim = s.add(Request(tokens(3, 100), 6, priority=1)), s.add(Request(tokens(3, 200), 6, priority=9))
    step(s)
    step(s)
    late = s.add(Request(tokens(1, 300), 1, priority=9))
    small = s.add(Request(tokens(1, 400), 1, priority=5))  # would fit at once
    assert step(s) == {a: 1} and s.waiting == [small, victim, late] and s.pool.num_free == 1
    assert step(s) == {a: 1, small: 1}
    drain(s)


# ------------------------------------------------------------------------------------- refusals, limits, and stalls


@pytest.mark.parametrize("request_, message", (
    (Request([], 1), "prompt: is empty"),
    (Request([1], 0), "max_tokens"),
    (Request([1], 1, width=0), "n must be at least 1"),
    (Request(tokens(40), 11), "max_model_len=50"),
    (Request(tokens(30), 4), "9 KV blocks of 4 tokens, the whole cache has 8"),
    (Request([1], 1, width=5), "max_batch_requests=4"),
), ids=lambda value: value if isinstance(value, str) else "")
def test_impossible_requests_are_refused_at_the_door(request_, message):
    """7. With the limit named, and leaving no trace."""
    s = make(blocks=8, size=4, requests=4, length=50)
    with pytest.raises(ValueError, match=message):
        s.add(request_)
    assert not s.has_work() and s.waiting == []


def test_the_largest_possible_requests_pass_the_door_and_finish():
    """7. The last token is sampled but never computed, so it needs no slot."""
    s = make(blocks=8, size=4, length=50)
    request = s.add(Request(tokens(30), 3))
    drain(s)
    assert request.num_output == 3
    s = make(blocks=20, size=4, length=50)
    request = s.add(Request(tokens(10), 40))
    drain(s)
    assert request.num_output == 40


@pytest.mark.parametrize("limits, message", (
    ({"policy": "fastest"}, "'fastest' is not one of fcfs, priority, shortest"),
    ({"requests": 0}, "max_batch_requests"),
    ({"requests": 9, "budget": 8}, r"max_batch_tokens \(8\)"),
    ({"blocks": 0}, "num_blocks"),
    ({"size": 0}, "block_size"),
))
def test_bad_settings_are_refused(limits, message):
    """7. A budget below the running limit would let requests stall; a pool of scratch alone serves nobody."""
    with pytest.raises(ValueError, match=message):
        make(**limits)


def test_the_limit_bounds_running_requests():
    """8. Not requests per step: those waiting for budget, and samples to come, count as well."""
    s = make(budget=4, requests=3)
    s.add(Request(tokens(12, 100), 5))  # spends the budget alone for three steps
    for i in range(2, 6):
        s.add(Request(tokens(1, 100 * i), 50))
    for _ in range(10):
        step(s)
        assert len(s.running) <= 3
    s = make(requests=4)
    three = s.add(Request(tokens(5), 3, width=3))
    two = s.add(Request(tokens(5, 500), 3, width=2))
    assert step(s) == {three: 5} and len(s.running) == 3 and two.status == "waiting"
    drain(s)


def test_a_stream_of_long_prompts_does_not_stop_decoding():
    """8. Whoever is one token behind gets its token in every step, whatever else arrives."""
    s = make(blocks=200, size=4, budget=8, requests=4)
    decoding = [s.add(Request(tokens(2, 10_000 * i), 40)) for i in (1, 2)]
    step(s)
    for i in range(39):
        s.add(Request(tokens(50, 100 * i + 50_000), 1))
        plan = step(s)
        assert [plan[request] for request in decoding] == [1, 1] and sum(plan.values()) == 8
    assert all(request.num_output == 40 for request in decoding)


class CountingKey:
    """A policy's key that counts how often the heap compares it."""

    compared = 0

    def __init__(self, value):
        self.value = value

    def __lt__(self, other):
        CountingKey.compared += 1
        return self.value < other.value

    def __eq__(self, other):
        CountingKey.compared += 1
        return self.value == other.value


def test_a_long_queue_costs_nothing_per_step(monkeypatch):
    """8. With 10,000 waiting, a step looks at as many requests as with 100: work is counted, not timed."""
    def work(waiting: int) -> tuple[int, int, int]:
        calls = {"policy": 0, "match": 0}

        def policy(request):
            calls["policy"] += 1
            return CountingKey(0)

        s = make(blocks=8, size=4, policy=policy)
        match = s.pool.match
        monkeypatch.setattr(s.pool, "match", lambda *a: calls.update(match=calls["match"] + 1) or match(*a))
        for i in range(waiting):
            s.add(Request(tokens(5, 10 * i), 12))
        step(s)  # four of them fill the pool
        assert len(s.running) == 4
        calls.update(policy=0, match=0)
        CountingKey.compared = 0
        for _ in range(2):
            step(s, check=False)  # nobody finishes, and the next in line does not fit
        assert CountingKey.compared == 0
        s.finish(s.running[0], "abort")
        assert len(step(s, check=False)) == 4  # one is admitted
        return calls["policy"], calls["match"], CountingKey.compared

    few, many = work(100), work(10_000)
    assert few[:2] == many[:2] == (0, 4)  # a look at the next in line per step, and one after an admission
    assert many[2] < 3 * few[2]  # taking it off the heap: the logarithm


# ------------------------------------------------------------------------------------------------- chunks and forks


def test_only_the_last_chunk_samples():
    """9. A prompt larger than the budget is computed piece by piece, and gets its first token with the last piece."""
    s = make(budget=5, requests=2)
    request = s.add(Request(tokens(13), 2))
    seen = [(step(s)[request], request.num_output) for _ in range(3)]
    assert seen == [(5, 0), (5, 0), (3, 1)]
    assert step(s) == {request: 1} and request.finish_reason == "length"


def test_tables_cover_exactly_the_chunk():
    """9. Blocks are taken as they are needed, at the end of the chunk rather than for the whole prompt."""
    s = make(budget=5, requests=2, size=4)
    request = s.add(Request(tokens(13), 2))
    covered = []
    for _ in range(3):
        s.schedule()
        covered.append(len(request.block_table))
        s.advance(request, min(5, request.num_behind))
    assert covered == [2, 3, 4] and SCRATCH not in request.block_table


def test_samples_share_the_prompt_and_copy_on_write():
    """n samples hold one copy of the prompt; each but the last to write copies the block that is partly filled."""
    s = make(blocks=10, size=4)
    request = s.add(Request(tokens(6), 3, width=3))
    step(s)
    assert [sample.sample_index for sample in request.samples] == [0, 1, 2] and s.pool.num_free == 8
    shared = list(request.block_table)
    s.schedule()
    tables = [sample.block_table for sample in request.samples]
    assert {table[0] for table in tables} == {shared[0]} and len({table[1] for table in tables}) == 3
    assert s.pool.copies == {tables[0][1]: shared[1], tables[1][1]: shared[1]} and tables[2][1] == shared[1]
    assert s.pool.refs[shared[0]] == 3 and s.pool.refs[shared[1]] == 1


def test_a_cancelled_copy_is_not_made():
    """A copy into a block that was freed before the step ran would land in somebody else's."""
    s = make(blocks=10, size=4)
    request = s.add(Request(tokens(6), 3, width=2))
    step(s)
    s.schedule()
    assert len(s.pool.copies) == 1
    s.finish(request, "abort")
    assert s.pool.take_copies() == {}


# ------------------------------------------------------------------------------------------------ abort and policies


def test_abort_from_either_queue():
    """10. Blocks are freed once, the count stays right, and a second end changes nothing."""
    s = make(requests=1)
    running, waiting = s.add(Request(tokens(5), 9)), s.add(Request(tokens(5, 500), 9))
    step(s)
    for request in (waiting, running, running, waiting):
        s.finish(request, "abort")
        s.check()
    assert not s.has_work() and s.schedule() == [] and s.pool.num_free == 16
    s.finish(running, "length")
    assert running.finish_reason == "abort" and running.num_output == 1


def test_aborted_entries_do_not_pile_up():
    """10. The heap drops aborted requests as they surface, or when they are the majority."""
    s = make(requests=1)
    s.add(Request(tokens(4), 50))
    step(s)
    for i in range(5_000):
        s.finish(s.add(Request(tokens(4, 10 * i), 1)), "abort")
    assert s.num_waiting == 0 and len(s._heap) <= 64
    stay = [s.add(Request(tokens(4, 10 * i), 1)) for i in range(20)]
    for i in range(1_000):
        s.finish(s.add(Request(tokens(4, 10 * i), 1)), "abort")
    assert s.waiting == stay and len(s._heap) <= 2 * 20 + 64


@pytest.mark.parametrize("policy, order", (
    ("fcfs", "abcd"),
    ("priority", "bdac"),  # equal priorities: who came first
    ("shortest", "cabd"),  # by prompt + max_tokens
    (lambda request: -request.num_prompt, "dbac"),
))
def test_policies(policy, order):
    """A policy is a key over requests: the smallest is admitted first. Ties go to whoever came first."""
    s = make(requests=1, policy=policy)
    shapes = {"a": (4, 4, 5), "b": (6, 4, 1), "c": (2, 2, 5), "d": (9, 3, 1)}  # prompt, max_tokens, priority
    names = {s.add(Request(tokens(n, 100 * n), most, priority=priority)): name
             for name, (n, most, priority) in shapes.items()}
    assert "".join(names[request] for request in s.waiting) == order
    admitted = []
    while s.has_work():
        for request in step(s):
            if names[request] not in admitted:
                admitted.append(names[request])
    assert "".join(admitted) == order


def test_a_key_is_taken_once():
    """A key that would change while a request waits cannot upset the queue."""
    keys = iter((5, 3, 4))
    s = make(requests=1, policy=lambda request: next(keys))
    a, b, c = (s.add(Request(tokens(3, 10 * i), 2)) for i in range(3))
    assert s.waiting == [b, c, a]
    drain(s)


def test_samples_are_as_urgent_as_the_request_they_come_from():
    """All go before whoever came later, so under pressure the latecomer is preempted; among themselves the last sample."""
    s = make(blocks=8, size=2)
    first, late = s.add(Request([1, 2, 3], 9, width=3)), s.add(Request([5, 6, 7, 8], 6))
    preempted = []
    while s.has_work():
        before = set(s.running)
        step(s)
        preempted += [request for request in before if request.status == "waiting"]
    assert preempted and preempted[0] is late
    assert [sample.arrival for sample in first.samples] == [first.arrival] * 3
    assert [sample.urgency[2] for sample in first.samples] == [0, 1, 2]
    assert first.samples[0] not in preempted
