"""Everything at once: whatever an engine is asked to do besides, a sample's tokens are those of a plain one.

Drafts, swapping, an int8 cache, policies, deadlines, processors, hang-ups and failed steps are tested one by one elsewhere.
Here they meet, on pools that are too small, in workloads drawn from a seed.
"""

import copy
import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest
import test_engine
import torch
from test_engine import emulate_graphs, is_clean, toy
from test_speculation import likeliest, noisy, small, wrong

import cache
import nanoserve
import scheduler
from nanoserve import LLM, KVCache, SamplingParams

torch.set_num_threads(1)
DRAFTS = {None: None, "ngram": "ngram", "itself": toy, "noisy": noisy, "small": small, "wrong": wrong, "right": likeliest}
POLICIES = {name: lambda rng, name=name: name for name in scheduler.POLICIES} | {
    "mlfq": lambda rng: scheduler.MLFQ(quantum=rng.choice((2, 8)), levels=4, patience=rng.choice((1, 4)))}


def forbid_repeats(token_ids, logits):
    """A user's function that writes into what it is given, and cannot bear to see the same token twice in a row."""
    assert not (len(token_ids) > 1 and token_ids[-1] == token_ids[-2])
    logits[token_ids[-1]] = -math.inf
    return logits


def draw_params(rng, prompt, is_plain=False) -> SamplingParams:
    """Anything; or nothing that asks for the last token before the next can be sampled."""
    more = {}
    if rng.random() < 0.4:
        more |= {"temperature": rng.choice((1.0, 3.0)), "top_k": rng.choice((0, 9)), "top_p": rng.choice((1.0, 0.9))}
    else:
        more |= {"temperature": 0}
    if is_plain:
        return SamplingParams(seed=rng.getrandbits(32), max_tokens=rng.choice((1, 3, 9, 16)), **more,
                              stop_token_ids=rng.sample(range(64), rng.choice((0, 8))))
    if rng.random() < 0.3:
        more |= {"repetition_penalty": rng.choice((1.0, 2.0)), "frequency_penalty": rng.choice((0, 1.5)),
                 "presence_penalty": 2.0, "logit_bias": {7: 3.0, 8: -math.inf}}
    if rng.random() < 0.3:
        more |= {"stop_token_ids": rng.sample(range(64), 8), "min_tokens": rng.choice((0, 4))}
    if rng.random() < 0.3:
        more |= {"logprobs": 2, "prompt_logprobs": rng.choice((None, 1))}
    if rng.random() < 0.2 and not any(a == b for a, b in zip(prompt, prompt[1:])):
        more |= {"logits_processor": forbid_repeats}
    more["max_tokens"] = max(more.get("min_tokens", 0), rng.choice((1, 3, 9, 16)))
    if rng.random() < 0.25:
        searched = {name: value for name, value in more.items() if name not in ("logprobs", "temperature", "top_k", "top_p")}
        return SamplingParams(beam_search=True, n=rng.choice((1, 2, 3)), length_penalty=rng.choice((0.0, 1.0)), **searched)
    return SamplingParams(seed=rng.getrandbits(32), n=rng.choice((1, 1, 1, 2, 3)), **more)


