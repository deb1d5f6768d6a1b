"""Steps that are planned and launched before the tokens of the one before were read.

That tokens are the same in any company is tested in test_combinations.py; here is what such a step costs, and what becomes
of a token in flight when something happens to its request.
"""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_engine import GREEDY, Slow, engine, finish, is_clean, poisoned, tokens_of, toy  # noqa: F401

import nanoserve
from nanoserve import GPT, LLM, InFlight, SamplingParams

torch.set_num_threads(1)
PROMPTS = [[1, 2, 3], list(range(20)), [4] * 9, [5]]
LONGER = replace(GREEDY, max_tokens=12)


def test_who_ends_at_a_length_is_never_computed_once_too_often():
    plain, ahead = engine(), engine(overlap=True)
    params = [SamplingParams(seed=i, max_tokens=n) for i, n in enumerate((1, 2, 9, 12))]
    assert tokens_of(ahead.generate(PROMPTS, params)) == tokens_of(plain.generate(PROMPTS, params))
    want, got = plain.stats(), ahead.stats()
    assert {k: v for k, v in got.items() if type(v) is int} == {k: v for k, v in want.items() if type(v) is int}


def test_a_token_comes_one_call_later_and_who_stops_costs_a_row():
    plain = Slow.generate([1, 2, 3], GREEDY)
    stops = replace(GREEDY, stop_token_ids=[plain[3]])
    llm = engine(overlap=True)
    request, seen = llm.add_request([1, 2, 3], stops), []
    while llm.has_work():
        seen.append((len(llm.step()), request.num_output))
    length = plain.index(plain[3]) + 1
    assert seen == [(0, 0)] + [(1, n) for n in range(1, length + 1)]
    assert request.tokens[3:] == plain[:length] and request.finish_reason == "stop"
    assert llm.stats()["computed_tokens"] == 3 + length  # one more than needed
    assert tokens_of(llm.generate([[1, 2, 3]], GREEDY)) == [plain]


@pytest.mark.parametrize("edits", [{}, {"presence_penalty": 0.5, "logit_bias": {3: 1.0}}], ids=["plain", "edited"])
@pytest.mark.parametrize("overlap", [True, False])
def test_everything_goes_to_the_device_in_one_copy(overlap, edits, monkeypatch):
    """And in two more, what changes single logits."""
    sent, send = [], LLM._send
    monkeypatch.setattr(LLM, "_send", lambda self, tensor: sent.append(tensor) or send(self, tensor))
    llm = engine(overlap=overlap)
    llm.generate(PROMPTS, [SamplingParams(seed=i, max_tokens=9, temperature=i / 2, **edits) for i in range(4)])
    assert len(sent) == llm.stats()["steps"] * (3 if edits else 1)


def test_who_needs_the_last_token_waits_for_it():
    """Then the step before is read first, for everybody, and the next one planned anew."""
    plain = [Slow.generate(prompt, LONGER) for prompt in PROMPTS]
    stops = replace(LONGER, stop_token_ids=[plain[0][4]])
    penalised = replace(LONGER, frequency_penalty=1.5)
    llm = engine(overlap=True)
    first, second = llm.add_request(PROMPTS[0], stops), llm.add_request(PROMPTS[1], LONGER)
    for _ in range(5):
        llm.step()
    third = llm.add_request(PROMPTS[2], penalised)
    assert llm.step() == [first, second] and not third.num_computed
    assert first.finish_reason == "stop" and first.tokens[3:] == plain[0][: plain[0].index(plain[0][4]) + 1]
    outputs = tokens_of(finish(llm, second, third))
    assert outputs == [plain[1], Slow.generate(PROMPTS[2], penalised)]


def test_what_is_in_flight_of_an_aborted_request_is_dropped():
    llm = engine(overlap=True)
    gone, stays = llm.add_request([1, 2, 3], GREEDY), llm.add_request([5], GREEDY)
    for _ in range(3):
        llm.step()
    had = gone.tokens.copy()
    llm.abort(gone)
    assert tokens_of(finish(llm, stays)) == [Slow.generate([5], GREEDY)]
    assert gone.tokens == had and (llm.stats()["aborted"], llm.stats()["finished"]) == (1, 1)


def test_a_token_that_makes_no_sense_ends_its_request_alone(poisoned):  # noqa: F811
    llm = engine(14, model=poisoned, max_batch_tokens=16, overlap=True)
    calm = tokens_of(engine(model=poisoned).generate(PROMPTS[:3], GREEDY))
    good = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[:3]]
    bad = llm.add_request([9, 9, 63, 9, 9, 9], GREEDY)
    assert tokens_of(finish(llm, *good)) == calm
    assert bad.finish_reason == "abort" and bad.num_output == 0 and "not finite" in bad.error


def test_who_made_way_before_its_token_made_no_sense_leaves_nothing_to_inherit(poisoned):  # noqa: F811
    llm = engine(2, model=poisoned, overlap=True)
    good = llm.add_request([1], replace(GREEDY, max_tokens=3))
    bad = llm.add_request([9, 9, 63, 9], replace(GREEDY, max_tokens=5))
    llm.step()
    assert llm.step() == [good, bad] and bad.num_preemptions == 1 and "not finite" in bad.error
    assert llm.pool.match([9, 9, 63, 9, 1]) == []


