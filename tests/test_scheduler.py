"""The scheduler and the block pool, one behaviour at a time. Numbers name what other engines got wrong:

 1 full-prompt prefix hit     2 plan before match     3 stale index entry    4 keys that collide     5 equal prompts
 6 preemption                 7 impossible requests   8 limits and stalls    9 chunked prefill      10 abort

test_oracle.py searches for what is not thought of here.
"""

import math
import random
from itertools import combinations

import numpy as np
import pytest

from cache import SCRATCH, BlockPool
from scheduler import MLFQ, Fair, Policy, Priority, Request, Scheduler, Shortest


def make(blocks=16, size=4, *, budget=64, requests=8, length=1000, policy="fcfs", caching=True) -> Scheduler:
    """A scheduler over a new pool with `blocks` blocks that requests can own."""
    return Scheduler(BlockPool(blocks + 1, size, caching), max_batch_tokens=budget, max_batch_requests=requests,
                     max_model_len=length, policy=policy)


def step(s: Scheduler, token=7, check=True) -> dict[Request, int]:
    """One step of an engine whose model always says `token`. Returns what was computed, by request."""
    plan = s.schedule()
    s.pool.take_moves()
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


# -------------------------------------------------------------------------------------------------------- swapping


def swapping(blocks, size, slots, prefers=lambda tokens, blocks: True, **options) -> Scheduler:
    """A scheduler with so many host slots."""
    s = make(blocks, size, **options)
    s.pool = BlockPool(blocks + 1, size, options.get("caching", True), slots)
    s.prefers_swap = prefers
    return s


@pytest.mark.parametrize("slots, prefers, again", ((0, True, True), (99, False, True), (99, True, False)))
def test_what_was_swapped_is_not_computed_again(slots, prefers, again):
    """Every token is computed exactly once, and every block that went out comes back in."""
    s = swapping(5, 2, slots, lambda tokens, blocks: prefers, requests=3, caching=False)
    requests = [s.add(Request(tokens(2, 100 * i), 8)) for i in range(1, 4)]
    total = 0
    while s.has_work():
        total += sum(step(s).values())
    assert s.num_preemptions > 0 and all(request.num_output == 8 for request in requests)
    assert (total > 3 * 9) == again and (again or total == 3 * 9)
    assert s.num_swapped_out == s.num_swapped_in and s.num_swap_freed == 0 and (s.num_swapped_out > 0) == (not again)
    assert sorted(s.pool.free_slots) == list(range(slots)) and s.pool.num_free == 5


def test_swapping_where_there_is_room():
    """A request that finds no slots for all its blocks is computed again; the policy is asked with exact numbers."""
    asked = []
    s = swapping(8, 2, 3, lambda *cost: asked.append(cost) or True)
    big, small = s.add(Request(tokens(7), 2)), s.add(Request(tokens(5, 500), 2))
    step(s)
    s.preempt(big)  # four blocks
    s.preempt(small)  # three
    assert asked == [(7, 4), (5, 3)] and (big.num_computed, small.num_computed) == (0, 5)
    assert big.host_slots == [] and sorted(small.host_slots) == [0, 1, 2] and s.pool.free_slots == []
    s.check()


def test_swapping_in_beside_a_prefix_hit():
    """What is still in the cache is not copied, and a slot that is read in a step is not free in it."""
    s = swapping(4, 2, 3, policy="priority")
    first = s.add(Request(tokens(5), 3))
    step(s)
    table = list(first.block_table)
    s.preempt(first)
    slots = list(first.host_slots)
    assert s.pool.swaps_out == dict(zip(slots, table)) and s.pool.free_slots == []
    urgent = s.add(Request(tokens(4, 500), 1, priority=-1))  # takes the block that was never used, and the tail
    assert step(s) == {urgent: 4} and s.pool.match(first.tokens) == table[:2]
    assert s.schedule() == [(first, 1)] and first.num_computed == 5 and first.block_table[:2] == table[:2]
    assert s.pool.swaps_in == {first.block_table[2]: slots[2]} and s.pool.free_slots == []
    assert (s.num_swapped_out, s.num_swapped_in, s.num_swap_freed, s.num_hit_tokens) == (3, 1, 2, 4)
    s.pool.take_moves()
    assert sorted(s.pool.free_slots) == [0, 1, 2]
    s.check()


