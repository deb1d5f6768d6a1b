"""Beam search: against all sequences of a tiny vocabulary, against a plain search, and on pools that are too small."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from test_engine import CONFIG, engine, finish, is_clean

from nanoserve import GPT, LLM, ModelConfig, SamplingParams
from scheduler import FINISHED, Fair

torch.set_num_threads(1)
STOP = 3


def tiny(vocab=5) -> GPT:
    """A model that knows so few tokens that all its texts can be tried."""
    return GPT(ModelConfig.from_dict({**CONFIG, "vocab_size": vocab}), torch.float64, "cpu").randomize(3, std=0.6)


def logprobs(llm, prompt, outputs) -> list[list[float]]:
    """The log-probability of every token of each output after the prompt, from the engine's plain answers."""
    sequences = [[*prompt, *output] for output in outputs]
    answers = llm.generate(sequences, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))
    return [[answer.prompt_logprobs[i][sequence[i]] for i in range(len(prompt), len(sequence))]
            for answer, sequence in zip(answers, sequences)]


def plain_search(llm, prompt, n, length, power, stop=STOP) -> list[tuple[float, list[int]]]:
    """The same search as a loop that computes everything anew: [(score / length ** power, output), ...], best first."""
    live, ended = [(0.0, [])], []
    for step in range(1, length + 1):
        outputs = [[*output, token] for _, output in live for token in range(llm.model.config.vocab_size)]
        scored = sorted(zip(map(math.fsum, logprobs(llm, prompt, outputs)), outputs), reverse=True)
        live = []
        for score, output in scored:
            if len(live) == n:
                break
            (ended if output[-1] == stop or step == length else live).append((score, output))
    return sorted(((score / len(output) ** power, output) for score, output in ended), reverse=True)[:n]


def search(llm, prompt, n, length, power=1.0, **more):
    """[(score / length ** power, output), ...] from the engine."""
    more.setdefault("stop_token_ids", [STOP])
    outputs = llm.generate([prompt], SamplingParams(beam_search=True, n=n, max_tokens=length, length_penalty=power, **more))
    return [(out.cumulative_logprob / len(out.token_ids) ** power, out.token_ids) for out in outputs]


def assert_same(got, want):
    assert [tokens for _, tokens in got] == [tokens for _, tokens in want]
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4)


@pytest.mark.parametrize("power", (0.0, 1.0, -0.5, 2.0))
def test_a_search_wide_enough_finds_the_likeliest_of_all_sequences(power):
    model, prompt, length = tiny(), [0, 1, 2, 4], 4
    llm = LLM(model, kv_memory=8 << 20, block_size=2, max_batch_requests=100, max_batch_tokens=400)
    every = [list(output) for size in range(1, length + 1) for output in itertools.product(range(5), repeat=size)
             if STOP not in output[:-1] and (output[-1] == STOP or size == length)]
    scored = [(math.fsum(row) / len(output) ** power, output) for row, output in zip(logprobs(llm, prompt, every), every)]
    assert len(every) == 1 + 4 + 16 + 64 * 5
    assert_same(search(llm, prompt, 64, length, power), sorted(scored, reverse=True)[:64])
    assert is_clean(llm)


@pytest.mark.parametrize("n, length, power", [(1, 6, 1.0), (2, 9, 0.0), (3, 7, 1.0), (4, 8, 2.0), (5, 5, -1.0)])
def test_it_is_the_search_of_the_textbooks(n, length, power):
    llm, prompt = engine(max_batch_requests=8, max_batch_tokens=64), [5, 9, 2, 33, 7, 8, 1]
    assert_same(search(llm, prompt, n, length, power), plain_search(llm, prompt, n, length, power))


@pytest.mark.parametrize("seed, n, power", [(1, 3, 2.0), (4, 1, 1.0), (17, 2, 2.0), (23, 1, 2.0), (26, 3, 2.0),
                                            (29, 2, 1.0)])
def test_short_ones_end_neither_the_search_nor_their_parents(seed, n, power):
    """Models for which it makes a difference that a longer output may still win, and that a stop token which is the
    likeliest leaves its rivals in the race.
    """
    model = GPT(ModelConfig.from_dict({**CONFIG, "vocab_size": 5}), torch.float64, "cpu").randomize(seed, std=0.6)
    model.head *= 6
    llm = LLM(model, kv_memory=1 << 20, block_size=2)
    assert_same(search(llm, [0, 1, 2, 4], n, 7, power), plain_search(llm, [0, 1, 2, 4], n, 7, power))


@pytest.mark.parametrize("options", [
    {}, {"prefix_caching": False}, {"swap_memory": 1 << 16}, {"draft": "ngram"}, {"policy": "fair"}, {"policy": "mlfq"},
    {"prefix_caching": False, "policy": "shortest", "max_batch_tokens": 7}, {"kv_dtype": "int8"}], ids=str)
