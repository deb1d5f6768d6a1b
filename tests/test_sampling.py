"""From logits to a token: the exact distribution in float64, and whether `sample` draws from it.

What a request asks for (`SamplingParams`) is tested here too: every field, every way to get it wrong.
"""

import copy
import dataclasses
import math
import random
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import CONFIG, GREEDY, Slow, engine, finish, tokens_of

import kernels
import nanoserve
from nanoserve import GPT, ModelConfig, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorial"))
import cuda_on_cpu  # noqa: E402

INF, SAMPLE = math.inf, kernels.sample


def columns(settings):
    """[(temperature, top_k, top_p, min_p), ...] as the tensors that `sample` takes."""
    t, k, p, m = zip(*settings)
    return torch.tensor(t), torch.tensor(k), torch.tensor(p), torch.tensor(m)


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """One row's distribution, step by step over sorted float64."""
    x = logits.double() / temperature
    if top_k:
        x[x < x.sort(descending=True).values[min(top_k, len(x)) - 1]] = -INF
    if top_p < 1:
        probs = x.softmax(0).sort(descending=True).values
        reached = 0
        while float(probs[: reached + 1].sum()) < top_p and reached < len(x) - 1:
            reached += 1
        x[x.softmax(0) < probs[reached] * (1 - 1e-12)] = -INF
    probs = x.softmax(0)
    probs[probs < min_p * probs.max() * (1 - 1e-12)] = 0
    return probs / probs.sum()


def check(logits, settings):
    """All rows at once, and each on its own, against the reference."""
    probs = kernels.token_probabilities(logits, *columns(settings))
    assert probs.dtype == torch.float32
    for row, x, each in zip(probs, logits, settings):
        expected = reference(x, *each)
        assert torch.equal(row > 0, expected.float() > 0), each
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-7)
        alone = kernels.token_probabilities(x[None], *columns([each]))
        torch.testing.assert_close(alone[0], row, rtol=1e-5, atol=1e-8)