def test_swapped_blocks_are_shared_again():
    """Once back, they match for others: the second of two equal requests finds what the first one brought."""
    s = swapping(6, 2, 9)
    a, b = s.add(Request(tokens(5), 3)), s.add(Request(tokens(5), 3))
    step(s)
    s.preempt(a)
    s.preempt(b)
    s.pool.take_moves()
    s.pool.forget()
    assert s.schedule() == [(a, 1), (b, 1)] and a.block_table[:2] == b.block_table[:2]
    assert (s.num_swapped_out, s.num_swapped_in, s.num_swap_freed) == (6, 4, 2)


def test_an_aborted_request_frees_its_host_slots():
    s = swapping(8, 2, 3)
    request = s.add(Request(tokens(5), 3))
    step(s)
    s.preempt(request)
    assert s.pool.free_slots == []
    s.finish(request, "abort")
    s.check()
    assert len(s.pool.free_slots) == 3 and not s.has_work() and s.num_swap_freed == 3


def test_a_block_that_is_still_to_be_filled_is_not_swapped_out():
    """Nothing is lost if somebody has to go in the very step that brings it back: it is computed again."""
    s = swapping(8, 2, 9)
    request = s.add(Request(tokens(5), 3))
    step(s)
    s.preempt(request)
    s.pool.take_moves()
    s.pool.forget()
    s.schedule()
    s.preempt(request)
    assert request.host_slots == [] and request.num_computed == 0
    drain(s)
    assert request.num_output == 3 and len(s.pool.free_slots) == 9


def test_a_copy_that_is_due_is_swapped_out_from_its_source():
    """The block that a sample is about to write is still empty: what belongs there is in the one it shares."""
    s = swapping(10, 4, 4)
    request = s.add(Request(tokens(6), 3, width=2))
    step(s)
    shared = list(request.block_table)
    s.schedule()
    assert s.pool.copies == {request.block_table[1]: shared[1]}
    s.preempt(request)
    assert list(s.pool.swaps_out.values()) == shared and s.pool.copies == {}


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
    ({"policy": Priority}, "Priority'> is not one of .*, a Policy or a function"),  # a class, not a policy
    ({"requests": 0}, "max_batch_requests"),
    ({"requests": 9, "budget": 8}, r"max_batch_tokens \(8\)"),
    ({"blocks": 0}, "num_blocks"),
    ({"size": 0}, "block_size"),
))
def test_bad_settings_are_refused(limits, message):
    """7. A budget below the running limit would let requests stall; a pool of scratch alone serves nobody."""
    with pytest.raises(ValueError, match=message):
        make(**limits)


@pytest.mark.parametrize("name", ("lane", "level", "key"))
def test_a_policy_that_fails_leaves_nothing_behind(name):
    """An exception of its own, in the middle of `add`: the others go on, and then there is no work left."""
    policy = Policy()
    s = make(policy=policy)
    first = s.add(Request(tokens(5), 3))
    setattr(policy, name, lambda _: {}["who is that?"])
    with pytest.raises(KeyError, match="who is that"):
        s.add(Request(tokens(6), 3))
    delattr(policy, name)
    s.check()
    drain(s)
    assert first.num_output == 3 and not s.has_work()


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
    assert s.pool.take_moves() == ({}, {}, {})


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
    assert s.num_waiting == 0 and sum(map(len, s._lanes.values())) <= 64
    stay = [s.add(Request(tokens(4, 10 * i), 1)) for i in range(20)]
    for i in range(1_000):
        s.finish(s.add(Request(tokens(4, 10 * i), 1)), "abort")
    assert s.waiting == stay and sum(map(len, s._lanes.values())) <= 2 * 20 + 64


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
    assert all(s.first_waiting(n) == s.waiting[:n] for n in range(len(order) + 2))
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


# --------------------------------------------------------------------------------------- who starves, and who does not
# A step with one place and one token per request is the smallest server there is: every wait can be counted by hand.


def wait(policy, request: Request, arrivals, steps=300) -> int | None:
    """Steps until `request`, there from the start, first gets a token again after it has waited; arrivals(k) come before
    step k. None: it waits still. One place, and a model that always says 7.
    """
    s = make(blocks=30, requests=1, budget=100, policy=policy)
    s.add(request)
    for k in range(steps):
        for other in arrivals(k):
            s.add(other)
        if request in step(s) and k:
            return k
    return None