def test_a_pool_too_small_for_all_hypotheses_changes_nothing(options):
    """They take turns, wait for each other without blocks, and nothing is lost; others run beside them."""
    rng = random.Random(str(options))
    kv8 = {name: value for name, value in options.items() if name == "kv_dtype"}
    preemptions = 0
    for _ in range(6):
        work = []
        for _ in range(5):
            prompt = [rng.randrange(64) for _ in range(rng.choice((3, 8, 15)))]
            searched = rng.random() < 0.6
            work.append((prompt, SamplingParams(beam_search=searched, n=rng.randint(1, 4), max_tokens=rng.randint(2, 12),
                                                temperature=1 if searched else 0, seed=1, stop_token_ids=[STOP],
                                                repetition_penalty=rng.choice((1, 1.3)))))
        want = [engine(**kv8).generate([prompt], params) for prompt, params in work]
        llm = engine(9, **{"max_batch_tokens": 9, "max_batch_requests": 5, **options})
        requests = []
        for prompt, params in work:
            requests.append(llm.add_request(prompt, params))
            llm.step()
            llm.scheduler.check()
        while llm.has_work():
            llm.step()
            llm.scheduler.check()
        for request, outputs in zip(requests, want):
            assert [llm.output(sample).token_ids for sample in request.samples] == [out.token_ids for out in outputs]
        preemptions += llm.stats()["preemptions"]
        assert is_clean(llm)
    assert preemptions


def test_one_hypothesis_is_greedy_and_keeps_its_edits():
    options = dict(max_tokens=30, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.4, min_tokens=3,
                   logit_bias={7: 1.5})
    greedy, = engine().generate([[1, 2, 3]], SamplingParams(temperature=0, **options))
    llm = engine()
    searched, = llm.generate([[1, 2, 3]], SamplingParams(beam_search=True, **options))
    assert llm.stats()["output_tokens"] == 30
    assert searched.token_ids == greedy.token_ids and searched.cumulative_logprob < 0 and greedy.cumulative_logprob is None


def test_hypotheses_share_the_blocks_of_what_they_have_in_common():
    config = ModelConfig.from_dict({**CONFIG, "max_position_embeddings": 600})
    llm = engine(model=GPT(config, torch.float32, "cpu").randomize(1, std=0.5), block_size=16)
    prompt = [i * 7 % 64 for i in range(500)]
    request = llm.add_request(prompt, SamplingParams(beam_search=True, n=8, max_tokens=20, ignore_eos=True))
    while request.width > 1:
        llm.step()
    for _ in range(3):
        llm.step()
    assert len(request.samples) == 8 and llm.pool.stats()["blocks_used"] <= 1.3 * llm.pool.blocks_for(501)
    before = llm.stats()["computed_tokens"]
    llm.step()
    assert llm.stats()["computed_tokens"] - before == 8  # nothing twice
    llm.abort(request.samples[3])  # one of them alone means nothing
    assert request.is_over and is_clean(llm) and not llm.has_work()


def test_who_reads_along_does_not_spoil_the_texts():
    """From round to round a sample is another hypothesis, with another text."""
    params = SamplingParams(beam_search=True, n=4, max_tokens=10, ignore_eos=True)
    want = engine(tokenizer="byte_level").generate([[5, 6, 7]], params)
    llm = engine(tokenizer="byte_level")
    request = llm.add_request([5, 6, 7], params)
    while llm.has_work():
        for sample in llm.step():
            assert sample.status == FINISHED or llm.text(sample) == llm.tokenizer.decode(sample.tokens[3:])
    assert [llm.output(sample).text for sample in request.samples] == [output.text for output in want]


def test_a_tenant_pays_for_the_prompt_once():
    """However often its hypotheses are parked and queue again: like tokens, prompts are counted when first computed."""
    for blocks in (200, 9):
        llm = engine(blocks, policy=Fair(input_weight=3, output_weight=2))
        llm.add_request(list(range(8)), SamplingParams(beam_search=True, n=4, max_tokens=12, ignore_eos=True), tenant="x")
        while llm.has_work():
            llm.step()
        assert llm.scheduler.policy.counters == {"x": 3 * 8 + 2 * 4 * 12}
    assert llm.stats()["preemptions"]


def test_fewer_sequences_than_hypotheses():
    llm = LLM(tiny(4), kv_memory=1 << 20, max_batch_requests=16)
    outputs = llm.generate([[0, 1]], SamplingParams(beam_search=True, n=9, max_tokens=2, stop_token_ids=[STOP],
                                                    logit_bias={0: -math.inf, 1: -math.inf}))
    assert [out.token_ids for out in outputs if out.finish_reason != "abort"] == sorted(
        ([3], [2, 3], [2, 2]), key=lambda tokens: -next(o.cumulative_logprob / len(tokens) for o in outputs
                                                        if o.token_ids == tokens))
    rest = outputs[3:]
    assert len(rest) == 6 and all(not out.token_ids and out.cumulative_logprob == -math.inf for out in rest)
    assert is_clean(llm)


