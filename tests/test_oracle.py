"""The oracle: random requests through the real Scheduler and BlockPool, with a symbolic KV cache.

Instead of keys and values, each slot of the cache holds *what it stands for*: the root and the exact tokens up to and
including its own. A step writes slots where a model would write K and V, and then checks, where a model would attend,
that every slot a request reads holds that request's own prefix. So a wrong prefix hit, a block recycled too early or a
forgotten copy fails at the very slot where a real engine would have mixed up two users, without a model or a float.

The alphabet has two tokens: with fifty, prompts hardly ever agree by accident, and schedulers that are known to be
broken pass. The second half of the file plants bugs to show that the first half would notice.
"""

import random
from collections import Counter
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path
from types import ModuleType

import pytest

import cache
import scheduler

GARBAGE = ("garbage",)  # what no prefix equals


def model(root, tokens: list[int], sample: int) -> int:
    """The next token of the fake model: a bit that depends on every token, on the root and on the sample's number."""
    return md5(repr((root, sample, tokens)).encode()).digest()[0] & 1


def generate(prompt: list[int], max_tokens: int, root, sample: int) -> list[int]:
    """Plain generation, no engine: what a request must come to, whatever the scheduler did to it meanwhile."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(model(root, tokens, sample))
    return tokens


def long_first(request) -> tuple:
    """A user's policy, and a hard one: prompts that take many steps come before everybody who could wait for them."""
    return -request.num_prompt // 8, request.priority