def test_priority_ages():
    """Urgent requests without end starve a patient one by priority alone; ten steps of waiting are worth a level."""
    def urgent(k):
        return [Request([1], 1)]

    background = {"prompt": [2], "max_tokens": 1, "priority": 5}
    assert wait(lambda request: request.priority, Request(**background), urgent) is None
    assert wait(Priority(patience=10), Request(**background), urgent) == 50  # from then on the others came too late
    assert wait("priority", Request([2], 1, priority=2), urgent) == 200  # by default 100
    assert wait(Priority(patience=10), Request([2], 1), urgent) is None, "it went first, and never waited"


def test_shortest_ages():
    """Short requests without end starve a long one by length alone; a step of waiting is worth a token."""
    def short(k):
        return [Request([1], 1)]

    assert wait(lambda request: request.num_prompt + request.max_tokens, Request([2], 99), short) is None
    assert wait("shortest", Request([2], 99), short) == 98
    assert wait(Shortest(patience=0.5), Request([2], 99), short) == 49


def test_shortest_believes_its_predictor():
    """Bounds say one thing, the predictor the other; it is asked once for each request, preempted or not."""
    asked = []

    def predictor(request):
        asked.append(request)
        return {900: 1, 3: 3}[request.max_tokens]

    s = make(blocks=500, requests=1, policy=Shortest(predictor))
    bounded, talkative = s.add(Request([1], 3)), s.add(Request([1], 900))
    assert s.waiting == [talkative, bounded]
    step(s)
    s.preempt(talkative)
    step(s)
    assert asked == [bounded, talkative] and s.running == [talkative]


def test_mlfq_lets_short_requests_pass():
    """First come, first served makes a short request wait for a long one to end; here the long one makes room."""
    def two(policy):
        s = make(requests=1, budget=100, policy=policy)
        long = s.add(Request([1] * 4, 60))
        for _ in range(6):
            step(s)
        short, begin = s.add(Request([2], 2)), s.num_steps
        while short.status != "finished":
            step(s)
        waited, at = s.num_steps - begin, long.num_preemptions
        drain(s)
        assert long.num_output == 60
        return waited, at

    assert two("fcfs") == (54 + 2, 0)
    # Quantum 4: four tokens are level 0, with the fifth it is level 1, with the ninth level 2.
    assert two(MLFQ(quantum=4, patience=10)) == (2, 1)
    assert two(MLFQ(quantum=64, patience=1000)) == (54 + 2, 0)  # both on level 0, nobody makes room
    assert two(MLFQ(quantum=64, patience=10)) == (10 + 2, 1)  # but takes turns, after ten steps each


def test_mlfq_promotes_the_starving():
    """Short requests without end would keep a demoted one out for ever, were waiting not worth a level now and then."""
    def short(k):
        return [Request([1], 1)] if k else []

    assert wait(MLFQ(quantum=4, patience=10**6), Request([2] * 4, 60), short) is None
    # It ran at step 0, dropped to level 1 (10 steps), and its one token counts as a step in which it did not wait.
    assert wait(MLFQ(quantum=4, patience=10), Request([2] * 4, 60), short) == 11


def test_mlfq_joins_the_level_of_its_prompt():
    """Skip-join: a long prompt does not pass through the levels above its own; the last level takes all the rest."""
    policy = MLFQ(quantum=4, levels=4, patience=1)
    ranks = [policy.rank(Request([1] * n)) for n in (1, 4, 5, 8, 9, 16, 17, 32, 33, 999)]
    assert ranks == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]


def test_a_prompt_that_takes_the_whole_budget_is_not_outranked():
    """What it leaves is for others to be admitted with, and that is nothing: it gets its token first."""
    s = make(requests=1, budget=2, policy=MLFQ(quantum=1, levels=8, patience=1))
    long = s.add(Request([1] * 20, 2))
    step(s)
    short = s.add(Request([2], 2))
    assert [step(s) for _ in range(9)] == [{long: 2}] * 9 and long.num_output == 1
    assert [step(s) for _ in range(2)] == [{short: 1}] * 2 and short.status == "finished"
    drain(s)
    assert long.num_output == 2 and long.num_preemptions == 1


def test_a_policy_that_contradicts_itself_comes_to_an_end():
    """Whoever is first by key cannot be outranked, whatever the policy says."""
    class Odd(Policy):
        def outranks(self, waiting, running):
            return True

    s = make(requests=1, policy=Odd())
    for i in range(3):
        s.add(Request(tokens(3, 10 * i), 3))
    assert drain(s) == 9 and s.num_preemptions == 0


