"""Speculation: drafts change how many steps an output takes, and nothing else.

Most of this file is other tests once more, with an engine that speculates: what the engine promises, it promises with
drafts as well. A draft model that is the target itself is the sharpest oracle for everything a draft model does: each of
its drafts must be accepted, so the smallest error in its keys and values shows as one that was not.
"""

import copy
import functools
import inspect
import itertools
import json
import math
import random
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_engine
import torch
from test_engine import (
    CONFIG,
    CROWD,
    GREEDY,
    Slow,
    calls_during,
    emulate_graphs,
    expected,
    finish,
    is_clean,
    tokens_of,
    toy,
)

import kernels
import nanoserve
from nanoserve import GPT, LLM, KVCache, ModelConfig, PromptLookup, SamplingParams, draft_length

torch.set_num_threads(1)


@functools.cache
def noisy(vocab: int = 64) -> GPT:
    """A draft model that agrees with the toy most of the time."""
    model, generator = copy.copy(toy(vocab)), torch.Generator().manual_seed(3)
    model.embed = model.embed + 0.03 * torch.randn(model.embed.shape, generator=generator, dtype=model.embed.dtype)
    return model


@functools.cache
def small(vocab: int = 64) -> GPT:
    """A draft model of another shape, which knows nothing."""
    c = {**CONFIG, "vocab_size": vocab, "num_hidden_layers": 1, "hidden_size": 24, "head_dim": 4, "num_key_value_heads": 1}
    return GPT(ModelConfig.from_dict(c), torch.float64, "cpu").randomize(5, std=0.5)


def wrong(tokens: list[int]) -> list[int]:
    """Guesses that are true one time in sixty-four."""
    return [sum(tokens) * 7 % 64, len(tokens) * 5 % 64, 3, 4]


def likeliest(tokens: list[int], vocab: int = 64) -> list[int]:
    """The target's own greedy tokens, ten of them."""
    tokens, start = list(tokens), len(tokens)
    while len(tokens) < start + 10:
        tokens.append(int(Slow.logits(tuple(tokens), vocab)[-1].argmax()))
    return tokens[start:]


DRAFTERS = {"ngram": lambda vocab: "ngram", "itself": toy, "noisy": noisy, "small": small, "wrong": lambda vocab: wrong,
            "likeliest": lambda vocab: functools.partial(likeliest, vocab=vocab)}


def speculating(drafter: str = "likeliest", ridge: int = 1000):
    """`test_engine.engine`, but of engines that speculate, and are never compute-bound unless told so."""
    def engine(blocks: int = 200, *, model: GPT | None = None, tokenizer: str = "", **options) -> LLM:
        model = model or toy(400 if tokenizer else 64)
        draft = options.setdefault("draft", DRAFTERS[drafter](model.config.vocab_size))
        size = options.setdefault("block_size", 4)
        block = sum(KVCache.bytes_per_block(m.config.num_layers, size, m.config.num_kv_heads, m.config.head_dim, 8)
                    for m in (model, draft) if isinstance(m, GPT))
        llm = LLM(model, kv_memory=(blocks + 1) * block, **{"max_batch_tokens": 64, "max_batch_requests": 16, **options})
        for cache in (llm.cache, getattr(llm.drafter, "cache", llm.cache)):
            cache.data.fill_(math.nan)  # what was never written must never be read
        if tokenizer:
            llm.tokenizer = nanoserve.Tokenizer(test_engine.TOKENIZERS / tokenizer)
        llm.scheduler.ridge, llm.draft_cost = ridge, 0.1
        return llm

    return engine


engine = speculating()
hopeful = pytest.fixture(lambda monkeypatch: monkeypatch.setattr(nanoserve, "draft_length", lambda a, cost, most: most))


# ---- what holds for every engine ----

AGAIN = ["test_outputs_of_generate", "test_n_samples_are_consecutive_and_differ", "test_seeds",
         "test_logprobs_of_prompt_and_output", "test_max_tokens_is_exact", "test_end_tokens", "test_stop_strings",
         "test_leaving_a_stream_early_frees_its_blocks", "test_what_just_fits_is_served",
         "test_reading_the_text_along_the_way", "test_abort_at_any_moment", "test_banning_every_token_is_an_error",
         "test_an_interrupted_step_harms_nobody", "test_salted_caches_are_separate",
         "test_a_stream_is_complete_though_others_step", "test_random_requests_on_a_tiny_pool"]


def variants(name: str):
    """What a test of test_engine.py is parametrized with."""
    axes = [[dict(zip(mark.args[0].split(", "), values if "," in mark.args[0] else [values])) for values in mark.args[1]]
            for mark in getattr(getattr(test_engine, name), "pytestmark", []) if mark.name == "parametrize"]
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)][:12]