def noise(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the distribution ----

SETTINGS = [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (2.5, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 5, 1.0, 0.0),
            (1.0, 49, 1.0, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 1000, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 0.01, 0.0),
            (1.0, 0, 0.999, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (1.0, 0, 1.0, 1e-4), (0.5, 10, 0.8, 0.05),
            (3.0, 20, 0.5, 0.3), (2.0, 3, 0.99, 0.0), (0.1, 0, 0.5, 0.0), (5.0, 40, 0.95, 0.5)]


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_of_rows_with_different_settings(seed):
    check(normal(seed, len(SETTINGS), 50) * 3, SETTINGS[seed:] + SETTINGS[:seed])


def test_ties_are_kept():
    """Logits that take five values: top-k keeps all that equal the k-th, top-p all that equal the crossing one."""
    logits = torch.randint(0, 5, (len(SETTINGS), 50), generator=torch.Generator().manual_seed(0)).float()
    check(logits, SETTINGS)
    even = kernels.token_probabilities(torch.zeros(2, 8), *columns([(1.0, 3, 1.0, 0.0), (1.0, 0, 0.3, 0.0)]))
    assert torch.equal(even, torch.full((2, 8), 1 / 8))


def test_the_order_of_the_filters():
    """Cases that come out differently in any other order."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # top-k first: of 4/7, 3/7 the first alone reaches 0.5; top-p first would keep two
    assert kernels.token_probabilities(p.log()[None], *columns([(1.0, 2, 0.5, 0.0)]))[0].tolist() == [1, 0, 0, 0]
    # temperature first: squared, 16/30 alone reaches 0.5
    assert kernels.token_probabilities(p.log()[None], *columns([(0.5, 0, 0.5, 0.0)]))[0].tolist() == [1, 0, 0, 0]
    # min-p after temperature: at 2.0 the last has half of the first's share, at 1.0 a quarter
    row = kernels.token_probabilities(p.log()[None], *columns([(2.0, 0, 1.0, 0.45)]))[0]
    torch.testing.assert_close(row, p.sqrt() / p.sqrt().sum())


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    kept = [int((kernels.token_probabilities(logits, *columns([(1.0, 0, p, 0.0)])) > 0).sum())
            for p in (1e-6, 0.49, 0.51, 0.74, 0.76, 0.99)]
    assert kept == [1, 1, 2, 2, 4, 4]  # the last two are ties


@pytest.mark.parametrize("V", [300, 5000])
def test_top_p_that_reaches_far(V):
    """Flat distributions: the few hundred largest logits hold little of the mass, more have to be looked at."""
    flat = normal(1, 6, V) * 0.3
    check(flat, [(1.0, 0, 0.05, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 0.95, 0.0), (1.0, 0, 0.9999, 0.0),
                 (1.0, 260, 0.9, 0.0), (1.0, 0, 1.0, 0.5)])
    # A row that is decided at once, beside one that is not.
    flat[0] *= 30
    check(flat[:2], [(1.0, 0, 0.9, 0.0), (1.0, 0, 0.9, 0.0)])


def test_banned_tokens_stay_banned():
    logits = normal(2, len(SETTINGS), 50)
    logits[:, 5:] = -INF
    check(logits, SETTINGS)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38])
def test_tiny_temperatures_are_nearly_greedy(temperature):
    """Dividing by them must not overflow into NaN."""
    logits = normal(3, 4, 50) * 5
    settings = [(temperature, *rest) for rest in ((0, 1.0, 0.0), (9, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1))]
    tokens = kernels.sample(logits, *columns(settings), torch.full((4,), 0.3, dtype=torch.float64))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert kernels.token_probabilities(logits, *columns(settings)).isfinite().all()


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, 0.0]])
    probs = kernels.token_probabilities(logits, *columns([(1.0, 0, 1.0, 0.0)] * 2))
    assert probs.tolist() == [[1, 0, 0], [0.5, 0.5, 0]]


# ---- drawing from it ----


@pytest.fixture(params=["torch", "cpp", "cuda", pytest.param("gpu", marks=pytest.mark.gpu)])
def body(request, monkeypatch):
    """Draw with each of the bodies; the CUDA one runs on the CPU, with `-m gpu` also on a GPU."""
    monkeypatch.setattr(kernels, "use_cpp", request.param == "cpp")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
        monkeypatch.setattr(kernels, "sample", lambda *args: SAMPLE(*(arg.cuda() for arg in args)).cpu())
    elif request.param != "torch" and not cuda_on_cpu.compiler():
        pytest.skip("no C++ compiler here")
    with cuda_on_cpu.enabled() if request.param == "cuda" else nullcontext():
        yield request.param


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0, 0.0), (2.0, 8, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.5, 10, 0.9, 0.05)],
                         ids=str)
def test_frequencies(setting, body):
    """Thousands of draws with the engine's own noise against the exact distribution, by chi-square."""
    N, logits = 40_000 if body != "cuda" else 100, normal(4, 1, 20) * 1.5
    exact = reference(logits[0], *setting)
    u = torch.from_numpy(kernels.uniform_noise(np.full(N, 7, dtype=np.uint64), np.arange(N)))
    tokens = kernels.sample(logits.expand(N, -1), *columns([setting] * N), u)
    counts = torch.bincount(tokens, minlength=20).double()
    assert not counts[exact == 0].any()
    exact, counts = exact[exact > 0], counts[exact > 0]
    chi2, dof = float(((counts - N * exact) ** 2 / (N * exact)).sum()), len(exact) - 1
    assert chi2 < dof + 4 * math.sqrt(2 * dof) + 4  # beyond the 99.99th percentile


def test_tokens_of_probability_zero_are_never_drawn(body):
    """Not even at the very ends of the noise, at the first token or the last."""
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for V in (3, 50, 5000):
        for seed in range(20):
            logits = normal(seed, 1, V) * 3
            logits[:, : V // 3] = logits[:, -(V // 3):] = -INF
            tokens = kernels.sample(logits.expand(4, -1), *columns([(1.0, 0, 1.0, 0.0)] * 4), ends)
            assert V // 3 <= tokens.min() and tokens.max() < V - V // 3
    one = torch.full((4, 9), -INF)
    one[:, 8] = 0
    assert kernels.sample(one, *columns([(1.0, 0, 0.9, 0.0)] * 4), ends).tolist() == [8] * 4


def test_the_noise_is_where_the_token_lies(body):
    """The token at which the cumulative probability passes the noise; the boundary belongs to the next token."""
    logits = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(6, -1)
    u = torch.tensor([0.0, 0.2, 0.3, 0.49, 0.51, 0.999], dtype=torch.float64)
    assert kernels.sample(logits, *columns([(1.0, 0, 1.0, 0.0)] * 6), u).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_probability_that_rounds_to_zero_is_zero(body):
    """Also where the noise is: at the very start, before a token that nothing would ever draw."""
    logits = torch.tensor([[-500.0, 0.0, -500.0], [-95.0 * 1e3, 0.0, 0.0]])
    columns_ = columns([(1.0, 0, 1.0, 0.0), (1e-3, 3, 0.9, 0.0)])
    assert kernels.sample(logits, *columns_, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 1]


def test_temperature_zero_is_argmax_row_by_row(body):
    logits = normal(5, 60, 40)
    settings = [(0.0 if i % 3 else 3.0, i % 4, 0.9, 0.0) for i in range(60)]
    tokens = kernels.sample(logits, *columns(settings), noise(1, 60))
    greedy = torch.tensor([t == 0 for t, *_ in settings])
    assert torch.equal(tokens[greedy], logits.argmax(-1)[greedy])
    assert not torch.equal(tokens[~greedy], logits.argmax(-1)[~greedy])


def test_a_row_does_not_depend_on_its_neighbours(body):
    logits, u = normal(6, len(SETTINGS), 3000) * 2, noise(2, len(SETTINGS))
    together = kernels.sample(logits, *columns(SETTINGS), u)
    for i, setting in enumerate(SETTINGS):
        assert kernels.sample(logits[i : i + 1], *columns([setting]), u[i : i + 1]) == together[i]
    order = torch.randperm(len(SETTINGS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.sample(logits[order], *columns([SETTINGS[i] for i in order]), u[order]), together[order])


def test_the_first_of_equal_logits_is_the_greedy_one(body):
    logits = torch.tensor([[1.0, 7.0, 7.0, 3.0], [-INF, -INF, -5.0, -5.0]])
    assert kernels.sample(logits, *columns([(0.0, 0, 1.0, 0.0)] * 2), noise(1, 2)).tolist() == [1, 2]


@pytest.mark.parametrize("setting", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.1)], ids=str)
def test_logits_that_only_float64_can_hold(setting):
    """They are infinite in float32, which probabilities are computed in, and so make no sense; as bans they do."""
    largest = torch.finfo(torch.float64).max
    logits = torch.tensor([[0.0, 1.0, largest, 2.0], [-largest, -largest, 1.0, -largest]], dtype=torch.float64)
    assert kernels.sample(logits, *columns([setting] * 2), noise(1, 2)).tolist() == [-1, 2]


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("setting", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.1)], ids=str)
def test_a_row_without_sense_gets_no_token(setting, value, body):
    """One NaN or infinity is enough, and so are only bans; the rows around it are as ever."""
    logits, u = normal(7, 5, 90), noise(3, 5)
    expected = kernels.sample(logits, *columns([setting] * 5), u)
    logits[1, 40], logits[3] = (value, value) if value != -INF else (0, value)
    tokens = kernels.sample(logits, *columns([setting] * 5), u)
    assert tokens[3] == -1 and (tokens[1] == -1) == (value != -INF)
    assert torch.equal(tokens[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [7, 300, 5000])
def test_the_bodies_draw_the_same(V, dtype, body, monkeypatch):
    for seed in range(3):
        arguments = (normal(seed, len(SETTINGS), V).to(dtype) * 2, *columns(SETTINGS), noise(seed, len(SETTINGS)))
        drawn = kernels.sample(*arguments)
        with monkeypatch.context() as context:
            context.setattr(kernels, "use_cpp", False)
            context.setattr(kernels, "cuda_on_cpu", None)
            assert torch.equal(drawn, SAMPLE(*arguments))


def test_noise_is_uniform_and_uncorrelated():
    seeds, positions = np.meshgrid(np.arange(256, dtype=np.uint64), np.arange(256), indexing="ij")
    u = kernels.uniform_noise(seeds, positions)
    assert u.dtype == np.float64 and (0 <= u).all() and (u < 1).all() and len(np.unique(u)) == u.size
    for shift in ((0, 0), (2**63, 0), (0, 2**31)):  # far away as well as close to zero
        u = kernels.uniform_noise(seeds + np.uint64(shift[0]), positions + shift[1])
        bins = np.bincount((u * 64).astype(int).ravel(), minlength=64)
        assert ((bins - 1024) ** 2 / 1024).sum() < 63 + 5 * math.sqrt(126)
        for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, :-1], u[:-1, 1:]), (u[::2], u[1::2])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 256
    low = (u * 2**53).astype(np.uint64) & np.uint64(1)
    assert abs(low.mean() - 0.5) < 5 * 0.5 / 256