def test_fair_does_not_let_one_tenant_flood_the_queue():
    """First come, first served: a hundred requests of one tenant, then the other's turn. Fair: the other's turn."""
    def served_at(policy):
        s = make(requests=1, budget=100, policy=policy)
        for _ in range(100):
            s.add(Request([1] * 4, 2, tenant="flood"))
        for _ in range(4):
            step(s)
        other = s.add(Request([2] * 4, 2, tenant="other"))
        while not other.num_output:
            step(s)
        return s.num_steps

    assert served_at("fcfs") == 201 and served_at("fair") == 5


def test_fair_counts_exactly():
    """Prompts on admission, samples one by one, nothing twice; who was away has not saved up."""
    s = make(blocks=4, size=2, policy=Fair(input_weight=3, output_weight=10))
    counters = s.policy.counters
    a = s.add(Request(tokens(3), 5, tenant="a", width=2))
    step(s)
    assert counters == {"a": 3 * 3 + 2 * 10}
    drain(s)
    assert counters == {"a": 3 * 3 + 2 * 5 * 10} and sum(r.num_preemptions for r in a.samples) > 0
    s.add(Request(tokens(1), 1, tenant="a"))
    step(s)  # admitted at 109, and the last to leave the queue: with 3 for its prompt that is the floor
    s.add(Request(tokens(1), 1, tenant="b"))
    drain(s)
    assert counters == {"a": 109 + 13, "b": 112 + 13} and s.policy.floor == 115


def test_fair_forgets_tenants():
    """Whom the floor has overtaken would start at the floor anyway: a million names that come once leave no trace."""
    s = make(policy="fair")
    for i in range(2_000):
        s.add(Request([1], 1, tenant=f"tenant {i}"))
        drain(s)
    assert len(s.policy.counters) <= 65 and not s._lanes and not s._heads


class Hoarding(Fair):
    """Without the lift, a planted bug: a tenant that was away may claim all that it has not used."""

    def level(self, lane):
        return self.counters.get(lane, 0)


def service_gap(policy, seed: int) -> tuple[float, float]:
    """The largest difference in service of two tenants over any time in which both had requests waiting, and 2 U.

    Tenants come and go, with prompts, outputs, budgets and pools at random, so that there are preemptions and chunks.
    """
    rng = random.Random(seed)
    longest_prompt, longest_output, places = rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 4)
    weights = {"input_weight": rng.randint(0, 3), "output_weight": rng.randint(1, 4)}
    s = make(blocks=rng.randint(6, 24), size=4, requests=places, budget=rng.randint(places, 20),
             policy=policy(**weights) if isinstance(policy, type) else policy)
    requests, seen, waiting = [], set(), []
    served = dict.fromkeys("abc", 0)
    since = {}  # pair -> least and largest difference since both are waiting
    gap = 0
    busy = {tenant: rng.randint(0, 200) for tenant in served}  # from when on a tenant floods the queue
    for k in range(400):
        for tenant in served:
            there = sum(request.tenant == tenant for request in waiting)
            for _ in range(places + 1 - there if k >= busy[tenant] else rng.random() < 0.02):
                request = Request([1] * rng.randint(1, longest_prompt), rng.randint(1, longest_output), tenant=tenant)
                requests.append(s.add(request))
        before = {r: r.num_output for r in requests}
        plan = s.schedule()
        waiting = s.waiting
        tenants = {request.tenant for request in waiting}
        for request, n in plan:
            served[request.tenant] += weights["input_weight"] * request.num_prompt * (request not in seen)
            seen.add(request)
            if s.advance(request, n):
                request.tokens.append(7)
                if request.num_output == request.max_tokens:
                    s.finish(request, "length")
        for request in requests:
            served[request.tenant] += weights["output_weight"] * (request.num_output - before[request])
        requests = [request for request in requests if request.status != "finished"]
        for pair in combinations("abc", 2):
            if not tenants.issuperset(pair):
                since.pop(pair, None)
                continue
            now = served[pair[0]] - served[pair[1]]
            low, high = since.get(pair, (now, now))
            since[pair] = min(low, now), max(high, now)
            gap = max(gap, since[pair][1] - since[pair][0])
    return gap, 2 * (weights["input_weight"] * longest_prompt + weights["output_weight"] * places * longest_output)