@pytest.mark.parametrize("drafter", ["ngram", "noisy"])
@pytest.mark.parametrize("name", AGAIN)
def test_as_without_drafts(name, drafter, monkeypatch, hopeful):
    test = getattr(test_engine, name)
    monkeypatch.setattr(test_engine, "engine", speculating(drafter))
    for arguments in variants(name):
        with pytest.MonkeyPatch.context() as inner:
            needs = "monkeypatch" in inspect.signature(test).parameters
            test(**arguments, **({"monkeypatch": inner} if needs else {}))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("circumstance", ["roomy", "alone", "tiny pool", "budget of three", "no prefix cache",
                                          "warm prefix cache", "few tokens a step", "adaptive"])
def test_tokens_do_not_depend_on_drafts(circumstance, drafter, monkeypatch):
    """Greedy or sampled, with penalties, forks, chunks, hits and preemptions: the tokens of a plain loop."""
    if circumstance != "adaptive":
        monkeypatch.setattr(nanoserve, "draft_length", lambda acceptance, cost, most: most)
    options = {"tiny pool": {"blocks": 11}, "budget of three": {"max_batch_tokens": 3, "max_batch_requests": 3},
               "no prefix cache": {"prefix_caching": False}}.get(circumstance, {})
    llm = speculating(drafter, 12 if circumstance == "few tokens a step" else 1000)(**options)
    prompts, params = zip(*CROWD)
    if circumstance == "warm prefix cache":
        llm.generate(prompts, GREEDY)
    before = llm.stats()
    if circumstance == "alone":
        outputs = [output for prompt, p in CROWD for output in llm.generate([prompt], p)]
    else:
        outputs = finish(llm, *[llm.add_request(*each) for each in CROWD])
    assert tokens_of(outputs) == expected(prompts, params)
    stats = {name: count - before[name] for name, count in llm.stats().items()}
    assert (stats["preemptions"] > 0) == (circumstance == "tiny pool")
    assert stats["drafted"] > 0 or (drafter, circumstance) == ("ngram", "few tokens a step")
    assert stats["drafted"] >= stats["accepted"] >= stats["saved_steps"]
    assert stats["output_tokens"] == sum(p.n * p.max_tokens for p in params)
    if drafter == "itself":  # a draft that was not accepted would have been computed from wrong keys and values
        assert stats["accepted"] == stats["drafted"] == stats["saved_steps"]
    assert (stats["draft_passes"] > 0) == isinstance(llm.drafter, nanoserve.DraftModel)