def test_noise_at_the_ends_of_its_range():
    """Every 64-bit seed, however far the position, without a warning about overflow."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u = kernels.uniform_noise(np.array([0, 2**64 - 1, 2**63, 0, 2**64 - 1], dtype=np.uint64),
                                  np.array([0, 0, 0, 2**31, 2**31]))
    assert len(set(u)) == 5 and (0 <= u).all() and (u < 1).all()


def test_seeds_of_any_sign_and_size():
    def say(seed):
        return engine().generate([[1, 2, 3]], SamplingParams(temperature=6.0, seed=seed, max_tokens=9))[0].token_ids

    assert len({tuple(say(seed)) for seed in (0, 1, -1, -(2**63), 2**63 - 1, 2**64 - 2)}) == 6
    assert say(-1) == say(2**64 - 1)  # the same 64 bits


# ---- penalties and biases ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("use_cpp", [True, False], ids=["cpp", "torch"])
def test_edit_logits(use_cpp, dtype, monkeypatch):
    """A bias, then the repetition penalty's factor, then what is subtracted, row by row, some without any; the logits stay.
    """
    monkeypatch.setattr(kernels, "use_cpp", use_cpp)
    logits = torch.tensor([[2, -2, 0, 1, 9], [1, 2, 3, 4, 9], [5, 6, 7, 8, 9], [math.nan, INF, 3, 4, 9]], dtype=dtype)
    for given in (logits, logits[:, :4], logits[:, :4].clone(), logits.t().contiguous().t()[:, :4]):
        before = given.clone()
        edits = [[0, 0, 2, 0], [1, 0, 2, -1], [2, 0, 2, 1], [3, -3, 2, 0.55], [3, -INF, 1, 0], [0, -INF, 1, 2],
                 [0, 1, 2, 3], [1, 1, 2, 3], [2, 1, 2, 3]]
        out = kernels.edit_logits(given, torch.tensor([0, 4, 4, 6, 9]), torch.tensor(edits, dtype=torch.float64))
        assert out.dtype == (dtype if dtype == torch.float64 else torch.float32) and out.is_contiguous()
        assert out[:3, :4].tolist() == [[1, -3, -1, pytest.approx(-4.55)], [1, 2, 3, 4], [-INF, 6, 7, -INF]]
        assert str(out[3, :4].tolist()) == "[nan, inf, -1.0, 4.0]" and (out[:, 4:] == 9).all()
        assert torch.equal(given.nan_to_num(), before.nan_to_num())


PENALTIES = [{"repetition_penalty": 1.8}, {"repetition_penalty": 0.6}, {"presence_penalty": 20.0},
             {"frequency_penalty": 8.0}, {"frequency_penalty": -8.0},
             {"presence_penalty": -9.0, "frequency_penalty": 4.0, "repetition_penalty": 1.4},
             {"logit_bias": {3: 5.5, 17: -INF, 40: -2}}, {"logit_bias": {3: 100.0}, "presence_penalty": 100.0},
             {"min_tokens": 6, "stop_token_ids": list(range(0, 64, 2)), "logit_bias": {4: 30.0}},
             {"min_tokens": 3, "stop_token_ids": list(range(20)), "frequency_penalty": 3.0}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_penalties_biases_and_minimum_lengths(dtype):
    """Through the engine, all in one batch, against the plain loop: repetition counts the prompt, the others do not."""
    prompt, base = [1, 2, 3, 1, 2, 3, 18], SamplingParams(temperature=0, max_tokens=16, logprobs=1)
    if dtype is torch.float64:
        params = [dataclasses.replace(base, **options) for options in PENALTIES]
        params += [dataclasses.replace(p, temperature=2.0, seed=8) for p in params]
        expected = [Slow.generate(prompt, p) for p in params]
        assert tokens_of(engine(max_batch_requests=20).generate([prompt] * len(params), params)) == expected
        plain = [Slow.generate(prompt, p) for p in (base, dataclasses.replace(base, temperature=2.0, seed=8))]
        assert all(tokens not in plain for tokens in expected)  # each option made a difference
        return
    # Other dtypes round in other ways, but forcing and forbidding are exact, and the model's own logits stay whole.
    model = GPT(ModelConfig.from_dict(CONFIG), dtype, "cpu").randomize(1, std=0.3)
    llm = engine(model=model)
    params = [dataclasses.replace(base, **options) for options in PENALTIES]
    forced, free = dataclasses.replace(base, logit_bias={7: 1000.0}), dataclasses.replace(base)
    outputs = llm.generate([prompt] * (len(params) + 2), [*params, forced, free])
    assert outputs[-2].token_ids == [7] * 16
    assert outputs[-1].token_ids == engine(model=model).generate([prompt], free)[0].token_ids
    assert max(map(outputs[7].token_ids.count, outputs[7].token_ids)) == 1
    for output in outputs:  # log-probabilities are the model's, before all that
        assert all(value <= 1e-6 for row in output.logprobs for value in row.values())


def test_penalties_come_after_biases():
    """The documented order: a bias that makes a logit positive is divided with it, not added to the quotient."""
    p = dataclasses.replace(GREEDY, logit_bias=dict.fromkeys(range(1, 8), 60.0), repetition_penalty=5.0)
    prompt = [1, 2, 3, 4]
    assert tokens_of(engine().generate([prompt], p)) == [Slow.generate(prompt, p)]


def test_forcing_and_forbidding_tokens():
    llm = engine()
    for temperature in (0, 5.0):
        p = SamplingParams(temperature=temperature, seed=1, max_tokens=30)
        [forced] = llm.generate([[1, 2]], dataclasses.replace(p, logit_bias={9: 1000.0}))
        assert forced.token_ids == [9] * 30
        banned = dict.fromkeys(range(2, 64), -INF)
        [rest] = llm.generate([[1, 2]], dataclasses.replace(p, logit_bias=banned))
        assert set(rest.token_ids) <= {0, 1}
    assert set(rest.token_ids) == {0, 1}


def test_edits_of_one_request_leave_the_others_alone():
    llm, bias = engine(), dict.fromkeys(range(0, 64, 3), 50.0)
    wild = dataclasses.replace(GREEDY, logit_bias=bias, repetition_penalty=9.0)
    requests = [llm.add_request([1, 2, 3], p) for p in (GREEDY, wild, GREEDY)]
    outputs = finish(llm, *requests)
    assert tokens_of(outputs)[::2] == [Slow.generate([1, 2, 3], GREEDY)] * 2 != tokens_of(outputs)[1:2] * 2


# ---- the one hook ----


def changes_from_scratch(p, prompt, output, stop_ids):
    """{token: (bias, divide, subtract)}, counted anew."""
    changes = {token: [bias, 1, 0] for token, bias in (p.logit_bias or {}).items()}
    for token in set(prompt + output) if p.repetition_penalty != 1 else ():
        changes.setdefault(token, [0, 1, 0])[1] = p.repetition_penalty
    for token in set(output) if p.presence_penalty or p.frequency_penalty else ():
        changes.setdefault(token, [0, 1, 0])[2] = p.presence_penalty + p.frequency_penalty * output.count(token)
    if len(output) < p.min_tokens:
        changes.update(dict.fromkeys(stop_ids, [-INF, 1, 0]))
    return {token: tuple(change) for token, change in changes.items() if change != [0, 1, 0]}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_edits_keep_up_with_the_tokens(options, seed):
    """Token by token or many at once, with drafts that come to nothing in between: always as if counted anew."""
    rng = random.Random(seed)
    p, prompt, output = SamplingParams(max_tokens=200, **options), [rng.randrange(300) for _ in range(50)], []
    edits = nanoserve.Edits(p, len(prompt), frozenset(p.stop_token_ids))
    for _ in range(40):
        drafts = [rng.randrange(300) for _ in range(rng.choice((0, 0, 1, 4)))]
        rows = np.array(edits.after(prompt + output, drafts)).reshape(-1, 4).tolist()
        assert len({token for token, *_ in rows}) == len(rows)  # none is named twice
        got = {token: tuple(change) for token, *change in rows if change != [0, 1, 0]}
        expected = changes_from_scratch(p, prompt, output + drafts, p.stop_token_ids)
        assert got.keys() == expected.keys() and all(got[t] == pytest.approx(expected[t]) for t in got)
        output += [rng.randrange(300) for _ in range(rng.choice((1, 1, 5)))]


def test_a_users_function_sees_all_tokens_and_decides():
    """Called once a token with prompt and output, after the built-in processors; a ban by it is a ban by logit_bias."""
    seen = []

    def only_odd(tokens, logits):
        seen.append(tokens)
        assert logits.shape == (64,) and logits[9] < -1e30  # banned already
        logits[::2] = -INF  # it may write into what it is given
        return logits

    for temperature in (0, 3.0):
        p = SamplingParams(temperature=temperature, seed=4, max_tokens=12, ignore_eos=True, logit_bias={9: -1e38})
        seen.clear()
        [output] = engine().generate([[1, 2, 3]], dataclasses.replace(p, logits_processor=only_odd))
        assert seen == [[1, 2, 3, *output.token_ids[:i]] for i in range(12)]
        bias = {9: -1e38, **dict.fromkeys(range(0, 64, 2), -INF)}
        [same] = engine().generate([[1, 2, 3]], dataclasses.replace(p, logit_bias=bias))
        assert output.token_ids == same.token_ids and not any(token % 2 == 0 or token == 9 for token in output.token_ids)


@pytest.mark.parametrize("wrong, message", [
    (lambda tokens, logits: 1 / 0, "ZeroDivisionError"), (lambda tokens, logits: None, "returned None"),
    (lambda tokens, logits: logits[:5], "returned .*5"), (lambda tokens, logits: logits * math.nan, "not finite numbers"),
    (lambda tokens, logits: logits - INF, "every token is banned")], ids=range(5))
def test_a_users_function_that_fails_fails_alone(wrong, message):
    llm = engine()
    good = llm.add_request([1, 2, 3], GREEDY)
    bad = llm.add_request([4, 5], dataclasses.replace(GREEDY, logits_processor=wrong))
    while llm.has_work():
        llm.step()
    assert bad.finish_reason == "abort" and re.search(message, bad.error) and bad.num_output == 0
    assert good.tokens[3:] == Slow.generate([1, 2, 3], GREEDY) and good.error is None
    with pytest.raises(ValueError, match="^logits_processor: must be a function, got 3"):
        SamplingParams(logits_processor=3)


def test_a_failure_after_a_wrong_draft_is_not_the_cause_of_another():
    """The draft is taken back, and with it what went wrong after it."""
    def fails_after_5(tokens, logits):
        if tokens[-1] == 5:
            raise KeyError("only after a wrong draft")
        logits[:] = -INF
        if len(tokens) < 6:
            logits[7] = 0.0
        return logits

    p = SamplingParams(max_tokens=20, ignore_eos=True, logits_processor=fails_after_5)
    llm = engine(draft=lambda tokens: [5, 5])
    request = llm.add_request([1, 2, 3], p)
    while llm.has_work():
        llm.step()
    assert llm.stats()["drafted"] > 0 and request.tokens == [1, 2, 3, 7, 7, 7]
    assert "every token is banned" in request.error


def test_a_users_function_with_samples_and_drafts():
    """Its samples differ only by their tokens; and drafts change nothing, as ever."""
    def no_repeats(tokens, logits):
        logits[tokens[-3:]] = -INF
        return logits

    p = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=20, ignore_eos=True, logits_processor=no_repeats)
    plain = tokens_of(engine().generate([[1, 2, 3]], p))
    assert len(set(map(tuple, plain))) == 3
    assert all(token not in tokens[max(0, i - 3) : i] for tokens in plain for i, token in enumerate(tokens))
    llm = engine(draft="ngram")
    assert tokens_of(llm.generate([[1, 2, 3]], p)) == plain
    always = engine(draft=lambda tokens: [tokens[-1]] * 4)
    assert tokens_of(always.generate([[1, 2, 3]], p)) == plain and always.stats()["drafted"] > 0


# ---- what may be asked for ----

NUMBERS = {"temperature": (0, 1e6), "top_k": (0, 2**31), "top_p": (0, 1), "min_p": (0, 1),
           "repetition_penalty": (1e-3, 1e3), "presence_penalty": (-100, 100), "frequency_penalty": (-100, 100),
           "seed": (-(2**63), 2**64 - 1), "n": (1, 4096), "max_tokens": (1, 2**31),
           "min_tokens": (0, 2**31), "logprobs": (0, 1000), "prompt_logprobs": (0, 1000)}
INTEGERS = {"top_k", "seed", "n", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_by_name(name):
    low, high = NUMBERS[name]
    wrong = [low - 1, high + 1, "1", [1], True, math.nan, INF, -INF, 1j]
    wrong += [0.5 + low] if name in INTEGERS else []
    wrong += [] if name in ("seed", "max_tokens", "logprobs", "prompt_logprobs") else [None]
    for value in wrong:
        with pytest.raises(ValueError) as error:
            SamplingParams(**{name: value})
        message = str(error.value)
        assert message.startswith(f"{name}: ") and repr(value) in message
        assert f"{low:g}" in message and f"{high:g}" in message
    for value in (low, high):
        if (name, value) not in (("top_p", 0), ("min_tokens", 2**31)):
            assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("options, message", [
    ({"top_p": 0}, "top_p: .*0"), ({"stop": ""}, "stop: "), ({"stop": ["x", ""]}, "stop: "),
    ({"stop": ["x", 3]}, "stop: .*3"), ({"stop": 5}, "stop: .*5"), ({"stop_token_ids": [-1]}, "stop_token_ids: .*-1"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"), ({"stop_token_ids": 5}, "stop_token_ids: .*5"),
    ({"stop_token_ids": [1.5]}, "stop_token_ids: .*1.5"), ({"ignore_eos": 1}, "ignore_eos: .*1"),
    ({"ignore_eos": "no"}, "ignore_eos: .*no"), ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"1": 2.0}}, "logit_bias"), ({"logit_bias": {1: "2"}}, "logit_bias"),
    ({"logit_bias": {1: math.nan}}, "logit_bias: .*nan"), ({"logit_bias": {1: INF}}, "logit_bias: .*inf"),
    ({"logit_bias": {1: 1e39}}, "logit_bias: .*1e[+]39"),  # infinite in float32
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: 5 .*max_tokens=4")], ids=str)
def test_other_impossible_values_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**options)


def test_unknown_options_are_refused_by_name():
    with pytest.raises(ValueError, match="tempurature.*temperature"):
        SamplingParams(tempurature=1)
    with pytest.raises(ValueError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(ValueError, match="topk"):
        dataclasses.replace(SamplingParams(), topk=2)


def test_params_can_be_copied_and_compared():
    p = SamplingParams(temperature=0.5, stop="x", stop_token_ids=[1], logit_bias={1: 2.0})
    assert copy.deepcopy(p) == p == dataclasses.replace(p) and p.stop == ("x",) and p.stop_token_ids == (1,)
    assert SamplingParams() == SamplingParams(stop=None, stop_token_ids=None)