def draw_work(rng, plain=0.0) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings, and repeat themselves for those who draft from the text."""
    stems = [[rng.randrange(64) for _ in range(rng.choice((3, 9, 20)))] for _ in range(2)]
    prompts = [(rng.choice(stems) * rng.choice((1, 1, 2)))[: rng.randint(1, 24)] + [rng.randrange(64)
               for _ in range(rng.choice((0, 0, 1, 4)))] for _ in range(10)]
    return [(prompt, draw_params(rng, prompt, rng.random() < plain)) for prompt in prompts]


class Trouble(Exception):
    """What a step fails with."""


class World:
    """One engine with random features and its workload, driven the way the server drives it."""

    def __init__(self, seed: int, overlap: bool = False):
        self.rng = rng = random.Random(seed)
        self.work, self.tally, self.now = draw_work(rng, plain=0.9 if overlap else 0), Counter(), 0.0
        self.kv_dtype = rng.choice(("auto", "auto", "int8"))
        size, blocks = rng.choice(((1, 48), (3, 17), (4, 11), (4, 14), (4, 40), (16, 5)))
        draft = None if overlap else rng.choice(list(DRAFTS))
        guess = DRAFTS[draft]() if draft in ("itself", "noisy", "small") else DRAFTS[draft]
        models = [toy()] + [guess] * (isinstance(guess, nanoserve.GPT))
        block = sum(KVCache.bytes_per_block(m.config.num_layers, size, m.config.num_kv_heads, m.config.head_dim,
                                            1 if self.kv_dtype == "int8" else 8) for m in models)
        slots, policy = rng.choice((0, 3, 40)), rng.choice(list(POLICIES))
        limit = rng.choice((3, 6, 12))
        self.llm = llm = LLM(
            toy(), kv_dtype=self.kv_dtype, kv_memory=(blocks + 1) * block, block_size=size, swap_memory=slots * block,
            max_batch_tokens=(budget := limit + rng.choice((0, 8, 50))), max_batch_requests=limit,
            policy=POLICIES[policy](rng), prefix_caching=rng.random() < 0.8,
            draft=self.failing(guess) if callable(guess) else guess,
            num_drafts=min(budget, rng.choice((1, 3, 8))) if draft else None, overlap=overlap)
        for kv in llm.caches:  # what was never written must never be read
            for tensor in (*kv.tensors, *kv.host):
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)
        llm.scheduler.ridge = rng.choice((6, 20, 1000)) if draft else 0
        llm.draft_cost = 0.1
        llm.scheduler.clock = lambda: self.now
        swap_rate = rng.choice((0.5, 1))
        llm.scheduler.prefers_swap = lambda tokens, blocks: rng.random() < swap_rate
        self.replays: Counter = Counter()
        self.fail_rate, self.abort_rate = rng.choice((0, 0, 0.05)), rng.choice((0, 0, 0.02))
        self.deadlines = rng.choice(((None,), (None,), (None, 5, 20)))
        forward = toy().forward
        self.forward = lambda batch, kv: (self.fail(), forward(batch, kv))[1]
        self.label = (f"seed {seed}: {overlap=} draft={draft} ridge={llm.scheduler.ridge} {self.kv_dtype} "
                      f"blocks={blocks}x{size} slots={slots} {policy} limit={limit} fails={self.fail_rate} "
                      f"aborts={self.abort_rate}")

    def fail(self):
        if self.rng.random() < self.fail_rate:
            self.tally["failed"] += 1
            raise Trouble

    def capture(self, monkeypatch, rows):
        """Decode graphs for up to so many tokens; steps of more do without."""
        llm, fail_rate, self.fail_rate = self.llm, self.fail_rate, 0
        self.replays, blocks = emulate_graphs(monkeypatch), llm.pool.blocks_for(llm.max_model_len)
        llm.graphs = nanoserve.DecodeGraphs(llm.model, llm.cache, rows, blocks)
        if isinstance(llm.drafter, nanoserve.DraftModel):
            llm.drafter.graphs = nanoserve.DecodeGraphs(llm.drafter.model, llm.drafter.cache, rows, blocks)
        self.fail_rate = fail_rate
        self.label += f" graphs={rows}"

    def failing(self, function):
        def draft(tokens):
            if self.rng.random() < self.fail_rate / 4:
                self.tally["failed in drafting"] += 1
                raise Trouble
            return function(tokens)

        return draft

    def run(self):
        llm, rng, requests, pending = self.llm, self.rng, {}, list(enumerate(self.work))
        told = set()  # whose end somebody was told of
        while pending or llm.has_work():
            while pending and (rng.random() < 0.5 or not llm.has_work()):
                i, (prompt, params) = pending.pop(0)
                options = {"priority": rng.randrange(3), "tenant": rng.choice("ab")}
                try:
                    params.deadline = rng.choice(self.deadlines)
                    requests[i] = llm.add_request(prompt, params, **options)
                except ValueError as error:  # more than this pool holds
                    assert "KV blocks" in str(error) or "n:" in str(error), error
            if requests and rng.random() < self.abort_rate:
                request = rng.choice(rng.choice(list(requests.values())).samples)
                self.tally["aborted"] += request.status != "finished"
                llm.abort(request)
                told.update(sample for sample in request.samples if sample.finish_reason == "abort")
            self.tally["swapped with drafts"] += any(r.host_slots and r.num_output for r in llm.scheduler.waiting)
            before = llm._in_flight
            try:
                told.update(sample for sample in llm.step() if sample.status == "finished")
                self.tally["overlapped"] += before is not None and llm._in_flight is not None
            except Trouble:
                if rng.random() < 0.7:  # else it is just tried again
                    told.update(llm.drop_step("failed"))
            self.now += rng.random()
            llm.scheduler.check()
            if llm.pool.num_free == llm.pool.num_usable and not llm.has_work() and rng.random() < 0.1:
                llm.pool.forget()
        assert is_clean(llm), self.label
        assert told >= {sample for request in requests.values() for sample in request.samples}, self.label
        stats = llm.stats()
        self.tally.update({k: stats[k] for k in ("preemptions", "blocks_swapped_out", "blocks_swapped_in", "hit_tokens",
                                                 "drafted", "accepted", "finished", "aborted")})
        self.tally["replays"] = sum(self.replays.values())
        assert stats["drafted"] >= stats["accepted"] >= stats["saved_steps"]
        assert stats["blocks_swapped_out"] == stats["blocks_swapped_in"] + stats["blocks_swap_freed"]
        plain = test_engine.engine(kv_dtype=self.kv_dtype)
        for i, request in requests.items():
            prompt, params = self.work[i]
            params.deadline = None
            for theirs, ours in zip(plain.generate([prompt], params), request.samples):
                output = llm.output(ours)
                if output.finish_reason == "abort":
                    assert ours.error in (None, "failed", "draft: Trouble()") or ours.expired, (self.label, ours.error)
                    if not params.beam_search:
                        assert output.token_ids == theirs.token_ids[: len(output.token_ids)], self.label
                    continue
                assert ours.error is None, (self.label, ours.error)
                assert (output.token_ids, output.finish_reason) == (theirs.token_ids, theirs.finish_reason), self.label
                for mine, plainly in ((output.logprobs, theirs.logprobs), (output.prompt_logprobs, theirs.prompt_logprobs)):
                    assert (mine is None) == (plainly is None)
                    for a, b in zip(mine or [], plainly or [], strict=True):
                        assert a == pytest.approx(b, abs=1e-6) if b else a == b, self.label
        return self.tally


@pytest.fixture(autouse=True)
def hopeful(monkeypatch):
    monkeypatch.setattr(nanoserve, "draft_length", lambda acceptance, cost, most: most)


def run(seed: int, overlap: bool = False) -> Counter:
    """What happened in the world of this seed."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(seed, overlap)
        model = world.llm.model = copy.copy(world.llm.model)
        patch.setattr(model, "forward", world.forward, raising=False)
        if rows := random.Random(f"graphs {seed}").choice((0, 6, 64)):
            world.capture(patch, rows)
        return world.run()