def lies(llm: LLM) -> list[tuple[int, int]]:
    """(block, offset) of keys and values that the target, drafting for itself, should have twice, and has not. All that
    counts as computed, by whoever runs or in the prefix index, is there unless its block is stale.
    """
    size, [mine, its] = llm.pool.block_size, [cache.data for cache in llm.caches]
    filled = {block: size for block in llm.pool.index.values()}
    for request in llm.scheduler.running:
        for i, block in enumerate(request.block_table):
            filled[block] = max(filled.get(block, 0), min(size, request.num_computed - i * size))
    return [(block, offset) for block, count in filled.items()
            for offset in range(min(count, llm.drafter.stale.get(block, size)))
            if not torch.allclose(mine[:, :, block, offset], its[:, :, block, offset], rtol=0, atol=1e-9)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drafter", ["itself", "noisy"])
def test_a_drafter_keeps_up_with_the_target(drafter, seed, hopeful):
    """Random arrivals, prefixes, forks, aborts and preemptions. The target, drafting for itself, is never wrong."""
    rng, prompts, work = random.Random(seed), [], []
    stem = [rng.randrange(64) for _ in range(20)]
    llm = speculating(drafter, rng.choice((8, 20, 1000)))(rng.randint(10, 16), num_drafts=rng.choice((1, 3, 6)),
                                                          max_batch_tokens=rng.choice((6, 12, 40)), max_batch_requests=6,
                                                          swap_memory=1 << 14)
    llm.scheduler.prefers_swap, ridge = lambda tokens, blocks: seed % 2, llm.scheduler.ridge
    while len(work) < 30 or llm.has_work():
        if len(work) < 30 and rng.random() < 0.5:
            prompt = stem[: rng.randrange(21)] + [rng.randrange(64) for _ in range(rng.randint(1, 4))]
            p = SamplingParams(temperature=rng.choice((0, 2.0)), seed=rng.randrange(9), max_tokens=rng.randint(1, 14),
                               n=rng.choice((1, 1, 2)), frequency_penalty=rng.choice((0, 0, 1)))
            work.append(llm.add_request(prompt, p))
            prompts.append((prompt, p))
        elif work and rng.random() < 0.05:
            llm.abort(rng.choice(work))
        if rng.random() < 0.3:  # a while without drafts
            llm.scheduler.ridge = rng.choice((1, ridge))
        llm.step()
        llm.scheduler.check()
        assert drafter == "noisy" or not lies(llm)
        for request in llm.scheduler.running:  # nothing is left of a draft that was not accepted, nor a block
            assert request.drafts == [] and len(request.block_table) == llm.pool.blocks_for(request.num_computed)
    stats = llm.stats()
    assert is_clean(llm) and stats["drafted"] > 5 and stats["preemptions"] and stats["hit_tokens"]
    assert (stats["blocks_swapped_in"] > 0) == seed % 2
    assert drafter == "noisy" or stats["accepted"] == stats["drafted"] == stats["saved_steps"]
    for request, (prompt, p) in zip(work, prompts):
        for i, sample in enumerate(request.samples):
            full = Slow.generate(prompt, p, i)
            assert sample.tokens[len(prompt):] == full[: sample.num_output if sample.finish_reason == "abort" else None]


# ---- exactly how many steps ----


def test_a_perfect_drafter_saves_all_but_one_step_in_k_plus_one():
    llm = engine(num_drafts=3)
    [output] = llm.generate([[5, 6, 7]], replace(GREEDY, max_tokens=13))
    assert output.token_ids == Slow.generate([5, 6, 7], replace(GREEDY, max_tokens=13))
    stats = llm.stats()
    # The prompt's step brings the first token and three more, two steps four each; one is left, and no draft for it.
    assert (stats["steps"], stats["forward_passes"], stats["computed_tokens"]) == (4, 4, 3 + 3 + 4 + 4 + 1)
    assert (stats["drafted"], stats["accepted"], stats["saved_steps"], stats["output_tokens"]) == (9, 9, 9, 13)


def test_a_useless_drafter_costs_no_step_and_is_asked_less_and_less():
    lengths, full = [], set(Slow.generate([5, 6, 7], replace(GREEDY, max_tokens=100)))
    never = next(token for token in range(64) if token not in full)
    llm = engine(draft=lambda tokens: [never] * 8)
    llm.draft_cost = 0.2
    request = llm.add_request([5, 6, 7], replace(GREEDY, max_tokens=100))
    while llm.has_work():
        before = llm.stats()["drafted"]
        llm.step()
        lengths.append(llm.stats()["drafted"] - before)
    assert request.tokens[3:] == Slow.generate([5, 6, 7], replace(GREEDY, max_tokens=100))
    stats = llm.stats()
    assert stats["steps"] == 100 and stats["accepted"] == stats["saved_steps"] == 0
    # The estimate begins at 3/4 and shrinks by an eighth with each failure, and the best length with it.
    want = [draft_length(round((0.75 + 0.25 / 512) * (7 / 8) ** i, 2), 0.2, 8) for i in range(10)]
    assert lengths[:10] == want and want[0] == 3 and want[-1] == 1
    assert max(lengths[20:]) == 1 and sum(lengths[20:]) < 20  # given up, but tried again now and then


def test_the_best_length():
    assert [draft_length(a, 0.1, 8) for a in (0, 0.05, 0.2, 0.5, 0.8, 1)] == [0, 0, 1, 2, 6, 8]
    assert draft_length(0.5, 0.1, 10**5) == 2  # not a moment's work if each length were summed up anew
    for a, cost in itertools.product((0.1, 0.3, 0.6, 0.9), (0.01, 0.1, 0.5)):
        rate = [(1 - a ** (k + 1)) / (1 - a) / (1 + k * cost) for k in range(9)]
        assert draft_length(a, cost, 8) == rate.index(max(rate))


def test_no_drafts_where_they_would_cost_what_they_save(hopeful):
    """Sixteen tokens are a full step for this engine: sixteen requests draft nothing, twelve share four drafts."""
    for requests, drafted in ((16, 0), (12, 4), (4, 12), (1, 8)):
        llm = speculating("wrong", 16)(draft=lambda tokens: [1] * 8)
        for i in range(requests):
            llm.add_request([i], replace(GREEDY, max_tokens=30))
        llm.step()
        assert llm.stats()["drafted"] == drafted and llm.stats()["computed_tokens"] == requests + drafted
    llm = speculating("wrong", 16)(draft=lambda tokens: [1] * 8)  # a long prompt fills a step as well
    llm.add_request([1], replace(GREEDY, max_tokens=30))
    llm.step()
    llm.add_request([2] * 40, replace(GREEDY, max_tokens=30))
    before = llm.stats()["drafted"]
    llm.step()
    assert llm.stats()["drafted"] == before


# ---- what a draft model computes, and when ----


def watched(llm: LLM) -> list[int]:
    """How many rows each pass of the draft model has, as they come."""
    passes, forward = [], llm.drafter.model.forward
    llm.drafter.model = copy.copy(llm.drafter.model)
    llm.drafter.model.forward = lambda batch, cache: (passes.append(len(batch.tokens)), forward(batch, cache))[1]
    return passes


def is_perfect(llm: LLM) -> bool:
    """Whether the target has drafted for itself, each draft was accepted, and none was computed from a lie."""
    stats = llm.stats()
    return stats["accepted"] == stats["drafted"] > 0 and not lies(llm)


def test_no_room_no_pass(hopeful):
    """A request without drafts costs the draft model nothing. The next drafts begin with what is missing, once."""
    llm = speculating("itself", 1)(num_drafts=3)
    passes, request = watched(llm), llm.add_request([7] * 10, replace(GREEDY, max_tokens=30))
    for _ in range(8):
        llm.step()
    assert passes == [] and llm.stats()["draft_passes"] == 0 and request.num_output == 8 and llm.drafter.stale
    llm.scheduler.ridge = 1000
    llm.step()
    assert passes == [10 + 8, 1, 1] and request.num_output == 12
    llm.step()
    assert passes == [10 + 8, 1, 1, 2, 1, 1]  # the last draft, which no pass has seen, and what came after it
    assert is_perfect(llm) and llm.stats()["draft_passes"] == 6


def test_what_a_block_lacked_is_nothing_to_its_next_owner(hopeful):
    llm = speculating("itself", 1)(9, num_drafts=3)
    passes = watched(llm)
    llm.generate([[7] * 10], replace(GREEDY, max_tokens=24))
    assert len(llm.drafter.stale) > 7
    llm.scheduler.ridge = 1000
    llm.generate([[8] * 3], replace(GREEDY, max_tokens=30))
    assert passes[0] == 3 and max(passes[1:]) == 2 and is_perfect(llm)


def test_a_prefix_hit_knows_what_the_draft_model_lacks(hopeful):
    """Who drafts fills what others have left out, for all to come; who drafts not leaves no trace in what is shared."""
    llm, p, stem = speculating("itself", 1)(num_drafts=2), replace(GREEDY, max_tokens=12), [*range(17)]
    passes = watched(llm)
    llm.generate([stem], replace(GREEDY, max_tokens=1))
    llm.scheduler.ridge = 1000
    first = llm.add_request([*stem, 1], p)
    llm.step()
    assert llm.stats()["hit_tokens"] == 16 and passes == [18, 1]
    llm.scheduler.ridge = 1
    llm.add_request([*stem, 2], p)  # on its way without drafts
    llm.step()
    llm.scheduler.ridge = 1000
    llm.add_request([*stem, 3], p)
    llm.step()
    # Two tokens of the first, the last draft and one step without; of the second all its own; of the third likewise.
    assert llm.stats()["hit_tokens"] == 48 and passes[2:] == [3 + 3 + 2, 3] and first.num_output == 3 + 1 + 3
    while llm.has_work():
        llm.step()
    assert is_perfect(llm)


@pytest.mark.parametrize("swapped", [False, True])
def test_preemption_forgets_nothing_that_is_missing(swapped, hopeful):
    """Blocks that come back, from the index or the host, are as complete as they went."""
    llm = speculating("itself", 1)(num_drafts=2, swap_memory=1 << 16, prefix_caching=not swapped)
    llm.scheduler.prefers_swap = lambda tokens, blocks: swapped
    passes, request = watched(llm), llm.add_request([*range(9)], replace(GREEDY, max_tokens=40))
    for ridge, rows in ((1, []), (1000, [11, 1, 2, 1])):
        llm.scheduler.ridge = ridge
        llm.step()
        llm.scheduler.preempt(request)
        llm.step()
        assert passes == rows
    while llm.has_work():
        llm.step()
    assert is_perfect(llm) and request.num_preemptions == 2 and llm.stats()["blocks_swapped_in"] == swapped * 7


def test_a_copied_block_lacks_what_its_source_lacks(hopeful):
    """Two samples share the block that their prompt ends in, and one of them gets a copy of it."""
    llm = speculating("itself", 1)(num_drafts=2)
    passes = watched(llm)
    llm.add_request([*range(6)], SamplingParams(n=2, temperature=2.0, seed=1, max_tokens=20))
    llm.step()
    llm.scheduler.ridge = 1000
    llm.step()
    assert passes[0] == 2 * 7
    llm.step()
    assert passes[2] <= 2 * 2
    while llm.has_work():
        llm.step()
    assert is_perfect(llm)


def test_catching_up_takes_no_more_than_the_token_budget(hopeful):
    """A request has no drafts until it has caught up, and others are not kept from theirs."""
    llm = speculating("itself", 1)(num_drafts=2, max_batch_tokens=16, max_batch_requests=2)
    passes, long = watched(llm), llm.add_request([*range(50)], replace(GREEDY, max_tokens=30))
    for _ in range(4):
        llm.step()
    short, llm.scheduler.ridge = llm.add_request([9], replace(GREEDY, max_tokens=30)), 1000
    lengths = []
    while long.num_computed < 60:
        llm.step()
        lengths.append((long.num_output, short.num_output))
    assert max(passes) <= 16 and passes[0] == 8 + 1
    assert lengths[:6] == [(2, 3), (3, 6), (4, 9), (5, 12), (6, 15), (7, 18)]
    assert is_perfect(llm) and long.num_output > 10


def test_a_draft_costs_what_it_takes(monkeypatch):
    """Not what the parameters suggest. Measured with steps that leave no trace."""
    clock = [0.0]
    monkeypatch.setattr(nanoserve.time, "perf_counter", lambda: clock[0])

    def taking(seconds):
        model = copy.copy(toy())
        model.forward = lambda batch, cache: (clock.__setitem__(0, clock[0] + seconds), toy().forward(batch, cache))[1]
        return model

    for seconds in (1, 4, 12):
        llm = LLM(taking(8), draft=taking(seconds), kv_memory=1 << 20, block_size=4)
        assert llm.draft_cost == pytest.approx(seconds / 8)
        assert is_clean(llm) and not llm.pool.index and not llm.has_work() and not any(
            count for name, count in llm.stats().items() if name != "blocks_free")
    assert LLM(toy(), draft=lambda tokens: [], kv_memory=1 << 20).draft_cost == 1 / 16
    assert LLM(toy(), draft=toy(), kv_memory=1 << 20, max_model_len=2).draft_cost == 1 / 16  # no room for any


def test_nobody_is_preempted_for_a_draft(hopeful):
    """Five blocks of four. Two requests that need five together never need a sixth, however much they would draft."""
    llm = engine(5)
    requests = [llm.add_request([1, 2, 3, 4], GREEDY), llm.add_request([5, 6, 7], replace(GREEDY, max_tokens=6))]
    finish(llm, *requests)
    assert llm.stats()["preemptions"] == 0 < llm.stats()["accepted"]


def test_room_that_no_draft_fills_is_given_back(hopeful):
    llm = engine(draft=lambda tokens: [3] * (len(tokens) % 3))
    llm.add_request([1, 2, 3], replace(GREEDY, max_tokens=30))
    while llm.has_work():
        llm.step()
        assert all(len(r.block_table) == llm.pool.blocks_for(r.num_computed) for r in llm.scheduler.running)


def test_drafts_leave_the_prefix_cache_alone(hopeful):
    """Rejected drafts never match anything, and the blocks they took are the next to be taken, not others each time."""
    llm = speculating("wrong")(46)
    llm.generate([[9] * 61], replace(GREEDY, max_tokens=1))  # 15 full blocks; then three times 9, and 2 at most
    for _ in range(3):
        llm.generate([[1, 2, 3]], replace(GREEDY, max_tokens=30))
    cached = {tuple(tokens) for _, tokens in llm.pool.index}
    assert cached == {(9,) * 4} | {tuple(([1, 2, 3] + Slow.generate([1, 2, 3], replace(GREEDY, max_tokens=30)))[i : i + 4])
                                   for i in range(0, 32, 4)}
    before = llm.stats()["hit_tokens"]
    llm.generate([[9] * 61], replace(GREEDY, max_tokens=1))
    assert llm.stats()["hit_tokens"] - before == 60


# ---- the same output in every detail ----


@pytest.mark.parametrize("drafter", ["likeliest", "itself"])
def test_an_output_ends_where_it_would(drafter, hopeful):
    """Stop tokens, stop strings, min_tokens and logprobs, with drafts that run past all of them."""
    plain, fast = test_engine.engine(tokenizer="byte_level"), speculating(drafter)(tokenizer="byte_level")
    base = replace(GREEDY, max_tokens=24, logprobs=3)
    [whole] = plain.generate(["Once upon a time"], base)
    tokens, text = whole.token_ids, whole.text
    cases = [base, replace(base, stop=text[9:12]), replace(base, stop=[text[20:23], text[5:7]], min_tokens=9)]
    cases += [replace(base, stop_token_ids=[token], min_tokens=least) for token in tokens[2:12:3] for least in (0, 7)]
    for p in cases + [replace(p, temperature=1.5, seed=4, n=2) for p in cases]:
        slow, quick = plain.generate(["Once upon a time"], p), fast.generate(["Once upon a time"], p)
        for a, b in zip(slow, quick):
            assert replace(a, logprobs=None) == replace(b, logprobs=None)
            assert [list(entry) for entry in a.logprobs] == [list(entry) for entry in b.logprobs]
            for x, y in zip(a.logprobs, b.logprobs):
                assert list(x.values()) == pytest.approx(list(y.values()), abs=1e-5)
    assert fast.stats()["steps"] < plain.stats()["steps"] / 2 and is_clean(fast)
    if drafter == "itself":  # some were never asked, as the output had ended before them
        assert fast.stats()["saved_steps"] < fast.stats()["accepted"] < fast.stats()["drafted"]


@pytest.mark.parametrize("drafter", ["noisy", "itself"])
def test_penalties_and_bans_count_drafts_as_output(drafter, hopeful):
    """What is sampled after a draft is sampled as if the draft were true, so the strongest penalties see it."""
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    for p in (SamplingParams(presence_penalty=40, repetition_penalty=1.5), SamplingParams(frequency_penalty=15),
              SamplingParams(frequency_penalty=-9), SamplingParams(repetition_penalty=0.3),
              SamplingParams(min_tokens=9, max_tokens=24, stop_token_ids=[*range(0, 64, 2)]),
              SamplingParams(min_tokens=3, max_tokens=24, stop_token_ids=[*range(30)], logit_bias={40: 20.0})):
        for temperature in (0, 6.0):
            params = [replace(p, temperature=temperature, max_tokens=24, seed=i) for i in range(3)]
            llm = speculating(drafter)()
            assert tokens_of(llm.generate(prompts, params)) == expected(prompts, params)
            assert llm.stats()["drafted"] > 0


def test_the_distribution_is_the_targets(hopeful):
    """Chi-square over all 125 outputs of three tokens, with drafts of every kind, against the exact probabilities."""
    model, prompt, N = toy(5), [1, 2, 0, 3], 2000
    p = SamplingParams(temperature=12.0, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, max_tokens=3)

    def probabilities(output):
        logits = Slow.edited(Slow.logits((*prompt, *output), 5)[-1].tolist(), prompt, list(output), p, set())
        one = [torch.tensor([x]) for x in (p.temperature, p.top_k, p.top_p, p.min_p)]
        return kernels.token_probabilities(torch.tensor([logits]), *one)[0].tolist()

    exact = {(a, b, c): pa * pb * pc for a, pa in enumerate(probabilities(())) for b, pb in enumerate(probabilities((a,)))
             for c, pc in enumerate(probabilities((a, b)))}
    for draft in (noisy(5), lambda tokens: [sum(tokens) % 5, len(tokens) % 5], lambda tokens: [0, 0, 0]):
        llm = speculating()(400, model=model, draft=draft, max_batch_requests=64, max_batch_tokens=256)
        counts = Counter(tuple(o.token_ids) for o in llm.generate([prompt] * N, [replace(p, seed=i) for i in range(N)]))
        assert all(exact[output] > 0 for output in counts) and sum(counts.values()) == N
        common = [output for output, share in exact.items() if share * N >= 5]
        rest = N - sum(counts[output] for output in common), N - sum(exact[output] * N for output in common)
        pairs = [(counts[output], exact[output] * N) for output in common] + ([rest] if rest[1] >= 5 else [])
        chi2, freedom = sum((seen - mean) ** 2 / mean for seen, mean in pairs), len(pairs) - 1
        assert chi2 < freedom + 3.5 * math.sqrt(2 * freedom), (chi2, freedom)
        stats = llm.stats()
        assert freedom > 20 and 0.1 < stats["accepted"] / stats["drafted"] < 0.95


def test_a_draft_model_with_the_targets_dice_is_accepted_more_often():
    """At a temperature: drawn from the draft model at the target's noise, against its likeliest token."""
    def accepted(greedy):
        llm = speculating("noisy")(num_drafts=1)
        if greedy:
            draw = llm.draw
            llm.drafter.propose = functools.partial(drafting_greedily, llm, llm.drafter.propose, draw)
        p = SamplingParams(temperature=8.0, max_tokens=40)
        llm.generate([[i, 3, i] for i in range(10)], [replace(p, seed=i) for i in range(10)])
        return llm.stats()["accepted"] / llm.stats()["drafted"]

    def drafting_greedily(llm, propose, draw, owner, plan):
        llm.draw = lambda batch, logits: logits.argmax(-1)
        propose(owner, plan)
        llm.draw = draw

    assert accepted(greedy=False) > accepted(greedy=True) + 0.1


# ---- things that go wrong half-way ----


@pytest.mark.parametrize("drafter", ["noisy", "ngram"])
@pytest.mark.parametrize("where", ["lay_out", "propose", "pack", "forward", "sample", "draw"])
def test_a_step_that_fails_with_drafts_pending_can_be_repeated(monkeypatch, where, drafter, hopeful):
    llm, calls = speculating(drafter)(model=copy.copy(toy())), itertools.count()
    p = replace(GREEDY, max_tokens=20)
    prompts = [[1, 2, 3] * 4, [7, 8]]
    requests = [llm.add_request(prompt, p) for prompt in prompts]
    owner = llm.model if where == "forward" else llm
    original = getattr(owner, where)

    def interrupted(*args):
        if next(calls) in (2, 7, 15):
            raise InterruptedError
        return original(*args)

    monkeypatch.setattr(owner, where, interrupted)
    failures = 0
    while llm.has_work():
        try:
            llm.step()
        except InterruptedError:
            failures += 1
        llm.scheduler.check()
    assert failures >= 2 and tokens_of(finish(llm, *requests)) == [Slow.generate(prompt, p) for prompt in prompts]


def test_a_step_dropped_with_drafts_pending_spares_the_others(monkeypatch, hopeful):
    llm = speculating("noisy")(model=copy.copy(toy()))
    first = llm.add_request([1, 2, 3], GREEDY)
    llm.step()
    monkeypatch.setattr(llm, "sample", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.step()
    assert llm.drop_step("broken") == [first] and first.error == "broken" and is_clean(llm)
    monkeypatch.undo()
    assert tokens_of(llm.generate([[1, 2, 3]], GREEDY)) == [Slow.generate([1, 2, 3], GREEDY)]
    assert llm.stats()["hit_tokens"] == 0


def test_a_broken_draft_model_is_no_ones_problem():
    draft = copy.copy(noisy())
    draft.head = draft.head * math.nan
    llm = engine(draft=draft)
    assert tokens_of(llm.generate([[1, 2, 3]], GREEDY)) == [Slow.generate([1, 2, 3], GREEDY)]
    assert llm.stats()["drafted"] == 0 and llm.stats()["steps"] == 8


@pytest.mark.parametrize("bad", [[64], [-1], [1.0], ["a"], [True]])
def test_guesses_that_are_no_tokens_are_refused(bad):
    with pytest.raises(ValueError, match="draft: .*the function proposed .* 0 to 63"):
        engine(draft=lambda tokens: bad).generate([[1, 2]], GREEDY)


@pytest.mark.parametrize("bad", [lambda tokens: 1 / 0, lambda tokens: 5, lambda tokens: "text", lambda tokens: {1: 2}])
def test_a_function_that_fails_ends_only_its_request(bad, hopeful):
    """With an error that says whose fault it was, and after the token that was sampled before."""
    llm = engine(draft=lambda tokens: bad(tokens) if len(tokens) == 5 and tokens[0] == 1 else [])
    requests = [llm.add_request(prompt, GREEDY) for prompt in ([1, 2, 3], [4, 5])]
    while llm.has_work():
        llm.step()
    assert requests[0].error.startswith("draft: ") and requests[0].finish_reason == "abort"
    assert requests[0].tokens[3:] == Slow.generate([1, 2, 3], GREEDY)[:2] and is_clean(llm)
    assert requests[1].error is None and requests[1].tokens[2:] == Slow.generate([4, 5], GREEDY)


def test_a_function_may_keep_what_it_is_given(hopeful):
    def greedy(tokens):
        guess = tokens[:3]
        tokens.clear()
        return guess

    assert tokens_of(engine(draft=greedy).generate([[1, 2]], GREEDY)) == [Slow.generate([1, 2], GREEDY)]


# ---- n-gram lookup ----


class Text:
    def __init__(self, tokens):
        self.tokens = tokens


def test_prompt_lookup():
    """What followed the longest match, the latest of several; text that repeats goes on repeating."""
    def look(tokens, k=4):
        return PromptLookup()(Text(tokens), k)

    assert look([1, 2, 3, 9, 8, 1, 2, 3]) == [9, 8, 1, 2]
    assert look([1, 2, 3, 9, 8, 1, 2, 3], 1) == [9]
    assert look([1, 2, 7, 5, 1, 2, 6, 4, 1, 2], 2) == [6, 4]  # the latest
    assert look([4, 1, 2, 7, 3, 1, 2, 6, 9, 4, 1, 2], 1) == [7]  # the longest
    assert look([5, 1, 1, 1], 5) == [1] * 5 and look([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert look([1, 2, 3, 4, 5, 6]) == look([1]) == look([1, 2, 1]) == []


def test_prompt_lookup_grows_with_its_request():
    """Token by token it finds what it finds all at once, and each token costs the same."""
    rng, lookup, request = random.Random(2), PromptLookup(), Text([0])
    for _ in range(400):
        request.tokens.append(rng.randrange(3))
        assert lookup(request, 5) == PromptLookup()(Text(request.tokens), 5)
    cost = []
    for length in (100, 10_000):
        request = Text([i * i % 1009 for i in range(length)])
        lookup(request, 4)
        request.tokens.append(5)
        cost.append(calls_during(functools.partial(lookup, request, 4)))
    assert cost[0] == cost[1]
    gone = weakref.ref(request)
    del request
    assert gone() is None and len(lookup.indices) == 0


# ---- memory, options, graphs ----


def test_both_caches_share_the_budget_and_the_blocks():
    llm = LLM(toy(), draft=small(), kv_memory=1 << 20, block_size=4)
    alone = LLM(toy(), kv_memory=1 << 20, block_size=4)
    used = llm.cache.data.nbytes + llm.drafter.cache.data.nbytes
    assert used <= 1 << 20 and llm.pool.num_blocks < alone.pool.num_blocks
    assert llm.cache.data.shape[2] == llm.drafter.cache.data.shape[2] == llm.pool.num_blocks
    assert "drafts from 0.0M parameters" in llm.describe() and "drafts" not in alone.describe()
    assert "drafts from the text" in engine(draft="ngram").describe()


@pytest.mark.parametrize("options, message", [
    ({"draft": 7}, "draft: .*int"), ({"draft": "no/such/draft"}, "draft: .*no/such/draft"),
    ({"draft": lambda: GPT(ModelConfig.from_dict({**CONFIG, "vocab_size": 65}), torch.float64, "cpu")}, "draft: .*65.*64"),
    ({"draft": lambda: GPT(toy().config, torch.float64, "cpu", max_len=100)}, "draft: .*100.*max_model_len=128"),
    ({"num_drafts": 3}, "num_drafts: 3.*without a draft"), ({"draft": "ngram", "num_drafts": 0}, "num_drafts: .*0"),
    ({"draft": "ngram", "num_drafts": 65, "max_batch_tokens": 64, "max_batch_requests": 4}, "num_drafts: .*64.*65"),
    ({"draft": "default"}, "draft: .*1536.*64")], ids=lambda value: value if isinstance(value, str) else "")
def test_impossible_drafters_are_refused(options, message):
    if callable(options.get("draft")):
        options = {"draft": options["draft"]()}
    with pytest.raises(ValueError, match=message) as error:
        LLM(toy(), kv_memory=1 << 20, **options)
    assert len(str(error.value).splitlines()) == 1


def test_a_draft_with_other_words_is_refused(tmp_path, hopeful):
    """The same number of tokens does not make them the same."""
    from test_cli import CONFIG as config
    from test_cli import save_model

    model, draft = tmp_path / "model", tmp_path / "draft"
    for folder in (model, draft):
        folder.mkdir()
        save_model(folder, config)
    llm = LLM(model, draft=draft, kv_memory=1 << 20, dtype="float32")
    assert llm.generate("Once upon", GREEDY) == LLM(model, kv_memory=1 << 20, dtype="float32").generate("Once upon", GREEDY)
    stats = llm.stats()
    assert stats["accepted"] == stats["drafted"] == 7 and stats["steps"] == 1
    words = json.loads((draft / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (draft / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="draft: .* has other tokens than"):
        LLM(model, draft=draft, kv_memory=1 << 20)


def test_graphs_of_both_models(monkeypatch, hopeful):
    """Decode graphs, emulated: with drafts too, and for short prompts, every step of either model is a replay."""
    replays = emulate_graphs(monkeypatch)
    several = [5, 6], SamplingParams(n=2, temperature=2.0, seed=3, max_tokens=4, ignore_eos=True)  # two rows, both of [6]
    tokens = [expected(*zip(*crowd)) for crowd in (CROWD, [several])]
    llm = speculating("noisy")()
    blocks = llm.pool.blocks_for(llm.max_model_len)
    for holder, model, cache in ((llm, llm.model, llm.cache), (llm.drafter, llm.drafter.model, llm.drafter.cache)):
        holder.graphs = nanoserve.DecodeGraphs(model, cache, 64, blocks)
        monkeypatch.setattr(model, "forward", None)  # from here on only replays can have come from it
    got = [tokens_of(finish(llm, *[llm.add_request(*each) for each in crowd])) for crowd in (CROWD, [several])]
    assert got == tokens and len({tuple(sample) for sample in tokens[1]}) == 2
    assert max(size for model, size in replays if model is llm.model) > len(CROWD), "tokens, not requests"
    assert {model for model, _ in replays} == {llm.model, llm.drafter.model}


def test_what_graphs_are_for(monkeypatch):
    """As many rows as a step with drafts has tokens; and no step whose tokens would read the same keys too often."""
    captured = []
    monkeypatch.setattr(LLM, "_capture", lambda self, model, cache, rows: captured.append(rows))
    for requests, drafts in ((1, 8), (3, 4), (300, 2)):
        engine(max_batch_tokens=512, max_batch_requests=requests, num_drafts=drafts)
    speculating("noisy")(max_batch_requests=1)
    speculating("noisy")(max_batch_requests=256, max_batch_tokens=256)
    assert captured == [9, 15, 300, 9, 2, 256, 256]
    llm = test_engine.engine(max_batch_requests=2)
    llm.add_request([1] * 20, GREEDY)
    llm.add_request([2] * 7, GREEDY)
    batch, *_ = llm.pack(llm.scheduler.schedule())
    for rows, key_bytes, answer in ((27, 2**32 // 211, True), (26, 1, False), (27, 2**32 // 211 + 1, False)):
        graphs = SimpleNamespace(sizes=[1, rows], key_bytes=key_bytes)
        assert nanoserve.DecodeGraphs.can_replay(graphs, batch) == answer
    assert batch.repeated_keys == 19 * 20 // 2 + 6 * 7 // 2


def test_the_default_model_with_its_draft():
    """On its own kind of text at most half a forward pass of the target for a token; and the same text."""
    options = {"dtype": "float32", "kv_memory": 1 << 24}
    plain, fast = LLM(**options), LLM(draft="default", **options)
    fast.draft_cost = 0.3  # instead of what was measured
    prompt = "Once upon a time there was Lily, a clever girl. Lily lived by the"
    for p in (SamplingParams(temperature=0, max_tokens=80), SamplingParams(temperature=0.8, seed=1, max_tokens=80)):
        assert fast.generate(prompt, p) == plain.generate(prompt, p)
    stats = fast.stats()
    assert stats["forward_passes"] / stats["output_tokens"] <= 0.5


def test_the_command_line(capsys):
    args = nanoserve.parser_for("serve").parse_args(["--draft", "ngram", "--num-drafts", "5"])
    llm = nanoserve.make_llm(args, toy())
    assert isinstance(llm.drafter, PromptLookup) and llm.num_drafts == 5
    assert nanoserve.main(["hello", "--num-drafts", "5"]) == 2
    assert "num_drafts: 5 was given without a draft" in capsys.readouterr().err
    for option in ([], ["--draft", "default"]):
        assert nanoserve.main(["Once upon a", "--temperature=0", "--max-tokens=12", "--dtype=float32", *option]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_bench_says_what_drafts_were_good_for(capsys, monkeypatch):
    monkeypatch.setattr(nanoserve, "measure_roofline", lambda dtype, device: (1e9, 1e9))
    tiny = ["--model", str(nanoserve.DEFAULT_MODEL), "--requests=2", "--input-len=3..5", "--output-len=8", "--runs=1"]
    assert nanoserve.main(["bench", *tiny, "--draft", "ngram"]) == 0
    assert "accepted; a request takes " in capsys.readouterr().out