def test_the_input_of_a_step_comes_from_where_the_last_one_put_it():
    flight = InFlight([object(), object()], torch.tensor([7, -1]))  # the second one made no sense: any token will do
    assert flight.fill(torch.tensor([3, -1, 4, -2])).tolist() == [3, 7, 4, 0]


def test_targets_are_held_against_the_time_when_a_token_was_read():
    llm, now = engine(overlap=True), itertools.count()
    llm.scheduler.clock = lambda: next(now)
    llm.generate([[1, 2, 3]], replace(GREEDY, max_tokens=2))
    taken = next(now)
    request = llm.add_request([5], replace(GREEDY, max_tokens=2, ttft_target=1000.0))
    llm.step()
    assert request.last_token_time == request.arrival_time > taken
    llm.step()
    assert request.last_token_time > request.arrival_time and request.num_output == 1


def test_only_the_wait_for_tokens_counts_as_waiting(monkeypatch):
    """Drawing them is part of the launch: in "wait" the host has nothing else to do."""
    llm, now = engine(overlap=True), itertools.count()
    monkeypatch.setattr(nanoserve.time, "perf_counter", lambda: float(next(now)))  # a second from lap to lap
    draw = llm.draw
    monkeypatch.setattr(llm, "draw", lambda *args: ([next(now) for _ in range(10)], draw(*args))[1])
    llm.generate([[1, 2, 3]], replace(GREEDY, max_tokens=3))
    assert llm.watch.seconds == {"schedule": 3.0, "pack": 3.0, "launch": 3 * 12.0, "wait": 3.0, "commit": 3.0}


class Trouble(Exception):
    """What a launch fails with."""


def fails_at(number: int) -> GPT:
    """A model whose so-manieth launch fails."""
    model, launches = copy.copy(toy()), itertools.count(1)
    forward = model.forward

    def launch(batch, cache):
        if next(launches) == number:
            raise Trouble
        return forward(batch, cache)

    model.forward = launch
    return model


def test_who_ends_just_before_a_launch_fails_is_told():
    llm = engine(model=fails_at(3), overlap=True)
    ends = llm.add_request([1, 2, 3], replace(GREEDY, max_tokens=2))
    llm.step()
    llm.step()
    llm.add_request([5], replace(GREEDY, frequency_penalty=1.5))  # to plan this one, what is in flight has to be read
    told = set()
    with pytest.raises(Trouble):
        while True:
            told.update(llm.step())
    assert ends in told and ends.finish_reason == "length"


@pytest.fixture
def failing():
    """An engine of two blocks, whose second launch has failed. For it the second request had to make way, with a token in
    flight: it has filled its block, and the first one has the other.
    """
    llm = engine(2, model=fails_at(2), overlap=True, prefix_caching=False)
    first = llm.add_request([1], replace(GREEDY, max_tokens=3))
    second = llm.add_request([2] * 4, replace(GREEDY, max_tokens=5))
    llm.step()
    with pytest.raises(Trouble):
        llm.step()
    assert (first.status, second.status, second.num_pending, len(second.tokens)) == ("running", "waiting", 1, 4)
    return llm, first, second


def test_a_launch_that_failed_can_be_repeated_with_tokens_in_flight(failing):
    llm, first, second = failing
    assert tokens_of(finish(llm, first, second)) == [Slow.generate([1], GREEDY)[:3], Slow.generate([2] * 4, GREEDY)[:5]]


def test_who_waits_with_a_token_in_flight_may_come_back_in_pieces(failing):
    llm, first, second = failing
    llm.abort(first)
    llm.scheduler.max_batch_tokens = llm.scheduler.max_batch_requests = 2
    assert tokens_of(finish(llm, second)) == [Slow.generate([2] * 4, GREEDY)[:5]]


def test_a_step_that_is_given_up_takes_its_tokens_along(failing):
    llm, first, second = failing
    assert set(llm.drop_step("it failed")) == {first, second} and is_clean(llm)
    assert tokens_of(llm.generate([[2] * 4], replace(GREEDY, max_tokens=5))) == [Slow.generate([2] * 4, GREEDY)[:5]]


def test_overlap_and_drafts_exclude_each_other():
    with pytest.raises(ValueError, match="^overlap: a draft"):
        LLM(toy(), overlap=True, draft="ngram", kv_memory=1 << 20)
    assert not LLM(toy(), kv_memory=1 << 20).overlap  # a CPU has nothing to wait for


def test_what_may_overlap():
    plain = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, stop=["x"], stop_token_ids=[3], max_tokens=5)
    assert plain.can_overlap
    for more in ({"n": 2}, {"logprobs": 0}, {"prompt_logprobs": 0}, {"min_tokens": 1}, {"repetition_penalty": 1.1},
                 {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"logit_bias": {1: -math.inf}},
                 {"logits_processor": lambda tokens, logits: logits}):
        assert not replace(plain, **more).can_overlap, more