@pytest.mark.parametrize("first", range(0, 48, 12))
def test_tokens_are_those_of_a_plain_engine(first):
    tally = sum((run(seed) for seed in range(first, first + 12)), Counter())
    assert min(tally[what] for what in ("replays", "accepted", "preemptions", "hit_tokens")) > 0


@pytest.mark.parametrize("first", range(1000, 1060, 15))
def test_steps_that_overlap_give_the_same_tokens(first):
    """Though those that ended are computed once too often, and whoever must know the last token waits for it."""
    tally = sum((run(seed, overlap=True) for seed in range(first, first + 15)), Counter())
    assert min(tally[what] for what in ("overlapped", "preemptions", "hit_tokens", "blocks_swapped_in", "aborted")) > 0


def test_a_block_that_is_copied_from_may_be_swapped_into():
    """One step: A copies the block it shares with B, B makes way for W, and W is swapped into the block B gave up."""
    class Whim(scheduler.Policy):
        rekeys, key = True, staticmethod(lambda request: request.priority)
        outranks = staticmethod(lambda waiting, running: waiting.priority < running.priority)

    greedy, block = SamplingParams(temperature=0, max_tokens=5), KVCache.bytes_per_block(2, 4, 2, 8, 8)
    llm = test_engine.engine(3, policy=Whim(), max_batch_requests=2, swap_memory=9 * block, prefix_caching=False)
    llm.scheduler.prefers_swap = lambda tokens, blocks: True
    w = llm.add_request([1, 2, 3, 4, 5], greedy, priority=0)
    llm.step()
    llm.scheduler.preempt(w)
    pair = llm.add_request([6, 7], SamplingParams(temperature=2, seed=1, max_tokens=4, n=2), priority=-1)
    llm.step()
    for sample in pair.samples:
        sample.priority = 1
    outputs = test_engine.finish(llm, w, pair)
    assert test_engine.tokens_of(outputs) == test_engine.expected([w.tokens[:5], [6, 7]], [greedy, pair.params])
    assert all(request.num_preemptions for request in (w, pair.samples[1]))