def test_fair_keeps_its_bound():
    """VTC's theorem: over any time in which two tenants wait, their service differs by at most 2 U."""
    gaps = [service_gap(Fair, seed) for seed in range(8)]
    assert all(0 < gap <= bound for gap, bound in gaps), gaps
    for wrong in ("fcfs", Hoarding):
        assert any(gap > bound for gap, bound in (service_gap(wrong, seed) for seed in range(8))), wrong


@pytest.mark.parametrize("tenants", (1, 10_000))
def test_many_tenants_cost_nothing_per_step(tenants):
    """Served or not, a tenant's requests share one entry: counters are looked at as often with 10,000 as with 100."""
    def looks(waiting):
        s, looked = make(blocks=64, size=4, requests=4, policy="fair"), 0
        level = s.policy.level

        def counted(lane):
            nonlocal looked
            looked += 1
            return level(lane)

        for i in range(waiting):
            s.add(Request(tokens(5, 10 * i), 3, tenant=i % tenants))
        s.policy.level = counted
        for _ in range(6):
            step(s, check=False)
        return looked

    assert looks(10_000) == looks(100) <= 40


@pytest.mark.parametrize("policy, message", (
    (lambda: Priority(patience=0), "patience"), (lambda: Shortest(patience=float("nan")), "patience"),
    (lambda: MLFQ(quantum=0), "quantum"), (lambda: MLFQ(levels=True), "levels"), (lambda: MLFQ(quantum=2.5), "quantum"),
    (lambda: Fair(input_weight=-1), "input_weight"), (lambda: Fair(output_weight="2"), "output_weight"),
))
def test_bad_policies_are_refused(policy, message):
    with pytest.raises(ValueError, match=f"{message}: must be an? (number|integer) of at least"):
        policy()


@pytest.mark.parametrize("wrong", (None, "9", math.nan, -1, True))
def test_a_prediction_that_is_no_length_is_refused(wrong):
    """It would put the queue into no order at all. What NumPy computes is a number too."""
    lengths = [np.int64(3), 5.0, wrong, np.float32(2)]
    s = make(policy=Shortest(lambda request: lengths[request.arrival]), requests=1)
    first, second = (s.add(Request(tokens(5), 2)) for _ in range(2))
    with pytest.raises(ValueError, match="^policy: what its predictor returns: must be a number of at least 0, got"):
        s.add(Request(tokens(5), 2))
    assert s.waiting == [first, second]
    with pytest.raises(ValueError, match="^predictor: must be a function of a request, got 5"):
        Shortest(5)


def test_a_key_that_is_not_a_number_is_refused():
    s = make(policy=lambda request: math.nan if request.num_prompt == 6 else 0.0)
    first = s.add(Request(tokens(5), 2))
    with pytest.raises(ValueError, match="^policy: its key is not a number"):
        s.add(Request(tokens(6), 2))
    assert s.waiting == [first]


# ------------------------------------------------------------------------------------------------ targets, deadlines


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self):
        return self.now


def timed(**options) -> tuple[Scheduler, Clock]:
    s, clock = make(**options), Clock()
    s.clock = clock
    return s, clock


def test_a_request_past_its_deadline_costs_nothing():
    """It leaves the queue before the step that would have computed it; not a moment before its deadline."""
    s, clock = timed(requests=1)
    running = s.add(Request(tokens(4), 9))
    step(s)
    late = s.add(Request(tokens(4, 200), 1, deadline=5))
    patient = s.add(Request(tokens(4, 300), 1, deadline=50))
    clock.now += 5
    assert step(s) == {running: 1} and late.status == "waiting" and s.take_expired() == []
    clock.now += 0.25
    s.finish(running, "length")
    assert step(s) == {patient: 4} and patient.finish_reason == "length"
    assert (late.finish_reason, late.num_computed, late.expired) == ("abort", 0, True)
    assert late.error == "deadline: 5 seconds have passed since the request arrived"
    assert s.take_expired() == [late] and s.take_expired() == [] and not s.has_work()
    assert (s.num_with_targets, s.num_in_time) == (2, 1)


def test_goodput_counts_samples_that_never_came_to_be():
    s, clock = timed(blocks=3, size=4)
    s.add(Request(tokens(4), 9, width=3, deadline=3))
    clock.now += 4
    assert s.schedule() == [] and (s.num_with_targets, s.num_in_time) == (3, 0)