def test_a_hypothesis_that_fails_ends_the_search():
    def breaks(token_ids, logits):
        if len(token_ids) == 5:
            raise KeyError("hm")
        return logits

    llm = engine()
    request = llm.add_request([1, 2], SamplingParams(beam_search=True, n=3, max_tokens=9, ignore_eos=True,
                                                     logits_processor=breaks))
    other = llm.add_request([3, 4], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    while llm.has_work():
        llm.step()
        llm.scheduler.check()
    assert other.finish_reason == "length" and all("KeyError" in sample.error for sample in request.samples)
    assert llm.stats()["aborted"] == 3 and is_clean(llm)


def test_a_dead_end_leaves_the_others_alone():
    """As guided generation has them: after some tokens nothing is allowed any more. Equal to searching all that is left."""
    def no_way_on(token_ids, logits):
        return logits.new_full((4,), -math.inf) if token_ids[-1] == 2 and len(token_ids) > 3 else logits

    params = SamplingParams(beam_search=True, n=4, max_tokens=4, length_penalty=0.0, ignore_eos=True,
                            logits_processor=no_way_on)
    model = tiny(4)
    llm = LLM(model, kv_memory=1 << 20, max_batch_requests=16)
    outputs = llm.generate([[0, 1]], params)
    assert {out.finish_reason for out in outputs} == {"length"} and is_clean(llm)
    every = SamplingParams(beam_search=True, n=4**4, max_tokens=4, length_penalty=0.0, ignore_eos=True)
    roomy = LLM(model, kv_memory=8 << 20, block_size=2, max_batch_requests=300, max_batch_tokens=900)
    wide = roomy.generate([[0, 1]], replace(every, logits_processor=no_way_on))
    found = [out for out in wide if out.finish_reason == "length"]
    assert 0 < len(found) < 4**4 and all(2 not in out.token_ids[1:3] for out in found)
    assert {tuple(out.token_ids) for out in outputs} <= {tuple(out.token_ids) for out in found}


def two_ways(tokens, logits):
    """After the prompt, of four tokens, 2 or 3; nothing follows the 2."""
    allowed = [2, 3] if len(tokens) == 4 else [] if tokens[4] == 2 else [0, 1, 2, 3]
    return torch.where(torch.isin(torch.arange(4), torch.tensor(allowed)), logits, -math.inf)


def test_a_dead_end_waits_for_those_that_go_on():
    params = SamplingParams(beam_search=True, n=2, max_tokens=3, ignore_eos=True, logits_processor=two_ways)
    llm = LLM(tiny(4), kv_memory=1 << 20, max_batch_requests=2, max_batch_tokens=2, prefix_caching=False)
    request = llm.add_request([0, 1, 0, 1], params)
    while llm.has_work() and not request.num_output:
        llm.step()
    (other,) = (sample for sample in request.samples if sample.tokens[-1] == 3)
    llm.scheduler.preempt(other)  # two tokens a step: it is not ready when the other one is
    assert [out.finish_reason for out in finish(llm, request)] == ["length"] * 2
    assert all(sample.tokens[4] == 3 for sample in request.samples)


def test_what_has_ended_before_the_dead_ends_is_found():
    params = SamplingParams(beam_search=True, n=2, max_tokens=3, ignore_eos=True, stop_token_ids=[3],
                            logits_processor=two_ways)
    llm = LLM(tiny(4), kv_memory=1 << 20)
    outputs = llm.generate([[0, 1, 0, 1]], params)
    assert [(out.token_ids, out.finish_reason) for out in outputs] == [([3], "stop"), ([], "abort")] and is_clean(llm)


def test_a_search_of_nothing_but_dead_ends_says_so():
    llm = engine()
    params = SamplingParams(beam_search=True, n=3, max_tokens=9, ignore_eos=True, logits_processor=lambda tokens, logits:
                            logits if len(tokens) < 5 else logits.new_full(logits.shape, -math.inf))
    with pytest.raises(ValueError, match="every token is banned"):
        llm.generate([[1, 2]], params)
    assert llm.stats()["aborted"] == 3 and is_clean(llm)


def test_a_search_ends_when_nothing_better_can_come():
    """With logits that love the stop token, after as many rounds as there are outputs asked for, not after max_tokens."""
    llm = engine()
    llm.generate([[1, 2]], SamplingParams(beam_search=True, n=2, max_tokens=100, length_penalty=0.0, stop_token_ids=[STOP],
                                          logit_bias={STOP: 60}))
    assert llm.stats()["steps"] <= 3


@pytest.mark.parametrize("options, name", [
    ({"stop": "x"}, "stop"), ({"logprobs": 1}, "logprobs"), ({"top_k": 3}, "top_k"), ({"top_p": 0.5}, "top_p"),
    ({"min_p": 0.1}, "min_p"), ({"beam_search": 1}, "beam_search"), ({"length_penalty": 11}, "length_penalty"),
    ({"beam_search": False, "length_penalty": 2.0}, "length_penalty"), ({"temperature": 0.7}, "temperature")])
def test_what_does_not_go_with_it_is_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        SamplingParams(**{"beam_search": True, **options})


def test_it_is_no_stream():
    with pytest.raises(ValueError, match="^beam_search: cannot be streamed"):
        next(engine().stream([1], SamplingParams(beam_search=True)))