def test_what_a_failed_step_was_to_swap_in_is_not_swapped_over_a_copy():
    pool = cache.BlockPool(3, 4, prefix_caching=False, num_host_slots=1)
    first, other = [], []
    pool.extend(first, 0, 3)
    pool.extend(other, 0, 4)
    slots = pool.swap_out(other)
    pool.take_moves()
    pool.swap_in(slots, other)
    pool.release(other)  # the step never ran
    sibling = pool.adopt(first)
    pool.extend(sibling, 3, 4)
    assert pool.take_moves() == ({}, {sibling[0]: first[0]}, {})


@pytest.mark.parametrize("drafter", ["function", "model"])
def test_a_processor_that_refuses_a_wrong_draft_harms_nobody(drafter):
    tokens = [5, 6, 7] + test_engine.Slow.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8))
    legal = [tokens[:i] for i in range(3, 11)]

    def grammar(token_ids, logits):
        if token_ids not in legal:
            raise KeyError(token_ids[-1])
        return logits

    llm = LLM(toy(), draft=small() if drafter == "model" else lambda tokens: [1, 2], kv_memory=1 << 20)
    llm.draft_cost = 0.05
    output, = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8, logits_processor=grammar))
    assert output.token_ids == tokens[3:] and llm.stats()["drafted"]


def test_a_stream_ends_at_its_deadline():
    """With what came until then, as `generate` does."""
    llm, seconds = test_engine.engine(tokenizer="byte_level"), itertools.count()
    llm.scheduler.clock = lambda: next(seconds)
    p = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    whole, part = "".join(llm.stream([1, 2], p)), "".join(llm.stream([1, 2], dataclasses.replace(p, deadline=12)))
    assert whole.startswith(part) and 0 < len(part) < len(whole)


def test_samples_do_not_share_the_failures_of_their_processors():
    llm = test_engine.engine()
    request = llm.add_request([1, 2], SamplingParams(n=2, seed=1, max_tokens=3))
    llm.step()
    assert request.samples[0].failures is not request.samples[1].failures


def test_a_draft_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="^draft: there is no folder"):
        LLM(toy(), draft="./nowhere", kv_memory=1 << 20)


def test_samples_that_expired_before_there_were_any_have_their_places():
    llm, seconds = test_engine.engine(), itertools.count()
    llm.scheduler.clock = lambda: next(seconds)
    outputs = llm.generate([[1, 2], [3]], [SamplingParams(n=2, deadline=0), SamplingParams(n=2, max_tokens=2)])
    assert [(output.finish_reason, output.prompt_token_ids) for output in outputs] == [
        ("abort", [1, 2])] * 2 + [("length", [3])] * 2