def test_a_running_request_past_its_deadline_frees_its_blocks():
    """All its samples end, those that wait after preemption too; who comes to its end in the last moment is in time."""
    s, clock = timed(blocks=3, size=4)
    request = s.add(Request(tokens(4), 9, width=2, deadline=3))
    step(s)
    step(s)
    assert [sample.status for sample in request.samples] == ["running"] * 2
    s.preempt(request.samples[1])
    clock.now += 3.5
    assert s.schedule() == [] and s.pool.num_free == 3 and not s.has_work()
    assert s.take_expired() == request.samples and (s.num_with_targets, s.num_in_time) == (2, 0)
    exact = s.add(Request(tokens(4), 2, deadline=3))
    step(s)
    clock.now += 3
    step(s)
    assert exact.finish_reason == "length" and s.num_in_time == 1


def test_deadlines_do_not_pile_up():
    """Those of finished requests are dropped, though they lie far in the future."""
    s, _ = timed()
    for i in range(2_000):
        s.add(Request([1, i], 1, deadline=1e6))
        drain(s)
    assert len(s._deadlines) <= 66


@pytest.mark.parametrize("targets, gaps, good", (
    ({"ttft_target": 2}, (2, 9, 9), True), ({"ttft_target": 2}, (2.5, 0, 0), False),
    ({"itl_target": 1}, (9, 1, 1), True), ({"itl_target": 1}, (0, 1, 1.5), False),
    ({"itl_target": 1}, (0, 1.5, 0), False),  # and no later haste makes up for it
    ({"ttft_target": 2, "itl_target": 1}, (2, 1, 1), True), ({"ttft_target": 0, "itl_target": 0}, (0, 0, 0), True),
    ({"deadline": 6}, (2, 2, 2), True), ({"deadline": 6}, (2, 2, 2.5), False),  # its last step began in time
))
def test_goodput_counts_those_within_all_their_targets(targets, gaps, good):
    """gaps: seconds before each of the three tokens."""
    s, clock = timed()
    s.add(Request(tokens(4, 500), 3))  # without targets: not counted
    request = s.add(Request(tokens(4), 3, **targets))
    for gap in gaps:
        plan = s.schedule()
        clock.now += gap
        for other, n in plan:
            if s.advance(other, n):
                other.tokens.append(7)
                if other.num_output == 3:
                    s.finish(other, "length")
    assert request.finish_reason == "length" and (s.num_with_targets, s.num_in_time) == (1, good)
    s.add(Request([1], 1, ttft_target=100))
    s.finish(s.waiting[0], "abort")
    assert (s.num_with_targets, s.num_in_time) == (2, good)


def test_branching_shares_the_blocks_of_parents_that_have_them():
    """All at once; who is parked, or has a parked parent, queues. Later they find what they had in the prefix index."""
    s = make(blocks=20, size=4, budget=40, requests=4)
    request = s.add(Request(tokens(9), 8, width=3))
    step(s)  # token 7 for each of the three
    a, b, c = request.samples
    for sample, token in ((a, 1), (b, 2), (c, 3)):
        sample.tokens[-1] = token
    for sample, n in s.schedule():
        assert n == 1 and s.advance(sample, n)
    s.pool.take_moves()
    table = a.block_table.copy()
    s.park(c)
    assert c.status == "parked" and not c.block_table and c.num_computed == 0 and c not in s.running
    s.check()
    s.branch([a, b, c], [b, a, a], [11, 12, 13])
    s.check()
    assert [r.tokens[9:] for r in (a, b, c)] == [[2, 11], [1, 12], [1, 13]] and b.block_table == table
    assert [(r.status, r.num_computed) for r in (a, b, c)] == [("running", 10), ("running", 10), ("waiting", 0)]
    s.finish(c, "abort")
    s.park(b)
    s.branch([a, b], [b, a], [21, 22])
    s.check()
    assert [(r.status, r.num_computed, r.tokens[9:]) for r in (a, b)] == [("waiting", 0, [1, 12, 21]),
                                                                          ("waiting", 0, [2, 11, 22])]
    assert s.pool.num_free == 20
    assert step(s) == {a: 4, b: 4} and s.num_hit_tokens == 16
    s.park(a)
    s.finish(a, "abort")
    s.finish(b, "abort")
    s.check()
    assert not s.has_work() and s.pool.num_free == 20