class Oracle:
    """A random workload (from `seed`) on a random small pool, driven like an engine drives it and checked all along.

    The fake model looks at `request.sample_index`, so that the n samples of one prompt go different ways. Drafts are its
    true next tokens up to a random one.
    """

    late_copies = False  # a planted bug of the driver rather than of the modules, see the mutants

    def __init__(self, seed: int, cache=cache, scheduler=scheduler):
        self.rng = rng = random.Random(seed)
        self.tally = Counter()  # what happened: shows that the fuzz reaches the interesting corners
        self.size = rng.randint(1, 4)
        self.usable = rng.randint(-(-6 // self.size), 16)
        self.limit = rng.randint(1, 6)
        self.budget = self.limit + rng.choice((0, 1, rng.randint(2, 8), 40))
        self.max_len = rng.randint(6, self.usable * self.size + 3)  # sometimes the model, sometimes the pool is smaller
        self.lengths = 4, max(1, self.max_len * 2 // 3), self.max_len
        self.max_tokens = rng.choice((3, 8, 20))
        self.widths = rng.choice(((1,), (1, 1, 1, 2, 3)))
        self.abort_rate = rng.choice((0, 0, 0.02, 0.1))
        self.forget_rate = rng.choice((0, 0, 0, 0.05))
        self.num_requests = 20
        policy = rng.choice((*scheduler.POLICIES, "mlfq", "fair", long_first))
        self.deadlines = rng.choice(((None,), (None,), (None, None, 8, 20, 50)))
        self.targets = rng.choice(((None,), (None, 2, 5, 20)))
        self.tenants = rng.choice(("a", "ab", "abcd"))
        scene = rng.choice(("mixed", "mixed", "squeeze", "squeeze", "samples"))
        if scene == "squeeze":  # long urgent prompts get a crumb per step while short ones use up the memory
            self.size, self.usable, self.limit = rng.randint(3, 4), rng.randint(8, 16), rng.randint(3, 5)
            self.budget, self.max_len, self.lengths = self.limit, self.usable * self.size, (3, 8, 8, 24)
            self.max_tokens, self.widths, self.num_requests, policy = 20, (1,), 40, long_first
        elif scene == "samples":  # many blocks are shared and copied, and somebody always hangs up
            self.size, self.limit, self.widths, self.abort_rate = rng.randint(2, 4), 6, (2, 3), 0.2
            self.budget = max(self.budget, self.limit)
            self.usable = max(-(-self.max_len // self.size), self.usable // 2)
        self.ridge = rng.choice((0, self.budget, rng.randint(1, 12)))
        self.max_drafts = rng.randint(1, 5) if self.ridge else 0
        self.caching = rng.random() < 0.9
        self.roots = rng.choice(((None,), (None, "tenant")))
        self.num_slots, self.swap_rate = rng.choice((0, 0, 2, 40)), rng.choice((0.5, 1, 1))
        self.bases = [[rng.randint(0, 1) for _ in range(self.max_len + 2)] for _ in range(rng.randint(1, 3))]

        self.name, self.now = policy, 0.0  # the clock of this world, which ticks at random
        if policy == "mlfq":
            self.quantum, self.levels, self.patience = rng.randint(1, 6), rng.randint(2, 4), rng.randint(1, 8)
            policy = scheduler.MLFQ(self.quantum, self.levels, self.patience)
        self.Request = scheduler.Request
        self.pool = cache.BlockPool(self.usable + 1, self.size, prefix_caching=self.caching, num_host_slots=self.num_slots)
        self.scheduler = scheduler.Scheduler(self.pool, max_batch_tokens=self.budget, max_batch_requests=self.limit,
                                             max_model_len=self.max_len, policy=policy, ridge=self.ridge,
                                             clock=lambda: self.now,
                                             prefers_swap=lambda tokens, blocks: rng.random() < self.swap_rate)
        self.memory = {(b, o): GARBAGE for b in range(self.usable + 1) for o in range(self.size)}
        self.host = {(slot, o): GARBAGE for slot in range(self.num_slots) for o in range(self.size)}
        self.swapped = Counter()  # blocks "out", "in", "freed"
        self.alive: list = []  # requests that have not finished
        self.steps: dict = {}  # request -> steps taken before it arrived
        self.served: dict = {}  # tenant -> its virtual token counter
        self.floor = 0  # what no waiting tenant's counter is below
        self.seen: set = set()  # requests that were admitted before
        self.times: dict = {}  # request -> when it arrived, and when it got each token
        self.in_time = self.with_targets = 0
        self.matched: dict = {}  # (root, prefix) -> blocks that matched it, none of them reused since
        self.chain: dict = {}  # request -> the entry of `matched` for its full blocks, while its own blocks continue it
        self.hits = 0
        self._watch_pool()

    def run(self) -> "Oracle":
        """Requests arrive in bursts between steps; then everything must drain."""
        sent, pace = 0, self.rng.choice((0.3, 0.6, 0.95))
        while sent < self.num_requests or self.alive:
            while sent < self.num_requests and self.rng.random() < pace:
                self.send()
                sent += 1
            self.abort()
            if self.rng.random() < self.forget_rate:
                self.forget()
            if self.alive:
                self.tally["steps"] += 1
                self.step()
            # Of 30,000 seeds none needed more than 32: who gets here is in a livelock.
            assert self.tally["steps"] < 50 * self.num_requests, "no end in sight"
        assert not self.scheduler.has_work() and self.scheduler.waiting == self.scheduler.running == []
        assert self.pool.num_free == self.usable and not any(self.pool.refs)
        assert self.scheduler.num_hit_tokens == self.hits
        assert self.scheduler.num_preemptions == self.tally["preempted"]
        assert self.scheduler.num_steps == self.tally["steps"] and self.scheduler.num_in_time == self.in_time
        assert self.scheduler.num_with_targets == self.with_targets
        scheduler, swapped = self.scheduler, self.swapped
        assert (scheduler.num_swapped_out, scheduler.num_swapped_in) == (swapped["out"], swapped["in"])
        assert swapped["copied in"] <= swapped["in"], "more blocks were copied than had to be"
        assert scheduler.num_swap_freed == swapped["out"] - swapped["in"]
        self.pool.take_moves()  # whatever was aborted before the step that would have read it
        assert sorted(self.pool.free_slots) == list(range(self.num_slots)), "host slots are lost"
        return self

    # ------------------------------------------------------------------------------------------------ the client

    def send(self) -> None:
        """Add a random request; the door must refuse exactly those that cannot ever finish."""
        rng = self.rng
        length = rng.randint(1, min(rng.choice(self.lengths), self.max_len))
        if rng.random() < 0.5:  # whole blocks
            length = max(1, length // self.size) * self.size
        prompt = rng.choice(self.bases)[:length]
        if rng.random() < 0.2:
            prompt[-1] ^= 1
        max_tokens = min(rng.randint(1, self.max_tokens), max(1, self.max_len - length + (rng.random() < 0.1)))
        request = self.Request(prompt, max_tokens, priority=rng.randint(0, 9), root=rng.choice(self.roots),
                               width=rng.choice(self.widths), reuse_prefix=rng.random() < 0.9,
                               tenant=rng.choice(self.tenants), deadline=rng.choice(self.deadlines),
                               ttft_target=rng.choice(self.targets), itl_target=rng.choice(self.targets))
        request.max_drafts = rng.randint(0, self.max_drafts)
        total = len(prompt) + max_tokens
        possible = total <= self.max_len and total - 1 <= self.usable * self.size and request.width <= self.limit
        try:
            self.scheduler.add(request)
        except ValueError:
            assert not possible, f"refused for no reason: {request}"
            self.tally["refused"] += 1
        else:
            assert possible, f"should have been refused: {request}"
            self.alive.append(request)
            self.steps[request], self.times[request] = self.tally["steps"], [self.now]

    def abort(self) -> None:
        """Perhaps abort somebody, whatever it is doing just now."""
        if self.alive and self.rng.random() < self.abort_rate:
            request = self.rng.choice(self.alive)
            half_way = "half-way " if 0 < request.num_computed < len(request.tokens) - 1 else ""
            self.tally[f"aborted {half_way}{request.status}"] += 1
            self.finish(request, "abort")
            self.scheduler.finish(request, "length")  # whoever comes second changes nothing
            assert request.finish_reason == "abort"

    def forget(self) -> None:
        """Empty the prefix index: nothing matches any more, and those running never notice."""
        self.pool.forget()
        assert not any(self.pool.match([*prefix, 0], root) for root, prefix in self.matched)
        self.matched, self.chain = {}, {}
        self.tally["forgotten"] += 1

    def finish(self, request, reason: str) -> None:
        """End a request and compare what it generated with plain generation."""
        self.scheduler.finish(request, reason)
        self.check_end(request, reason)

    def check_end(self, request, reason: str) -> None:
        """What a request that has just ended got, and whether it got it in time."""
        self.alive.remove(request)
        assert request.finish_reason == reason
        arrived, *later = times = self.times[request]
        limits = [request.ttft_target, *[request.itl_target] * len(later)]
        if {request.ttft_target, request.itl_target, request.deadline} != {None}:
            self.with_targets += request.width
            self.in_time += reason != "abort" and all(
                limit is None or end - start <= limit for start, end, limit in zip(times, later, limits)) and (
                request.deadline is None or self.now <= arrived + request.deadline)
        want = generate(request.tokens[: request.num_prompt], request.max_tokens, request.root, request.sample_index)
        assert request.tokens == want[: len(request.tokens)], f"wrong tokens: {request}"
        assert reason == "abort" or len(request.tokens) == len(want), f"too few tokens: {request}"
        assert request.block_table == [] and request.status == "finished"

    # ------------------------------------------------------------------------------------------------ the engine

    def step(self) -> None:
        """schedule, draft, copy, write, attend, commit; a request may be aborted in between at any point."""
        self.now += self.rng.randint(0, 2)
        before = {request: (request.status, tuple(request.tokens), request.num_computed) for request in self.alive}
        self.fresh, self.made_room, self.by_rank, self.preempted, self.adopted = set(), [], [], [], {}
        free_slots = len(self.pool.free_slots)
        plan = self.scheduler.schedule()
        self.check_expired(before)
        self.check_plan(plan, before, free_slots)
        self.abort()
        for request, n in plan:
            request.drafts = self.draft(request, n - request.num_behind) if request.status == "running" else []
        self.scheduler.check()
        plan = [(request, n) for request, n in plan if request.status == "running"]
        if not plan:  # all aborted: no engine would run a step for nobody
            return

        swaps_out, copies, swaps_in = self.pool.take_moves()
        late, copies = (copies, {}) if self.late_copies else ({}, copies)
        self.swapped["copied in"] += len(swaps_in)
        for slot, block in swaps_out.items():
            self.host.update({(slot, o): self.memory[block, o] for o in range(self.size)})
        held = {target: [self.memory[source, o] for o in range(self.size)] for target, source in copies.items()}
        for block in self.fresh:  # a new block holds garbage; poisoned here, as a copy may still have needed it
            self.memory.update({(block, o): GARBAGE for o in range(self.size)})
        for block, slot in swaps_in.items():
            self.memory.update({(block, o): self.host[slot, o] for o in range(self.size)})
        for block, slots in held.items():
            self.memory.update({(block, o): slot for o, slot in enumerate(slots)})
        self.tally["copies"] += len(copies)

        written = set()
        for request, n in plan:
            for i in range(request.num_computed, request.num_computed + n):
                slot = self.slot(request.block_table, i)
                assert slot not in written, f"two requests write slot {slot}"
                written.add(slot)
                self.memory[slot] = (request.root, (request.tokens + request.drafts)[: i + 1])
        for target, source in late.items():
            self.memory.update({(target, o): self.memory[source, o] for o in range(self.size)})

        for request, n in plan:
            computed = (request.tokens + request.drafts)[: request.num_computed + n]
            self.check_slots(request.block_table, computed, request.root)

        self.abort()
        self.now += self.rng.randint(0, 2)
        for request, n in plan:
            if request.status == "running":  # else aborted in flight: its token is dropped
                self.commit(request, n)
        self.check_between_steps()

    def draft(self, request, k: int) -> list[int]:
        """k guesses at the next tokens, true ones up to a random place."""
        tokens = request.tokens.copy()
        for _ in range(k):
            tokens.append(model(request.root, tokens, request.sample_index))
        drafts = tokens[len(request.tokens) :]
        if k > 0 and (wrong := self.rng.randint(0, k)) < k:
            drafts[wrong] ^= 1
        return drafts

    def commit(self, request, n: int) -> None:
        """Advance one request by n tokens, and sample if that brought it to its end, once more for each true draft."""
        n, drafts = n - len(request.drafts), len(request.drafts)
        end, length = request.num_computed + n, len(request.tokens)
        with self.publishing(request):
            samples = self.scheduler.advance(request, n)
        assert request.num_computed == end and len(request.tokens) == length
        assert samples == (end == length), f"samples at the wrong time: {request}"
        if not samples:
            self.tally["chunks"] += 1
            return
        width = request.width
        group = self.scheduler.fork(request)
        assert len(group) == width and group[0] is request
        assert [member.sample_index for member in group] in (list(range(width)), [request.sample_index])
        for child in group[1:]:
            self.tally["forks"] += 1
            self.chain.update({child: self.chain[request]} if request in self.chain else {})
            self.alive.append(child)
            self.steps[child], self.times[child] = self.steps[request], list(self.times[request])
            self.seen.add(child)
        self.served[request.tenant] = self.served.get(request.tenant, 0) + 2 * width
        for member in group:
            self.append(member)
        if not drafts:
            return
        while True:
            if request.status == "running" and self.rng.random() < self.abort_rate:  # as a stop token would end it
                self.finish(request, "abort")
                self.tally["ended before a draft"] += drafts > 0
            with self.publishing(request):
                accepted = self.scheduler.accept(request)
            if not accepted:
                break
            assert request.num_computed == len(request.tokens), f"samples at the wrong time: {request}"
            self.served[request.tenant] += 2
            self.tally["accepted"], drafts = self.tally["accepted"] + 1, drafts - 1
            self.append(request)
        assert request.drafts == [] and (request.status == "finished" or request.num_behind == 1), f"left over: {request}"
        self.tally["rejected"] += drafts

    @contextmanager
    def publishing(self, request):
        """Within this a request's `num_computed` may grow. What it then has computed must be found."""
        # Of two equal blocks the index knows the first. Once that is reused, whoever holds the second builds on a chain
        # that nobody can find: reuse is lost, nothing is wrong. So expect a hit only while the chain is the same.
        chained = request.num_computed < self.size or (
            request in self.chain and self.match_computed(request) is self.chain[request])
        yield
        self.chain.pop(request, None)
        if chained and self.caching and request.status == "running":
            self.chain[request] = self.match_computed(request)
            found = len(self.chain[request])
            assert found == request.num_computed // self.size, f"computed but not published: {request}"

    def append(self, request) -> None:
        """What follows a sample."""
        self.times[request].append(self.now)
        request.tokens.append(model(request.root, request.tokens, request.sample_index))
        if request.num_output == request.max_tokens:
            self.finish(request, "length")
            self.tally["finished"] += 1

    # ------------------------------------------------------------------------------------------------ the checks

    def slot(self, table: list[int], i: int) -> tuple[int, int]:
        """Where token i lives: (block, offset)."""
        return table[i // self.size], i % self.size

    def check_slots(self, table: list[int], tokens: list[int], root) -> None:
        """Read what attention reads: each slot must hold exactly the prefix that ends there."""
        for i in range(len(tokens)):
            slot = self.slot(table, i)
            assert self.memory[slot] == (root, tokens[: i + 1]), f"slot {slot}, token {i}: {self.memory[slot]}"

    def level(self, request) -> int:
        """The counter of the request's tenant, where the policy is fair."""
        return max(self.floor, self.served.get(request.tenant, 0)) if self.name == "fair" else 0

    def key(self, request) -> float:
        """The policies' definitions once more; it is the scheduler that is on trial, but they should mean this."""
        if self.name == "mlfq":
            sizes = [self.quantum * 2**i for i in range(self.levels - 1)]
            level = sum(len(request.tokens) > size for size in sizes)
            return self.patience * level + self.steps[request] + request.num_output
        return {"fcfs": 0, "fair": 0, "priority": 100 * request.priority + self.steps[request], "shortest":
                request.num_prompt + request.max_tokens + self.steps[request]}[self.name] \
            if self.name != long_first else long_first(request)

    def order(self, request) -> tuple:
        """Smaller goes first."""
        return self.level(request), self.key(request), request.arrival, request.sample_index

    def check_expired(self, before: dict) -> None:
        """Exactly those past their deadlines have left, running or waiting, and cost nothing any more."""
        late = {r for r in before if r.deadline is not None and self.now > self.times[r][0] + r.deadline}
        expired = self.scheduler.take_expired()
        assert set(expired) == late and len(expired) == len(late), "not those past their deadlines"
        for request in expired:
            self.tally[f"expired {before.pop(request)[0]}"] += 1
            self.check_end(request, "abort")
            assert request.expired and "deadline" in request.error

    def check_plan(self, plan: list, before: dict, free_slots: int) -> None:
        """Invariants 1, 3, 7, 8, order, and progress, of a plan that has not run yet."""
        given, running, waiting = dict(plan), self.scheduler.running, self.scheduler.waiting
        assert (plan or not before) and len(given) == len(plan), "a step with work must plan something, and nobody twice"
        stayed = [r for r, (status, *_) in before.items() if status == r.status == "running"]
        preempted = [r for r, (status, *_) in before.items() if status == "running" != r.status]
        admitted = [r for r, _ in plan if before[r][0] == "waiting"]
        assert set(preempted) == set(self.preempted) and len(preempted) == len(self.preempted)
        total = sum(given.values())
        drafted = {request: n - request.num_behind for request, n in plan if n > request.num_behind}
        base = total - sum(drafted.values())
        assert total <= self.budget, "more tokens than the budget"
        assert not drafted or total <= self.ridge, "drafts make the step compute-bound"
        assert all(n <= request.max_drafts and request.width == 1 for request, n in drafted.items())
        assert sum(r.width for r in running) <= self.limit, "more running requests than the limit"
        assert set(running) == {*stayed, *admitted} and set(given) <= set(running)
        for request, n in plan:
            assert 1 <= n <= request.num_behind + drafted.get(request, 0), f"{n} tokens for {request}"
            assert request.num_computed + n < request.num_prompt + request.max_tokens, f"computes its end: {request}"
            blocks = -(-(request.num_computed + n) // self.size)
            assert len(request.block_table) == blocks, f"{blocks} blocks needed for {n} tokens of {request}"
        for request, (_, tokens, _) in before.items():
            assert tuple(request.tokens) == tokens, "scheduling changed tokens"

        for request in stayed:
            short = given.get(request, 0) < request.num_behind
            assert not (short and request.num_behind == 1), f"stalled: {request}"
            # Who gets less than it needs found the budget spent. Only a victim of its own may have refunded some later.
            made_room = request in given and any(request.block_table is table for table in self.made_room)
            assert not short or base == self.budget or made_room, f"budget lost: {request}"
            assert not (short and admitted), f"waiting requests went before {request}"
        for request in preempted:
            assert request.block_table == []
            computed, slots = before[request][2], len(request.host_slots)
            assert request.num_computed == (computed if slots else 0) and slots in (0, -(-computed // self.size))
            wanted = sum(-(-before[r][2] // self.size) for r in preempted)
            assert slots or self.swap_rate < 1 or not computed or wanted > free_slots, f"not swapped: {request}"
            self.swapped["out"] += slots
            self.tally["swapped out"] += slots > 0
            if request in self.by_rank:
                assert self.name == "mlfq"
                above = [r for r in {*admitted, *waiting} if self.key(r) + self.patience <= self.key(request)]
                assert above, f"outranked by nobody: {request}"
                assert all(self.order(request) > self.order(r) for r in stayed), f"not the least urgent: {request}"
                self.tally["outranked"] += 1
                continue
            assert all(self.order(request) > self.order(other) for other in running), f"not the least urgent: {request}"
            assert not admitted, "admitted somebody though there was not enough room for those running"
        for place, request in enumerate(admitted):
            for other in (*admitted[place + 1 :], *waiting):
                fair = self.name == "fair" and request.tenant != other.tenant  # then only the counters decide
                assert self.level(request) <= self.level(other) if fair else self.order(request) < self.order(other), \
                    f"jumped the queue: {request}, {other}"
            self.floor = self.level(request)
            self.served[request.tenant] = self.floor + (0 if request in self.seen else request.num_prompt)
            if place + 1 == len(admitted) and not waiting:  # whoever comes next finds nobody to be compared with
                self.floor = self.served[request.tenant]
            self.seen.add(request)
            kept, hit = before[request][2], self.adopted[id(request.block_table)] * self.size
            assert hit < len(request.tokens) and request.num_computed == max(kept, hit)
            new = max(0, -(-kept // self.size) - hit // self.size)
            self.swapped["in"] += new
            self.tally["swapped in"] += new > 0
            self.tally["swapped in beside a hit"] += new > 0 and hit > 0
            assert hit == 0 or (self.caching and request.reuse_prefix), f"unwanted prefix hit: {request}"
            if self.caching and request.reuse_prefix and request.num_computed >= self.size:
                self.chain[request] = self.match_computed(request)
                assert len(self.chain[request]) == request.num_computed // self.size
                assert request.block_table[: hit // self.size] == self.chain[request][: hit // self.size]
            self.hits += hit
            self.tally["hits"] += hit > 0
        self.tally["preempted"] += len(preempted)
        if drafted and waiting and not preempted:
            first, places = waiting[0], self.limit - sum(request.width for request in running)
            blocks = self.pool.match(first.tokens, first.root) if first.reuse_prefix else []
            room = self.pool.num_free - self.pool.num_free_in(blocks) + sum(
                len(request.block_table) - -(-len(request.tokens) // self.size) for request in drafted)
            need = -(-len(first.tokens) // self.size) - len(blocks)
            assert base == self.budget or first.width > places or need > room, f"waits for a draft: {first}"

    def check_between_steps(self) -> None:
        """The modules' own checks, every request accounted for, and a prefix index that tells the truth."""
        self.scheduler.check()
        assert set(self.scheduler.waiting) | set(self.scheduler.running) == set(self.alive)
        assert self.scheduler.num_waiting + len(self.scheduler.running) == len(self.alive)
        for request in self.scheduler.running:
            self.match_computed(request)
        for (root, prefix), blocks in self.matched.items():
            # Invariant 4: free or not, a block keeps its contents and its place until it is reused.
            assert self.pool.match([*prefix, 0], root) == blocks, f"{blocks} no longer match {prefix}"
            self.check_slots(blocks, list(prefix), root)

    def match_computed(self, request) -> list[int]:
        """The full blocks that `request` has computed, as far as the index knows them; remembered for later checks.

        The same list object is returned until one of its blocks is reused.
        """
        full = request.tokens[: request.num_computed // self.size * self.size]
        blocks = self.pool.match([*full, 0], request.root)
        key = request.root, tuple(full[: len(blocks) * self.size])
        return self.matched.setdefault(key, blocks) if blocks else blocks

    def _watch_pool(self) -> None:
        """Wrap the pool's methods: note new blocks, check that the least recently freed block is reused first, and
        remember for whose table others were preempted."""
        pool, allocate, release = self.pool, self.pool.allocate, self.pool.release
        freed = {block: (0, block) for block in range(1, self.usable + 1)}  # (when, place): smaller was freed earlier
        releases = trims = 0

        def watched_allocate():
            block = allocate()
            assert block in freed, f"block {block} is not free, or nobody may own it"
            since = freed.pop(block)
            assert not freed or since < min(freed.values()), "not the least recently freed block"
            self.fresh.add(block)
            self.matched = {key: blocks for key, blocks in self.matched.items() if block not in blocks}
            return block

        def watched_release(table):
            nonlocal releases
            releases += 1
            blocks = list(table)
            release(table)
            # Within one table the last block counts as freed first: a prefix is of no use without its head.
            freed.update({b: (releases, -place) for place, b in enumerate(blocks) if not pool.refs[b]})

        def watched_trim(table, num_tokens, trim=pool.trim):
            nonlocal trims
            before = list(table)
            trim(table, num_tokens)
            for block in reversed(before[len(table) :]):  # to where they came from, the front
                trims += 1
                freed[block] = (-trims, 0)
            self.tally["trimmed"] += len(before) - len(table)

        def watched_adopt(blocks, adopt=pool.adopt):
            for block in blocks:
                freed.pop(block, None)
            table = adopt(blocks)
            self.adopted[id(table)] = len(blocks)
            return table

        def watched_missing(table, start, end, missing=pool.blocks_missing):
            self.asking = table
            return missing(table, start, end)

        def watched_preempt(victim, preempt=self.scheduler.preempt):
            self.made_room.append(self.asking)
            self.preempted.append(victim)
            preempt(victim)

        def watched_outranked(request, outranked=self.scheduler._outranked):
            self.by_rank.append(outranked(request))
            return self.by_rank[-1]

        self.scheduler._outranked = watched_outranked
        pool.allocate, pool.release, pool.adopt = watched_allocate, watched_release, watched_adopt
        pool.trim = watched_trim
        pool.blocks_missing, self.scheduler.preempt = watched_missing, watched_preempt


# ---------------------------------------------------------------------------------------------------------- the fuzz


@pytest.mark.parametrize("first", range(0, 600, 50))
def test_oracle(first):
    """Six hundred random workloads on small pools: every slot read is right, every output is the plain one."""
    for seed in range(first, first + 50):
        try:
            Oracle(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_fuzz_reaches_every_corner():
    """A fuzz that never preempts, forks, copies or hits proves nothing about it."""
    tally = sum((Oracle(seed).run().tally for seed in range(60)), Counter())
    rare = {corner: tally[corner] for corner in (
        "finished", "refused", "preempted", "chunks", "forks", "copies", "hits", "aborted waiting", "aborted running",
        "aborted half-way running", "forgotten", "outranked", "expired waiting", "expired running", "swapped out",
        "swapped in", "swapped in beside a hit", "accepted", "rejected", "trimmed", "ended before a draft")
        if tally[corner] < 10}
    assert not rare, f"hardly ever happened: {rare}"


# ------------------------------------------------------------------------------------------------------- the mutants
# Bugs planted by exact replacement, most of them shipped by somebody once. Each replaced text must occur exactly once,
# so that a mutant breaks loudly, not silently, when the line it lives on changes.

RESTART = "            request.num_computed = 0\n        self.pool.release"  # in Scheduler.preempt

MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    # the prefix index
    "match leaves no token to compute": [
        ("cache", "range(self.block_size, len(tokens), self.block_size)",
         "range(self.block_size, len(tokens) + 1, self.block_size)")],
    "a reused block stays in the index": [
        ("cache", "if self.index.get(self.key[block]) == block:", "if False:")],
    "reusing a block drops the entry of its twin": [
        ("cache", "if self.index.get(self.key[block]) == block:", "if self.key[block] in self.index:")],
    "the twin of a block starts a chain of its own": [
        ("cache", "next(self._numbers) if first == block else self.content[first]", "next(self._numbers)")],
    "the newest of equal blocks replaces the first": [
        ("cache", "self.key[block] = key\n", "self.key[block] = key\n        self.index[key] = first = block\n")],
    "a key names the parent by its block": [
        ("cache", "            parent = self.content[block]", "            parent = block"),
        ("cache", "parent = self.content[table[i - 1]] if i", "parent = table[i - 1] if i")],
    "a key does not name the parent": [
        ("cache", "            parent = self.content[block]", "            parent = 0"),
        ("cache", "parent = self.content[table[i - 1]] if i", "parent = 0 if i")],
    "the root is not part of the key": [
        ("cache", 'blocks, parent = [], ("root", root)', 'blocks, parent = [], "root"'),
        ("cache", 'if i else ("root", root)', 'if i else "root"')],
    "a fork forgets its root": [
        ("scheduler", "child.sample_index = i\n", "child.sample_index, child.root = i, None\n")],
    "blocks are published when planned, not when computed": [
        ("scheduler", "        plan[request] = n\n",
         "        plan[request] = n\n"
         "        done, size = request.num_computed, self.pool.block_size\n"
         "        for i in range(done // size, (done + n) // size):\n"
         "            self.pool.publish(request.block_table, i, request.tokens, request.root)\n"),
        ("scheduler", "        for i in filled:", "        for i in ():")],
    "a block is published once begun": [
        ("scheduler", "(request.num_computed + n) // size)",
         "min(len(request.block_table), len(request.tokens) // size))")],
    "the last full block is not published": [
        ("scheduler", "(request.num_computed + n) // size)", "(request.num_computed + n - 1) // size)")],
    "a request that must not reuse a prefix does": [
        ("scheduler", " if request.reuse_prefix else []", "")],
    # the free list and reference counts
    "matched blocks are not charged against free ones": [
        ("scheduler", "self.pool.num_free - self.pool.num_free_in(blocks)", "self.pool.num_free")],
    "adopted blocks stay in the free list": [
        ("cache", "                del self.free[block]\n", "                pass\n")],
    "adopted blocks are not counted": [
        ("cache", "                del self.free[block]\n            self.refs[block] += 1",
         "                del self.free[block]\n            self.refs[block] = 1")],
    "a shared block is freed with its first table": [
        ("cache", "self.refs[block] == 0:\n                self.free",
         "self.refs[block] >= 0:\n                self.free")],
    "the head of a prefix is freed before its tail": [
        ("cache", "block = table.pop()\n            self.refs[block] -=",
         "block = table.pop(0)\n            self.refs[block] -=")],
    "the most recently freed block is reused": [("cache", "self.free.popitem(last=False)", "self.free.popitem()")],
    "the scratch block is handed out": [
        ("cache", "OrderedDict.fromkeys(range(1, num_blocks))", "OrderedDict.fromkeys(range(num_blocks - 1))")],
    # forks and copies
    "a fork shares the table itself": [("cache", "return list(blocks)", "return blocks")],
    "a shared block is written in place": [
        ("cache", "if start % self.block_size and self.refs[table[i]] > 1:", "if False:")],
    "a new block is not filled from the shared one": [
        ("cache", "            self.copies[table[i]] = source\n", "")],
    "a copy survives its destination": [
        ("cache", "                self.copies.pop(block, None)\n", "")],
    "the room for a copy is not asked for": [("cache", " + bool(shared)", "")],
    "a fork stays wide": [("scheduler", "width, request.width = request.width, 1", "width = request.width")],
    "a fork starts at zero": [
        ("scheduler", "child.sample_index = i\n", "child.sample_index, child.num_computed = i, 0\n")],
    "forks share one list of tokens": [("scheduler", "request.tokens.copy(), []", "request.tokens, []")],
    "forks are equally urgent": [
        ("scheduler", "child.urgency = (*request.urgency[:2], i)", "child.urgency = request.urgency")],
    # preemption
    "preemption forgets to start over": [("scheduler", RESTART, "            pass\n        self.pool.release")],
    "preemption drops generated tokens": [
        ("scheduler", RESTART, "            del request.tokens[request.num_prompt :]\n" + RESTART)],
    "preemption counts generated tokens twice": [
        ("scheduler", RESTART, "            request.num_prompt = len(request.tokens)\n" + RESTART)],
    "preemption keeps the blocks": [
        ("scheduler", "        self.pool.release(request.block_table)\n        request.num_preemptions",
         "        request.block_table = []\n        request.num_preemptions")],
    "preemption sends to the back of the queue": [
        ("scheduler", "        self.num_preemptions += 1\n",
         "        self.num_preemptions += 1\n        request.urgency = (request.urgency[0], next(self._arrivals), 0)\n")],
    # policies
    "a counter that has grown is not looked at again": [
        ("scheduler", "elif level < (now := self.policy.level(lane)):", "elif False:")],
    "the victim is chosen by keys that have changed": [("scheduler", "if self.policy.rekeys:", "if False:")],
    "a tenant that was away has saved up": [
        ("scheduler", "return max(self.counters.get(lane, 0), self.floor)", "return self.counters.get(lane, 0)")],
    "a preempted request pays for its prompt again": [
        ("scheduler", "request.num_prompt if is_first else 0", "request.num_prompt")],
    "the samples of a prompt pay for one": [("scheduler", "sampled(request, request.width)", "sampled(request, 1)")],
    "a tenant is forgotten that is above the floor": [
        ("scheduler", "if counter > self.floor}", "if False}"),
        ("scheduler", "self._prune_at = 0, 64", "self._prune_at = 0, 1")],
    "a prompt joins the level above its own": [
        ("scheduler", "(len(request.tokens) - 1) // self.quantum)", "len(request.tokens) // self.quantum)")],
    "nobody is demoted": [("scheduler", "(len(request.tokens) - 1) // self.quantum)",
                           "(request.num_prompt - 1) // self.quantum)")],
    "running counts as waiting": [("scheduler", "super().key(request) + request.num_output", "super().key(request)")],
    "waiting does not count": [("scheduler", "self.rank(request) + request.arrival_step", "self.rank(request)")],
    "half a level outranks": [("scheduler", "self.key(waiting) >= self.patience", "self.key(waiting) >= self.patience / 2")],
    "the most urgent is outranked": [("scheduler", "last = max(self", "last = min(self")],
    "an outranked request stays in the plan": [
        ("scheduler", "budget + plan.pop(victim, 0), places", "budget, places")],
    "a place is not handed on": [("scheduler", "places + victim.width", "places")],
    # deadlines and targets
    "a deadline ends only those that wait": [
        ("scheduler", "if request.status != FINISHED:\n", "if request.status == WAITING:\n")],
    "a deadline ends the first sample only": [
        ("scheduler", "heapq.heappop(self._deadlines)[2].samples:", "heapq.heappop(self._deadlines)[2].samples[:1]:")],
    "a deadline is noticed late": [("scheduler", "self._deadlines[0][0] < self.clock()",
                                    "self._deadlines[0][0] + 5 < self.clock()")],
    "nobody looks at deadlines": [("scheduler", "        self._expire()\n", "")],
    "a deadline counts from the last token": [
        ("scheduler", "self.clock() > request.arrival_time +", "self.clock() > request.last_token_time +")],
    "a late end is in time": [("scheduler", "request.in_time and not late", "request.in_time")],
    "the first token has the target of the others": [
        ("scheduler", "request.itl_target if request.num_output else request.ttft_target", "request.itl_target")],
    "a target is for the sum of all steps": [("scheduler", "        request.last_token_time = now\n", "")],
    "a missed target is made up for": [("scheduler", "request.in_time &= target", "request.in_time = target")],
    # swapping
    "an aborted request keeps its host slots": [("scheduler", "self.pool.free_slots += request.host_slots", "pass")],
    "a swapped request keeps its host slots": [("cache", "self._read_slots += slots", "self._read_slots += []")],
    "slots that a hit made needless are kept": [
        ("cache", "self._read_slots += slots", "self._read_slots += slots[len(slots) - len(blocks) :]")],
    "a slot is written in the step that reads it": [("cache", "self._read_slots += slots", "self.free_slots += slots")],
    "swapped in from the first slots, not the last": [("cache", "slots[len(slots) - len(blocks) :]", "slots")],
    "swapped in back to front": [("cache", "slots[len(slots) - len(blocks) :]", "slots[::-1]")],
    "the blocks of a hit are swapped in as well": [
        ("scheduler", "self.pool.swap_in(request.host_slots, table[matched:])",
         "self.pool.swap_in(request.host_slots, table)")],
    "only full blocks are swapped": [
        ("scheduler", "[: self.pool.blocks_for(request.num_computed)]", "[: request.num_computed // self.pool.block_size]")],
    "what was swapped in is not shared": [
        ("scheduler", "for i in range(matched, request.num_computed // size):", "for i in ():")],
    "a block that is half full is shared": [
        ("scheduler", "for i in range(matched, request.num_computed // size):",
         "for i in range(matched, len(table)):")],
    "swapping keeps the blocks, too": [
        ("scheduler", "        self.pool.release(request.block_table)\n        request.num_preemptions",
         "        if not request.host_slots:\n            self.pool.release(request.block_table)\n"
         "        request.num_preemptions")],
    "a request that is preempted twice starts over": [
        ("scheduler", "                self._swap_in(request)\n", "                self._swap_in(request)\n"
         "                request.num_computed = hit\n")],
    # more on preemption
    "a victim stays in the plan": [("scheduler", "+= plan.pop(victim, 0)", "+= plan.get(victim, 0)")],
    "a victim's budget is lost": [("scheduler", "budget += plan.pop(victim, 0)", "plan.pop(victim, 0)")],
    "a victim's budget is refunded though it had none": [
        ("scheduler", "+= plan.pop(victim, 0)", "+= plan.pop(victim, victim.num_behind)")],
    "a victim is planned later in the same step": [("scheduler", "if request.status != RUNNING:", "if False:")],
    "a request goes on after preempting itself": [
        ("scheduler", "                if victim is request:\n                    break\n", "")],
    "the most urgent is preempted": [("scheduler", "victim = max(self", "victim = min(self")],
    "the last admitted is preempted": [
        ("scheduler", "victim = max(self.running, key=self._order)", "victim = self.running[-1]")],
    "a victim is admitted again at once": [("scheduler", "while budget and not preempted and", "while budget and")],
    # budget, limits, progress
    "a running request overdraws the budget": [
        ("scheduler", "n = min(request.num_behind, budget)\n            while",
         "n = request.num_behind\n            while")],
    "a new request overdraws the budget": [
        ("scheduler", "n = min(request.num_behind, budget)\n            self._plan",
         "n = request.num_behind\n            self._plan")],
    "a chunk samples": [("scheduler", "if request.num_behind:\n", "if False:\n")],
    "long prompts go before decoding": [
        ("scheduler", "sorted(self.running, key=lambda request: request.num_behind)",
         "sorted(self.running, key=lambda request: -request.num_behind)")],
    "the running limit is per step": [
        ("scheduler", "places = self.max_batch_requests - sum(request.width for request in self.running)",
         "places = self.max_batch_requests")],
    "the running limit ignores width": [("scheduler", "places -= request.width", "places -= 1")],
    "the running limit ignores the width of those running": [
        ("scheduler", "places = self.max_batch_requests - sum(request.width for request in self.running)",
         "places = self.max_batch_requests - len(self.running)")],
    "only the first chunk of a prompt finds room": [
        ("scheduler", "self.pool.blocks_for(length) - len(blocks) > room", "False")],
    "a prefix hit is computed again": [("scheduler", "max(hit, request.num_computed)", "request.num_computed")],
    "hits are not counted": [("scheduler", "self.num_hit_tokens += hit", "self.num_hit_tokens += 0")],
    "the door counts a token too many": [
        ("scheduler", "if pool.blocks_for(length - 1) >", "if pool.blocks_for(length) >")],
    "the door admits what never fits": [
        ("scheduler", "if pool.blocks_for(length - 1) > pool.num_usable", "if False")],
    # drafts
    "every draft is accepted": [
        ("scheduler", "request.drafts and request.drafts[0] == request.tokens[-1]", "request.drafts")],
    "rejected drafts count as computed": [
        ("scheduler", "            request.drafts = []\n",
         "            request.num_computed += len(request.drafts)\n            request.drafts = []\n")],
    "rejected drafts are published": [
        ("scheduler", "            request.drafts = []\n",
         "            done, size = request.num_computed, self.pool.block_size\n"
         "            for i in range(done // size, (done + len(request.drafts)) // size * bool(request.block_table)):\n"
         "                self.pool.publish(request.block_table, i, request.tokens[:done] + request.drafts, request.root)\n"
         "            request.drafts = []\n")],
    "drafts are published before they are verified": [
        ("scheduler", "        for i in filled:\n"
         "            self.pool.publish(request.block_table, i, request.tokens, request.root)",
         "        tokens, size = request.tokens + request.drafts, self.pool.block_size\n"
         "        for i in range(filled.start, len(tokens) // size if request.num_behind == 0 else filled.stop):\n"
         "            self.pool.publish(request.block_table, i, tokens, request.root)")],
    "accepted drafts are not published": [
        ("scheduler", "            return self.advance(request, 1)\n",
         "            request.num_computed += 1\n            return True\n")],
    "an ended request samples on": [
        ("scheduler", "if request.status == RUNNING and request.drafts and", "if request.drafts and")],
    "the blocks of rejected drafts are kept": [
        ("scheduler", "            self.pool.trim(request.block_table, request.num_computed)\n", "")],
    "a block too many is given back": [
        ("scheduler", "self.pool.trim(request.block_table, request.num_computed)",
         "self.pool.trim(request.block_table, request.num_computed - 1)")],
    "the blocks of rejected drafts go to the back of the queue": [
        ("cache", "            self.free.move_to_end(block, last=False)\n", "")],
    "drafts overdraw the budget": [
        ("scheduler", "spare = min(budget, self.ridge - sum(plan.values()))", "spare = self.ridge - sum(plan.values())")],
    "drafts overrun the ridge": [
        ("scheduler", "spare = min(budget, self.ridge - sum(plan.values()))", "spare = budget")],
    "drafts do not count against the rest": [("scheduler", "                spare -= n\n", "")],
    "drafts take blocks that are not there": [("scheduler", "share, room, request", "share, request")],
    "drafts go before waiting requests": [
        ("scheduler", "            self._plan_drafts(plan, budget)\n        return", "            pass\n        return"),
        ("scheduler", "        places = self.max_batch_requests - sum(",
         "        self._plan_drafts(plan, budget)\n        budget = self.max_batch_tokens - sum(plan.values())\n"
         "        places = self.max_batch_requests - sum(")],
    "the last token is a draft": [
        ("scheduler", "request.max_tokens - request.num_output - 1)", "request.max_tokens - request.num_output)")],
    "a request has drafts before it is split": [
        ("scheduler", "n == request.num_behind and request.width == 1]", "n == request.num_behind]")],
    # aborts
    "aborting a waiting request leaves it counted": [
        ("scheduler", "self.num_waiting -= 1  # its", "pass  # its")],
    "an aborted request is admitted": [
        ("scheduler", "elif heap[0][1].status != WAITING:", "elif False:")],
    "aborting a running request keeps its blocks": [
        ("scheduler", "            self.pool.release(request.block_table)\n        elif status == WAITING:",
         "            request.block_table = []\n        elif status == WAITING:")],
    "ending a request twice counts twice": [("scheduler", "if request.status == FINISHED:", "if False:")],
}


def build(*edits: tuple[str, str, str]) -> dict[str, ModuleType]:
    """Fresh `cache` and `scheduler` modules, with (module, old, new) edits of their source."""
    modules = {}
    for name in ("cache", "scheduler"):
        source = (Path(__file__).parent.parent / f"{name}.py").read_text()
        for module, old, new in edits:
            if module == name:
                assert source.count(old) == 1, f"occurs {source.count(old)} times in {name}.py: {old!r}"
                source = source.replace(old, new)
        modules[name] = ModuleType(name)
        # The mutant scheduler imports the true cache, but only to name a type.
        exec(compile(source, f"{name}.py (mutant)", "exec"), modules[name].__dict__)
    return modules


def killed_at(seeds: range, oracle=Oracle, **modules) -> tuple[int | None, Exception | None]:
    """The first seed at which the oracle objects, and its objection."""
    for seed in seeds:
        try:
            oracle(seed, **modules).run()
        except Exception as error:
            return seed, error
    return None, None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    """The oracle notices each planted bug within its first 150 workloads."""
    seed, _ = killed_at(range(150), **build(*MUTANTS[name]))
    assert seed is not None, f"survives: {name}"


def test_copies_after_the_writes_are_noticed():
    """The driver's own duty, copies before writes, is checked as well: the copy would overwrite the new token."""
    seed, _ = killed_at(range(150), type("Late", (Oracle,), {"late_copies": True}))
    assert seed is not None


def test_no_edit_is_no_mutant():
    """What kills the mutants is the planted bug, not the way they are built."""
    assert killed_at(range(20), **build()) == (None, None)
