"""Every operation of kernels.py, in every body that it has, against plain float64 formulas.

The bodies: PyTorch, the definition; C++ for the CPU; CUDA C++ run on the CPU (tutorial/cuda_on_cpu.py), its threads in
order and in reverse; and with `-m gpu`, the same CUDA C++ on a GPU. Memory nobody wrote holds NaN here (fresh tensors as
well as the cache's unwritten slots), so whatever reads or returns it shows. Where there is no C++ compiler the tests that
need one are skipped, visibly.
"""

import contextlib
import itertools
import os
import platform
import random
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorial"))
import cuda_on_cpu  # noqa: E402

torch.set_num_threads(1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or `poison` makes every matrix product on a GPU an error
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Largest error against float64 on the same inputs: rounding of the sums, and of the result (bf16 has 8 bits, fp16 11).
TOLERANCE = {dtype: {"rtol": error, "atol": error}
             for dtype, error in ((F64, 1e-11), (F32, 1e-5), (BF16, 1e-2), (F16, 2e-3))}
BODIES = [("torch", F64), ("torch", F32), ("torch", BF16), ("cpp", F32), ("cpp", BF16),
          ("cuda", F32), ("cuda", BF16), ("cuda", F16), ("cuda-reversed", F32), ("cuda-reversed", BF16),
          *(pytest.param(("gpu", dtype), marks=pytest.mark.gpu) for dtype in (F32, BF16, F16))]
every_body = pytest.mark.parametrize("body", BODIES, ids=lambda b: f"{b[0]}-{str(b[1])[6:]}", indirect=True)
OPERATIONS = ("add_norm", "silu_mul", "rope_and_write_kv", "paged_attention", "sample", "linear")


@pytest.fixture
def body(request, monkeypatch):
    """Run with one of the bodies; the value is the dtype."""
    which, dtype = request.param
    monkeypatch.setattr(kernels, "use_cpp", which == "cpp")
    if which == "cpp" and kernels.cpp_library(dtype) is None or which.startswith("cuda") and not cuda_on_cpu.compiler():
        pytest.skip("no C++ compiler here")
    if which == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
        for name in OPERATIONS:
            monkeypatch.setattr(kernels, name, on_gpu(getattr(kernels, name)))
    if which.startswith("cuda"):
        with cuda_on_cpu.enabled(reverse=which.endswith("reversed")):
            yield dtype
    else:
        yield dtype


def on_gpu(operation):
    """The operation on copies of its arguments on the GPU; what it returns, and what it did to its arguments, comes back."""
    def move(arg):
        if isinstance(arg, kernels.LowBitWeight):
            return kernels.LowBitWeight(arg.codes.cuda(), arg.scales.cuda())
        return arg.cuda() if isinstance(arg, torch.Tensor) else arg

    def run(*args, **options):
        moved = [move(arg) for arg in args]
        result = operation(*moved, **options)
        for arg, there in zip(args, moved):
            if isinstance(arg, torch.Tensor):
                arg.copy_(there)
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()
    return run


@pytest.fixture(autouse=True)
def poison():
    """torch.empty and its like return NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(seed, *shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(actual, expected, **more):
    """`actual`, in its own dtype, is what float64 says."""
    assert not actual.isnan().any()
    torch.testing.assert_close(actual.double(), expected, **{**TOLERANCE[actual.dtype], **more})


# ---- attention ----


class Ragged:
    """A random ragged batch over a shuffled paged cache whose unwritten slots are NaN; int8: whose scales there are."""

    def __init__(self, seed, dtype, lengths, news, heads, kv_heads, D, block_size, window=0, int8=False, v_size=1.0):
        rng = random.Random(seed)
        self.lengths, self.news, self.window, self.scale = lengths, news, window, D**-0.5
        needed = [-(-n // block_size) for n in lengths]
        order = rng.sample(range(1, sum(needed) + 3), sum(needed))
        tables = torch.zeros(len(lengths), max(needed) + 2, dtype=torch.int32)  # padding points at scratch, all NaN
        self.k, self.v = (torch.full((sum(needed) + 3, block_size, kv_heads, D), torch.nan, dtype=dtype) for _ in "kv")
        self.scales = None
        if int8:
            self.k, self.v = (torch.full(self.k.shape, 99, dtype=torch.int8) for _ in "kv")
            self.scales = tuple(torch.full((len(self.k), kv_heads, block_size), torch.nan, dtype=BF16) for _ in "kv")
        self.keys, self.values = [], []
        for b, (length, n) in enumerate(zip(lengths, needed)):
            tables[b, :n] = torch.tensor([order.pop() for _ in range(n)])
            slots = [tables[b, i // block_size] * block_size + i % block_size for i in range(length)]
            for cache, kept in ((self.k, self.keys), (self.v, self.values)):
                x = randn(seed * 1000 + 2 * b + (cache is self.v), length, kv_heads, D) * (v_size if cache is self.v else 1)
                if int8:  # what the codes stand for is what attention has to see, exactly
                    step = (x.abs().amax(-1) / 127).to(BF16)
                    x = (x / step[..., None]).round()
                    at, offset = torch.stack(slots).long() // block_size, torch.stack(slots).long() % block_size
                    self.scales[cache is self.v][at, :, offset] = step
                cache.view(-1, kv_heads, D)[torch.stack(slots).long()] = x.to(cache.dtype)
                kept.append(x * step.double()[..., None] if int8 else x.to(dtype).double())
        # q as a view of a wider tensor, as `rope_and_write_kv` returns it
        self.q = randn(seed + 7, sum(news), heads + 2 * kv_heads, D, dtype=dtype)[:, :heads] * 2
        self.q = torch.cat([self.q, self.q[:, :1] * torch.nan], dim=1)[:, :heads]
        self.tables, self.context_lens = tables, torch.tensor(lengths, dtype=torch.int32)
        self.query_start = torch.tensor([sum(news[:b]) for b in range(len(news) + 1)], dtype=torch.int32)

    def run(self):
        return kernels.paged_attention(self.q, self.k, self.v, self.tables, self.context_lens, self.query_start,
                                       self.scale, self.window, self.scales)

    def expected(self):
        """One query and one head at a time, in float64."""
        rows = []
        for b, (length, new) in enumerate(zip(self.lengths, self.news)):
            for i in range(new):
                p, q = length - new + i, self.q[self.query_start[b] + i].double()
                seen = slice(max(0, p - self.window + 1) if self.window else 0, p + 1)
                k, v = self.keys[b][seen], self.values[b][seen]
                group = q.shape[0] // k.shape[1]
                rows.append(torch.stack([(k[:, h // group] @ q[h] * self.scale).softmax(0) @ v[:, h // group]
                                         for h in range(q.shape[0])]))
        return torch.stack(rows)


@every_body
@pytest.mark.parametrize("case", range(24))
def test_attention_of_ragged_batches(body, case):
    """All head sizes, group sizes, block sizes and windows, in combinations that `case` cycles through."""
    rng = random.Random(case)
    D, group = (16, 24, 32, 64, 80, 96, 128, 256)[case % 8], (1, 2, 4, 7, 8)[case % 5]
    block_size, window = (1, 4, 16, 32)[case // 2 % 4], (0, 1, 5, 40)[case // 3 % 4]
    lengths = [1, block_size, 3 * block_size, rng.randint(2, 30), rng.randint(40, 90)]
    rng.shuffle(lengths)
    news = [rng.choice((1, n, rng.randint(1, n))) for n in lengths]
    batch = Ragged(case, body, lengths, news, group * (1 + case % 2), 1 + case % 2, D, block_size, window)
    close(batch.run(), batch.expected())


@every_body
@pytest.mark.parametrize("case", range(9))
def test_attention_over_an_int8_cache(body, case):
    """Mixed batches like those above, over other numbers of tokens; what is compared with is the codes' own float64."""
    rng = random.Random(100 + case)
    sizes = (64, 80, 24, 96, 128, 256, 16) if body is BF16 else (64, 80, 24)  # each is a kernel of its own to compile
    D, group = sizes[case % len(sizes)], (1, 2, 3, 4, 8)[case % 5]
    block_size, window = (1, 4, 16, 32)[case // 2 % 4], (0, 0, 5, 40)[case // 3 % 4]
    lengths = [1, block_size, rng.randint(2, 30), rng.randint(33, 90)]
    rng.shuffle(lengths)
    news = [rng.choice((1, n, rng.randint(1, n))) for n in lengths]
    batch = Ragged(case, body, lengths, news, group * (1 + case % 3), 1 + case % 3, D, block_size, window, int8=True)
    close(batch.run(), batch.expected())


@every_body
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (8, 1), (3, 3)])
def test_decoding_over_an_int8_cache(body, heads, kv_heads, window):
    batch = Ragged(heads, body, [1, 17, 64, 101], [1] * 4, heads, kv_heads, 64, 16, window, int8=True)
    close(batch.run(), batch.expected())


@every_body
@pytest.mark.parametrize("size", [2.0**-10, 2.0**14])
def test_small_and_large_values_keep_their_bits_in_an_int8_cache(body, size):
    """In float16 a probability times a value's scale could underflow where the value itself would not."""
    batch = Ragged(11, body, [90, 75], [1, 75], 4, 2, 64, 16, int8=True, v_size=size)
    close(batch.run() / size, batch.expected() / size)


@every_body
def test_a_nan_in_an_int8_cache_shows_and_stays_with_its_request(body):
    """A NaN has no code: it is in the scale. In a key's as in a value's."""
    for which in (0, 1):
        batch = Ragged(3, body, [9, 40, 21], [1, 12, 1], 4, 2, 64, 4, int8=True)
        batch.scales[which][batch.tables[1, 0]] = torch.nan
        out, expected, (a, b) = batch.run(), batch.expected(), batch.query_start[1:3]
        assert out[a:b].isnan().all()
        close(out[:a], expected[:a])
        close(out[b:], expected[b:])


@every_body
def test_attention_over_many_tiles_of_one_long_prompt(body):
    batch = Ragged(1, body, [150, 131], [150, 1], 4, 1, 32, 16)
    close(batch.run(), batch.expected())


TILED = [("cuda", BF16), ("cuda-reversed", BF16), ("cuda", F16),
         *(pytest.param(("gpu", dtype), marks=pytest.mark.gpu) for dtype in (BF16, F16))]
tiled_bodies = pytest.mark.parametrize("body", TILED, ids=lambda b: f"{b[0]}-{str(b[1])[6:]}", indirect=True)


@tiled_bodies
@pytest.mark.parametrize("D, heads, kv_heads, block_size, window", [
    (64, 8, 2, 16, 0), (64, 3, 1, 1, 90), (80, 7, 1, 4, 0), (96, 4, 1, 32, 5), (128, 4, 1, 16, 0), (128, 2, 2, 16, 150),
    (256, 5, 1, 16, 0), (112, 40, 2, 16, 70)])
def test_attention_of_long_queries(body, D, heads, kv_heads, block_size, window, monkeypatch):
    """Requests with few queries, with as many as a tile holds, one more, and many, with a context before them or not."""
    monkeypatch.setattr(kernels, "use_flash", False)
    if body is F16 and D != 64:  # each is a kernel of its own to compile
        pytest.skip("fp16 with head sizes of 64 only")
    few = (128 if D <= 128 else 64) * kv_heads // heads
    news = [1, few + 1, few, few + 66, min(3, few), few + 40]
    lengths = [65, few + 1, few + 40, few + 266, 3, few + 102]  # the last one's 62: of 64 keys one is not visible
    close((batch := Ragged(D, body, lengths, news, heads, kv_heads, D, block_size, window)).run(), batch.expected())


def varlen(q, k, v, query_start, key_start, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's FlashAttention computes, which only runs on a GPU: causal, aligned at the end of keys and queries."""
    out, (left, right) = torch.empty_like(q), window_size
    assert right == 0 and enable_gqa
    for (a, b), (c, d) in zip(*(zip(start.tolist(), start[1:].tolist()) for start in (query_start, key_start))):
        assert b - a <= max_q and d - c <= max_k
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        out[a:b] = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])), attn_mask=seen,
                                                  scale=scale, enable_gqa=True).transpose(0, 1)
    return out


@pytest.mark.parametrize("window, block_size", [(0, 16), (1, 4), (30, 16)])
def test_what_torchs_flash_attention_is_given(window, block_size, monkeypatch):
    """Keys gathered from scattered blocks, more of them than queries where a part of the prompt was cached."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    batch = Ragged(1, F32, [70, 1, 64, 90], [70, 1, 20, 90], 4, 2, 64, block_size, window)
    out = kernels._flash_attention(batch.q, batch.k, batch.v, batch.tables, batch.context_lens, batch.query_start,
                                   batch.scale, window)
    close(out, batch.expected())


def test_torchs_flash_attention_takes_what_it_is_given():
    """All the arguments that this version has; there just is none for a CPU."""
    batch = Ragged(1, BF16, [70, 90], [70, 90], 4, 2, 64, 16, 5)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward.*CPU"):
        kernels._flash_attention(batch.q, batch.k, batch.v, batch.tables, batch.context_lens, batch.query_start,
                                 batch.scale, batch.window)


def test_which_batches_torchs_flash_attention_takes():
    """Prompts, whole or nearly so; no decoding beside them, no chunk of a far longer context, no float32."""
    for shape, takes in (((8192, 2, 256, 16), True), ((8192, 2, 257, 16), True), ((2100, 53, 128, 16), False),
                         ((8192, 1, 2048, 16), True), ((8192, 1, 2049, 16), False),
                         ((64, 1, 4, 16), True), ((63, 1, 4, 16), False)):
        assert kernels.is_for_flash(*shape, 128, 2) == takes and not kernels.is_for_flash(*shape, 128, 4)
        assert not kernels.is_for_flash(*shape, 512, 2) and not kernels.is_for_flash(*shape, 100, 2)


def test_where_torchs_flash_attention_fails_another_kernel_runs(monkeypatch):
    monkeypatch.setattr(kernels, "use_flash", True)
    with kernels._without_flash_if_it_fails():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert kernels.use_flash, "the next batch may fit"
    with pytest.warns(UserWarning, match="does not run here.*no kernel image"), kernels._without_flash_if_it_fails():
        raise RuntimeError("no kernel image is available")
    assert not kernels.use_flash


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("D, heads, kv_heads, window", [(64, 8, 2, 0), (128, 4, 1, 100), (256, 2, 2, 0)])
def test_torchs_flash_attention_on_a_gpu(dtype, D, heads, kv_heads, window, monkeypatch):
    """It is what runs, and gives what this project's own kernel gives."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    batch = Ragged(1, dtype, [300, 200, 170], [300, 200, 100], heads, kv_heads, D, 16, window)
    expected = batch.expected()
    for name in ("q", "k", "v", "tables", "context_lens", "query_start"):
        setattr(batch, name, getattr(batch, name).cuda())
    with monkeypatch.context() as context:
        context.setattr(kernels, "_paged_attention_cuda", None)
        context.setattr(kernels, "use_flash", True)
        close(batch.run().cpu(), expected)
    monkeypatch.setattr(kernels, "use_flash", False)
    close(batch.run().cpu(), expected)


@every_body
def test_attention_survives_large_scores(body):
    """Scores in the hundreds: without subtracting the maximum exp overflows."""
    batch = Ragged(2, body, [70, 33], [3, 33], 2, 2, 32, 16)
    batch.scale = 40.0
    if body is BF16:  # scores of that size have no bits left for a comparison
        assert batch.run().isfinite().all()
    else:
        close(batch.run(), batch.expected(), rtol=2e-3, atol=2e-3)


@every_body
@pytest.mark.parametrize("heads", [4, 24], ids=["", "tiles"])  # with 12 heads a kv head, 12 queries fill more than a tile
def test_a_nan_request_does_not_touch_its_neighbours(body, heads):
    batch = Ragged(3, body, [9, 40, 21, 5], [1, 12, 1, 5], heads, 2, 32, 4)
    expected, start = batch.expected(), batch.query_start
    batch.k.view(-1, 2, 32)[batch.tables[1, 0] * 4] = torch.nan
    batch.q[start[3]:] = torch.nan
    out = batch.run()
    assert out[start[1] : start[2]].isnan().all() and out[start[3] :].isnan().all()
    for b in (0, 2):
        close(out[start[b] : start[b + 1]], expected[start[b] : start[b + 1]])


# ---- norms, activations, positions ----


@every_body
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 33), (70, 512)], ids=str)
def test_add_norm(body, shape, bias, delta):
    x, d = randn(1, *shape, dtype=body) * 3 + 1, randn(2, *shape, dtype=body) if delta else None
    weight, b = randn(3, shape[1], dtype=body), randn(4, shape[1], dtype=body) if bias else None
    before = x.clone()
    out, total = kernels.add_norm(x, d, weight, b, 1e-3)
    assert torch.equal(total, x + d if delta else x) and torch.equal(x, before)
    wide = total.double()
    expected = (F.layer_norm(wide, shape[1:], weight.double(), b.double(), 1e-3) if bias else
                F.rms_norm(wide, shape[1:], weight.double(), 1e-3))
    close(out, expected)


@every_body
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (70, 512)], ids=str)
def test_silu_mul(body, shape):
    gates, values = randn(1, *shape, dtype=body) * 4, randn(2, *shape, dtype=body)
    gates[0, 0] = -300.0  # exp overflows, the result is just 0
    out = kernels.silu_mul(torch.cat([gates, values], dim=1))
    # F.silu rounds to bf16 before the product, the C++ body after it: within one bit of each other
    close(out, gates.double() / (1 + (-gates.double()).exp()) * values.double(),
          **({"rtol": 2e-2} if body is BF16 else {}))


@every_body
@pytest.mark.parametrize("norm", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("D", [16, 24, 128])
def test_rope_and_write_kv(body, D, rotary, norm):
    """q, k and v end up where they belong, and nothing else in the cache changes."""
    T, heads, kv_heads, block_size = 37, 6, 2, 4
    qkv = randn(1, T, (heads + 2 * kv_heads) * D, dtype=body)
    q, k, v = qkv.clone().double().view(T, -1, D).split([heads, kv_heads, kv_heads], dim=1)
    positions = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:T]
    slots = torch.randperm(20 * block_size, generator=torch.Generator().manual_seed(2))[:T]
    q_norm, k_norm = (randn(3, D, dtype=body), randn(4, D, dtype=body)) if norm else (None, None)
    table = kernels.rope_table({"rope_theta": 100.0}, D, 50, "cpu") if rotary else None
    caches = [torch.full((20, block_size, kv_heads, D), torch.nan, dtype=body) for _ in "kv"]
    q_out = kernels.rope_and_write_kv(qkv, heads, positions, slots, table, q_norm, k_norm, 1e-6, *caches)

    if norm:
        q, k = (F.rms_norm(x, (D,), w.double(), 1e-6) for x, w in ((q, q_norm), (k, k_norm)))
    if rotary:
        # As complex numbers: dimension d is the real part, d + D/2 the imaginary one.
        angles = positions[:, None].double() * 100.0 ** (-torch.arange(0, D, 2).double() / D)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (torch.view_as_real(torch.complex(*x.contiguous().chunk(2, dim=-1)) * turn).movedim(-1, -2).flatten(-2)
                for x in (q, k))
    loose = {"atol": 5e-5 if body is not BF16 else 3e-2}  # the table's angles are float32
    close(q_out, q, **loose)
    for cache, expected in zip(caches, (k, v)):
        flat = cache.view(-1, kv_heads, D)
        close(flat[slots], expected, **loose)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots] = False
        assert flat[others].isnan().all()


@pytest.mark.parametrize("case", range(6))
def test_attention_of_float32_over_a_bfloat16_cache(case, monkeypatch):
    """In C++, and as it is defined: what is compared with sees the rounded keys and values."""
    rng = random.Random(200 + case)
    lengths = [1, rng.randint(2, 30), rng.randint(33, 90)]
    news = [rng.choice((1, n, rng.randint(1, n))) for n in lengths]
    group = (1, 2, 8)[case % 3]
    batch = Ragged(case, F32, lengths, news, 2 * group, 2, (64, 24, 128)[case // 2], (4, 16)[case % 2], (0, 5)[case % 2])
    batch.k, batch.v = batch.k.to(BF16), batch.v.to(BF16)
    batch.keys, batch.values = ([x.to(BF16).double() for x in kept] for kept in (batch.keys, batch.values))
    for cpp in (True, False):
        monkeypatch.setattr(kernels, "use_cpp", cpp)
        close(batch.run(), batch.expected())


@pytest.mark.parametrize("cpp", [True, False], ids=["C++", "PyTorch"])
def test_writing_float32_into_a_bfloat16_cache(cpp, monkeypatch):
    """It is what a float32 cache would hold, rounded."""
    monkeypatch.setattr(kernels, "use_cpp", cpp)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(2))[:9]
    table, found = kernels.rope_table({"rope_theta": 100.0}, 24, 50, "cpu"), []
    for dtype in (F32, BF16):
        qkv = randn(1, 9, (3 + 2 * 3) * 24, dtype=F32)
        caches = [torch.full((5, 4, 3, 24), 99, dtype=dtype) for _ in "kv"]
        q = kernels.rope_and_write_kv(qkv, 3, slots, slots, table, None, None, 1e-6, *caches)
        found.append([q, *(cache.to(BF16) for cache in caches)])
    assert all(torch.equal(*pair) for pair in zip(*found))


@every_body
@pytest.mark.parametrize("norm", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("D", [24, 80])
def test_writing_into_an_int8_cache(body, D, norm):
    """A code is at most half a step off; the largest is 127, whatever the scale's rounding; nothing else changes."""
    T, heads, kv_heads, block_size = 29, 3, 3, 4
    qkv = randn(1, T, heads + 2 * kv_heads, D, dtype=body)
    qkv[3] = 0
    qkv[4] *= 1e-3
    qkv[5, :, 1] = torch.nan
    q, k, v = qkv.clone().double().split([heads, kv_heads, kv_heads], dim=1)
    positions = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:T]
    slots = torch.randperm(20 * block_size, generator=torch.Generator().manual_seed(2))[:T]
    q_norm, k_norm = (randn(3, D, dtype=body), randn(4, D, dtype=body)) if norm else (None, None)
    table = kernels.rope_table({"rope_theta": 100.0}, D, 50, "cpu")
    caches = [torch.full((20, block_size, kv_heads, D), 99, dtype=torch.int8) for _ in "kv"]
    scales = tuple(torch.full((20, kv_heads, block_size), torch.nan, dtype=BF16) for _ in "kv")
    q_out = kernels.rope_and_write_kv(qkv.flatten(1), heads, positions, slots, table, q_norm, k_norm, 1e-6, *caches, scales)

    if norm:
        q, k = (F.rms_norm(x, (D,), w.double(), 1e-6) for x, w in ((q, q_norm), (k, k_norm)))
    q, k = (kernels.apply_rope(x, table[positions].double()) for x in (q, k))
    sound = torch.arange(T) != 5
    loose = {"atol": 5e-5 if body is not BF16 else 3e-2}  # as above
    close(q_out[sound], q[sound], **loose)
    rounding = {BF16: 2**-7, F16: 2**-9}.get(body, 1e-4)  # of k itself before it is quantized, relative to the largest
    for cache, scale, exact in zip(caches, scales, (k, v)):
        codes, steps = cache.view(-1, kv_heads, D)[slots], scale[slots // block_size, :, slots % block_size].double()
        assert steps[5].isnan().all()  # and with it whatever the codes are multiplied to
        codes, steps, exact = codes[sound], steps[sound], exact[sound]
        largest = exact.abs().amax(-1)
        assert (codes.abs().amax(-1) == 127 * (largest > 0)).all()
        assert ((steps - largest / 127).abs() <= largest / 127 * (2**-8 + rounding) + 1e-29).all()
        error = (codes * steps[..., None] - exact).abs()
        assert (error <= (steps / 2 * 1.001 + largest * rounding)[..., None]).all()
        others = torch.ones(20 * block_size, dtype=torch.bool)
        others[slots] = False
        assert (cache.view(-1, kv_heads, D)[others] == 99).all()
        assert scale.transpose(1, 2).flatten(0, 1)[others].isnan().all()


def test_bodies_agree_on_codes_and_scales(monkeypatch):
    """Bit for bit, where nothing but quantizing is done: ties, infinity, numbers that would not have a normal scale."""
    if kernels.cpp_library(F32) is None:
        pytest.skip("no C++ compiler here")
    T, D = 120, 80
    x = torch.cat([randn(1, T // 3, 3, D, dtype=F32), randn(2, T // 3, 3, D, dtype=F32) * 1e-33,
                   (torch.arange(T * D) % 255 / 2 - 63.5).view(T // 3, 3, D)])  # of these every second one is a tie
    x[7, 1, 9] = torch.inf
    x[8, 2, 9] = torch.nan
    found = []
    for cpp, cuda in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(kernels, "use_cpp", cpp)
        caches = [torch.full((T // 4, 4, 1, D), 99, dtype=torch.int8) for _ in "kv"]
        scales = tuple(torch.zeros(T // 4, 1, 4, dtype=BF16) for _ in "kv")
        rows = torch.arange(T)
        with cuda_on_cpu.enabled() if cuda else contextlib.nullcontext():
            kernels.rope_and_write_kv(x.flatten(1), 1, rows, rows, None, None, None, 1e-6, *caches, scales)
        broken = [~s.isfinite().flatten() for s in scales]
        assert [b.nonzero().flatten().tolist() for b in broken] == [[7], [8]]  # what their codes are does not matter
        found += [[c.view(T, D)[~b] for b, c in zip(broken, caches)] + [s.flatten()[~b] for b, s in zip(broken, scales)]]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_quantized_keys_and_values_are_those_of_their_own_row():
    """Whatever else is written with it. No entry is off by more than 1/254 of the row's largest, or a little more: the scale
    is rounded, too.
    """
    x = randn(1, 50, 2, 64)
    codes, scales = kernels.quantize_kv(x)
    assert codes.dtype == torch.int8 and scales.dtype == BF16 and codes.shape == x.shape and scales.shape == (50, 2)
    assert ((codes * scales.double()[..., None] - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 * (1 + 2**-8)).all()
    for i in (0, 17):
        alone = kernels.quantize_kv(x[i : i + 1])
        assert torch.equal(alone[0][0], codes[i]) and torch.equal(alone[1][0], scales[i])


def test_bf16_is_rounded_to_nearest_even():
    """x + delta in bf16 lies halfway between two neighbours time and again; NaN and infinity stay what they are."""
    if kernels.cpp_library(BF16) is None:
        pytest.skip("no C++ compiler here")
    bits = torch.randint(-(2**15), 2**15, (2, 64, 512), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    # equal signs and nearby exponents: sums need one bit more than there is
    nearby = torch.randint(-300, 300, (32, 512), generator=torch.Generator().manual_seed(1))
    bits[1, 32:] = bits[0, 32:] + nearby.short()
    x, delta = bits.view(BF16)
    exact = x.float() + delta.float()
    ties = (exact.contiguous().view(torch.int32) & 0xFFFF) == 0x8000
    assert ties.sum() > 1000 and exact.isnan().any() and exact.isinf().any()
    _, total = kernels.add_norm(x, delta, torch.ones(512, dtype=BF16), None, 1e-6)
    expected = exact.to(BF16)
    assert torch.equal(total.isnan(), expected.isnan())
    assert torch.equal(total.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


def test_float64_and_float16_take_the_pytorch_path():
    assert kernels.compiled(torch.zeros(1, dtype=F64)) == (None, None)
    assert kernels.compiled(torch.zeros(1, dtype=F16)) == (None, None)
    assert kernels.compiled(torch.zeros(1), None, torch.zeros(1, dtype=BF16)) == (None, None)  # a cache of another dtype
    x = randn(1, 2, 8, dtype=torch.float16)
    out, _ = kernels.add_norm(x, None, torch.ones(8, dtype=torch.float16), None, 1e-6)
    torch.testing.assert_close(out.float(), F.rms_norm(x.float(), (8,), eps=1e-6), rtol=1e-2, atol=1e-2)


def test_threads_do_not_change_results():
    """Work is split by rows and requests, never inside a sum: bit for bit the same on one thread and on two."""
    def everything():
        x = randn(1, 90, 512, dtype=F32)
        qkv, caches = randn(2, 90, 8 * 64, dtype=F32), [torch.zeros(30, 4, 2, 64) for _ in "kv"]
        table = kernels.rope_table({"rope_theta": 100.0}, 64, 90, "cpu")
        attended = Ragged(5, F32, [130, 7, 64], [130, 1, 20], 4, 2, 32, 16).run()
        q = kernels.rope_and_write_kv(qkv, 4, torch.arange(90), torch.arange(90), table, None, None, 1e-6, *caches)
        weight = randn(3, 300, 512, dtype=F32)
        weights = weight, weight.bfloat16(), kernels.quantize(weight, 8), kernels.quantize(weight, 4)
        products = [kernels.linear(x.to(getattr(w, "dtype", BF16)), kernels.pack_weight(w)) for w in weights]
        return *kernels.add_norm(x, x * 2, x[0], x[1], 1e-6), kernels.silu_mul(x), q, *caches, attended, *products

    one = everything()
    torch.set_num_threads(2)
    try:
        two = everything()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# ---- matrix products ----


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 70])
@pytest.mark.parametrize("size", [(1, 1), (33, 7), (64, 128), (600, 70)], ids=str)
@pytest.mark.parametrize("use_cpp", [True, False], ids=["cpp", "torch"])
def test_linear_of_packed_and_plain_weights(dtype, rows, size, use_cpp, monkeypatch):
    monkeypatch.setattr(kernels, "use_cpp", use_cpp)
    x, weight = randn(1, rows, size[0], dtype=dtype), randn(2, size[1], size[0], dtype=dtype)
    bias = randn(3, size[1], dtype=dtype)
    product = x.double() @ weight.double().T
    tolerance = {"rtol": 2e-2, "atol": 0.1} if dtype is BF16 else {"rtol": 1e-5, "atol": 1e-4}
    for w in (weight, kernels.pack_weight(weight)):
        for b in (None, bias):
            for gelu in (False, True):
                y = product if b is None else product + b.double()
                y = F.gelu(y, approximate="tanh") if gelu else y
                close(kernels.linear(x, w, b, gelu), y, **tolerance)


def weights_of_all_kinds(outputs, inputs):
    """[(weight, dtype of what it is multiplied with)], each packed where it can be."""
    weight = randn(4, outputs, inputs, dtype=F32)
    low = [kernels.quantize(weight, *options) for options in ((8,), (8, inputs // 2), (8, 32), (4,), (4, 64))]
    kinds = [(weight, F32), (weight.bfloat16(), BF16), *((w, dtype) for w in low for dtype in (F32, BF16))]
    return [(kernels.pack_weight(w), dtype) for w, dtype in kinds]


def test_a_row_does_not_depend_on_its_neighbours():
    """Bit for bit: what a request gets is the same alone and in a batch of any size."""
    for weight, dtype in weights_of_all_kinds(70, 640):
        if not isinstance(weight, kernels.PanelWeight):
            pytest.skip("no products of our own on this CPU")
        x = randn(5, 61, 640, dtype=dtype)
        whole = kernels.linear(x, weight)
        for first, last in ((0, 1), (3, 5), (20, 35), (55, 61), (2, 60)):
            assert torch.equal(kernels.linear(x[first:last], weight), whole[first:last]), (weight.bits, dtype, first)


def test_packing_loses_nothing(monkeypatch):
    one = kernels.pack_weight(randn(1, 3, 2, dtype=BF16))
    assert not isinstance(one, kernels.PanelWeight) or one.unpack().shape == (3, 2)
    one = randn(1, 64, 1, dtype=BF16).T  # a single output, whose stride torch leaves at 1, takes no pairs as it lies
    assert torch.equal(kernels.PanelWeight.pack(one).unpack(), one)
    for outputs, inputs in ((1, 64), (33, 64), (64, 192)):
        for weight, dtype in weights_of_all_kinds(outputs, inputs):
            monkeypatch.setattr(kernels, "use_cpp", False)
            x = randn(1, 3, inputs, dtype=dtype)
            plain = weight.unpack() if isinstance(weight, kernels.PanelWeight) else weight
            assert torch.equal(kernels.linear(x, weight), kernels.linear(x, plain))
            if isinstance(plain, kernels.LowBitWeight):
                assert plain.shape == (outputs, inputs) and plain.scales.dtype == BF16
            monkeypatch.undo()


def test_what_can_not_be_packed_is_left_alone():
    odd = kernels.quantize(randn(1, 4, 9, dtype=F32), 8, 3)  # words of two codes would belong to two groups
    assert kernels.pack_weight(odd) is odd
    weight = randn(1, 4, 4)
    assert kernels.pack_weight(weight) is weight
    half = weight.half()
    assert kernels.pack_weight(half) is half


@pytest.mark.parametrize("capability, can", [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_experts_are_stacked_where_torch_multiplies_them_without_waiting(capability, can, monkeypatch):
    """Elsewhere its grouped product reads on the host where each expert's rows end, and no graph could be captured."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = torch.empty(16, 24, dtype=BF16)
    assert not kernels.can_group(weight), "on the CPU"
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda:0"))
    assert kernels.can_group(weight) == can
    assert not kernels.can_group(weight[:, :20]) and not kernels.can_group(weight.half())


@pytest.mark.parametrize("dtype, stacked", [(F64, False), (F32, False), (BF16, False), (F32, True), (BF16, True)], ids=str)
def test_mixture_of_experts(dtype, stacked):
    """Against every token on its own. Expert 4 is chosen by nobody, and its weights are NaN."""
    T, H, inner, E, K = 19, 16, 24, 6, 2
    x = randn(1, T, H, dtype=dtype)
    gate_up = [randn(10 + e, 2 * inner, H, dtype=dtype) * (torch.nan if e == 4 else 1) for e in range(E)]
    down = [randn(20 + e, H, inner, dtype=dtype) for e in range(E)]
    scores = randn(2, T, E)
    scores[:, 4] = -torch.inf
    weights, experts = scores.softmax(-1).topk(K, dim=-1)
    expected = torch.zeros(T, H, dtype=F64)
    for t in range(T):
        for e, w in zip(experts[t].tolist(), weights[t]):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            expected[t] += w * (down[e].double() @ (F.silu(gate) * up))
    if stacked:
        gate_up, down = torch.stack(gate_up), torch.stack(down)
    out = kernels.mixture_of_experts(x, experts, weights.to(F32), gate_up, down)
    assert out.dtype == dtype
    loose = 0.05 if dtype is BF16 else 1e-5
    close(out, expected, rtol=loose, atol=loose * float(expected.abs().max()))


def mixture(T, bits, dtype, E=6, K=2, H=128, inner=256):
    """Arguments of mixture_of_experts, stacked, for weights of 16, 8 or 4 bits; expert 4 is NaN, chosen by nobody."""
    stacks = []
    for size in (2 * inner, H), (H, inner):
        weights = [randn(10 * size[0] + e, *size) / size[1] ** 0.5 for e in range(E)]
        weights[4] *= torch.nan
        weights = [w.to(dtype) if bits == 16 else kernels.quantize(w, bits) for w in weights]
        stack = kernels.stack_experts(weights[0], E, torch.empty(0, dtype=dtype))
        for e, weight in enumerate(weights):
            stack[e] = weight
        stacks.append(stack)
    scores = randn(T, T, E)
    scores[:, 4] = -torch.inf
    weights, experts = scores.softmax(-1).topk(K, dim=-1)
    return randn(1, T, H, dtype=dtype), experts, weights.float(), *stacks


@pytest.mark.skipif(not cuda_on_cpu.compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize("T", [1, 3, 4, 24, 45])
@pytest.mark.parametrize("bits, dtype", [(16, BF16), (16, F16), (8, BF16), (4, BF16), (4, F16)], ids=str)
def test_stacked_experts_wait_for_nothing(bits, dtype, T, reverse):
    """Few pairs, some, many: against one expert after the other. The host asks for no number, and weights are read for
    every row, 8 rows or 16 rows that chose them."""
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not re.search("unique|nonzero|local_scalar|lift_fresh", func.name()), "the host would wait"
            return func(*args, **(kwargs or {}))

    with cuda_on_cpu.enabled(reverse=reverse, launches=[]) as launches:
        x, experts, weights, gate_up, down = mixture(T, bits, dtype)
        assert not isinstance(gate_up, list)
        with Refuse():
            out = kernels.mixture_of_experts(x, experts, weights, gate_up, down)
        assert [launch.name for launch in launches] == ["few_rows_linear", "silu_mul", "few_rows_linear"]
    expected = kernels.mixture_of_experts(x, experts, weights, list(map(gate_up.__getitem__, range(6))),
                                          list(map(down.__getitem__, range(6))))
    assert not out.isnan().any()
    close(out, expected.double(), rtol=2e-2, atol=2e-2)
    at_once = 1 if 2 * T <= 6 else 8 if 2 * T <= 48 else 16
    times = sum(-(-(experts == e).sum().item() // at_once) for e in range(6))
    for launch, weight in (launches[0], gate_up), (launches[2], down):
        codes = weight if bits == 16 else weight.codes
        assert launch.read[1] == times * codes[0].nbytes
        assert launch.grid[0] == (2 * T if at_once == 1 else 2 * T // at_once + 6)


@pytest.mark.skipif(not cuda_on_cpu.compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("bits", [16, 8])
def test_stacked_experts_whose_kernel_does_not_compile(bits, monkeypatch):
    """They run one after the other then, in PyTorch."""
    def failing(name, *_, **constants):
        raise kernels.CompileError("no_such_function is undefined")

    with cuda_on_cpu.enabled():
        arguments = mixture(3, bits, BF16)
        expected = kernels.mixture_of_experts(*arguments)
    monkeypatch.setattr(kernels, "use_cuda", True)
    monkeypatch.setattr(kernels, "use_cpp", False)
    monkeypatch.setattr(kernels, "cuda_on_cpu", lambda dtype: failing)
    with pytest.warns(UserWarning, match="PyTorch runs instead"):
        close(kernels.mixture_of_experts(*arguments), expected.double(), rtol=2e-2, atol=2e-2)
    assert not kernels.use_cuda


def test_experts_that_fit_no_kernel_are_a_list_and_many_pairs_run_one_by_one(monkeypatch):
    for weight in (torch.ones(4, 24).bfloat16(), torch.ones(4, 32), kernels.quantize(torch.ones(4, 64), 4),
                   kernels.quantize(torch.ones(4, 64), 8, 32)):
        with cuda_on_cpu.enabled():
            assert kernels.stack_experts(weight, 3, torch.empty(0, dtype=BF16)) == [None] * 3
    with cuda_on_cpu.enabled(launches=[]) as launches:
        arguments = mixture(200, 8, BF16)
        assert kernels.most_pairs(*arguments[3:]) == 384 and kernels.most_pairs(arguments[3], []) == 0
        assert kernels.most_pairs(*mixture(1, 16, F16)[3:]) == 96
        out = kernels.mixture_of_experts(*arguments)
        assert "dequantize" in [launch.name for launch in launches]
        monkeypatch.setattr(kernels, "most_pairs", lambda *weights: 400)
        close(out, kernels.mixture_of_experts(*arguments).double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bits, group", [(8, None), (8, 64), (4, None), (4, 64), (4, 128)])
def test_quantize_rounds_to_the_nearest_code(bits, group):
    weight = randn(1, 24, 384, dtype=F32) * torch.logspace(-6, 3, 24)[:, None]
    weight[3], weight[4, :40] = 0, 0
    low = kernels.quantize(weight, bits, group)
    assert (low.bits, low.shape) == (bits, (24, 384))
    wide, group = low.dequantize(F64), group or (384 if bits == 8 else 32)
    scales = low.scales.double().repeat_interleave(group, dim=1)
    largest = weight.double().view(24, -1, group).abs().amax(-1).repeat_interleave(group, dim=1)
    # Half a step away at most, but for the largest where its scale was rounded down (by 1/256 at most).
    assert ((wide - weight).abs() <= scales / 2 + largest / 256 * (weight.abs() >= largest * 0.99)).all()
    codes = wide / scales.clamp(min=1e-30)
    most = 2 ** (bits - 1) - 1
    assert (codes - codes.round()).abs().max() < 1e-6 and codes.abs().max() == most
    assert not wide[3].any() and not wide[4, :32].any()  # zeros stay zeros, and no scale divides by nothing
    assert (low.codes.nbytes, low.scales.nbytes) == (24 * 384 * bits // 8, 2 * 24 * 384 // group)
    assert kernels.quantize(weight.bfloat16(), bits, group).codes.shape == low.codes.shape


@pytest.mark.parametrize("bits", [8, 4])
def test_widening_a_low_bit_weight_takes_nothing_from_the_host(bits):
    """A step with many rows widens weights inside a captured graph, where a copy from the host is an error."""
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "lift_fresh" not in func.name(), "a tensor was made from Python's numbers"
            return func(*args, **(kwargs or {}))

    low = kernels.quantize(randn(1, 8, 64, dtype=F32), bits)
    with Refuse():
        low.dequantize(BF16)
        with pytest.raises(AssertionError):
            torch.tensor([1, 2])


@pytest.mark.parametrize("bits, group, inputs", [(4, None, 40), (4, 16, 64), (8, 7, 64), (3, None, 64), (4, 64, 96)])
def test_groups_that_do_not_fit_are_refused(bits, group, inputs):
    with pytest.raises(ValueError, match="quantize: "):
        kernels.quantize(torch.zeros(2, inputs), bits, group)


SHAPES_AND_GROUPS = [*itertools.product([(1, 40, 128), (5, 33, 640), (12, 16, 256), (39, 70, 128), (70, 5, 128)],
                                       [(8, None), (8, 64), (4, None), (4, 128)]),
                     *(((3, 17, 9600), group) for group in ((8, None), (4, None), (4, 96), (4, 9600))),
                     *(((19, 33, 9600), group) for group in ((8, None), (4, 96)))]


@every_body
@pytest.mark.parametrize("shape, bits_and_group", SHAPES_AND_GROUPS, ids=str)
def test_low_bit_linear(body, shape, bits_and_group):
    """Every row count that takes another way, outputs that fill no tile, inputs for which a GPU's lanes come back several
    times, groups that are no power of two, and a bias."""
    (rows, outputs, inputs), (bits, group) = shape, bits_and_group
    low = kernels.quantize(randn(1, outputs, inputs, dtype=F32), bits, group)
    x, bias = randn(2, rows, inputs, dtype=body), randn(3, outputs, dtype=body)
    expected = x.double() @ low.dequantize(F64).T
    low, scale = kernels.pack_weight(low), {name: t * inputs**0.5 for name, t in TOLERANCE[body].items()}
    if isinstance(low, kernels.PanelWeight):  # multiplies integers: x is rounded to 16 bits
        scale["atol"] = max(scale["atol"], 8 * 2**-16 * inputs**0.5)
    close(kernels.linear(x, low), expected, **scale)
    close(kernels.linear(x, low, bias), expected + bias.double(), **scale)
    close(kernels.linear(x, low, bias, gelu=True), F.gelu(expected + bias.double(), approximate="tanh"), **scale)


@every_body
@pytest.mark.parametrize("shape, bits, group", [((5, 84), 8, 7), ((5, 84), 8, 6), ((37, 84), 8, 12), ((33, 97), 8, None),
                                                ((33, 640), 8, 64), ((33, 640), 4, 32), ((5, 288), 4, 96)], ids=str)
def test_widening_a_low_bit_weight(body, shape, bits, group):
    """To the last bit, whatever number of codes a GPU can load at a time: many rows of an identity matrix show them all."""
    low = kernels.quantize(randn(1, *shape) * torch.logspace(-7, 3, shape[0])[:, None], bits, group)
    expected = low.dequantize(F64).to(body)
    assert torch.equal(kernels.linear(torch.eye(shape[1], dtype=body), low), expected.T)
    assert torch.equal(low.dequantize(body), expected)


@pytest.mark.skipif(not cuda_on_cpu.compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_bytes_that_a_product_with_low_bits_moves(dtype, bits):
    """For up to 16 rows every code moves once. Up to 64, those who share codes follow each other and find them in the cache;
    beyond, and in float32, the weight is widened: a byte or half of one is read for each, the dtype's are written."""
    outputs, inputs = 96, 256
    low = kernels.quantize(randn(1, outputs, inputs), bits)
    for rows, times in (1, 1), (8, 1), (9, 1), (16, 1), (17, 2), (64, 4), (65, None):
        x = randn(rows, rows, inputs, dtype=dtype)
        with cuda_on_cpu.enabled(launches=[]) as launches, cuda_on_cpu.Operations() as others:
            kernels.linear(x, low)
        (launch,) = launches
        if times and dtype is BF16:
            at_once = 8 if rows <= 8 else 16
            x_bytes = outputs // (2 * at_once) * times * at_once * inputs * 2  # rows that are missing are in the cache
            assert launch.grid == (times, outputs // (2 * at_once)) and others.launches == 0
            assert launch.name == "few_rows_linear" and launch.read == [x_bytes, times * low.codes.nbytes, *[0] * 8]
        else:
            wide = outputs * inputs * dtype.itemsize
            assert (launch.name, others.launches) == ("dequantize", 1)
            assert (launch.read[0], launch.written[2]) == (low.codes.nbytes, wide)
            assert others.bytes == x.nbytes + wide + rows * outputs * dtype.itemsize
            assert launch.grid == (3,), "eight entries at a time"


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bit_linear_of_odd_sizes_on_the_cpu(bits):
    """Inputs that fill no vector, and a NaN that stays in its row."""
    inputs = 96 if bits == 4 else 37
    low, others = kernels.quantize(randn(1, 7, inputs, dtype=F32), bits), [0, 1, *range(3, 7)]
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = randn(2, 7, inputs, dtype=F32)
        x[2, 5] = wrong
        out = kernels.linear(x, kernels.pack_weight(low))
        assert out[2].isnan().all()
        close(out[others], (x.double() @ low.dequantize(F64).T)[others], rtol=1e-5, atol=8 * 2**-16 * inputs**0.5)


# ---- building the C++ ----


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process: nothing built, an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.cpp_library.cache_clear()
    yield tmp_path
    kernels.cpp_library.cache_clear()


def silu(x):
    gate, up = x.double().chunk(2, dim=-1)
    return F.silu(gate) * up


def test_a_failing_compiler_warns_once_and_pytorch_runs(monkeypatch, fresh):
    cxx = fresh / "cxx"
    cxx.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    cxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(cxx))
    x = randn(1, 3, 32, dtype=F32)
    with pytest.warns(UserWarning, match="this compiler is broken") as caught:
        close(kernels.silu_mul(x), silu(x))
        close(kernels.silu_mul(x), silu(x))
    assert len(caught) == 1
    assert not list(fresh.glob("**/*.so"))


@pytest.mark.parametrize("cxx, message", [("no_such_compiler", "no_such_compiler"), ('g++ "', "No closing quotation")])
def test_a_compiler_that_is_not_there_warns_too(cxx, message, monkeypatch, fresh):
    monkeypatch.setenv("CXX", cxx)
    with pytest.warns(UserWarning, match=message):
        assert kernels.cpp_library(F32) is None


def test_a_user_without_a_home_is_warned(monkeypatch, fresh):
    """Some containers run as a user that has no account, and say nothing of HOME."""
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kernels.Path, "home", home)
    with pytest.warns(UserWarning, match="could not be built, PyTorch runs instead"):
        assert kernels.cpp_library(F32) is None


def test_without_a_compiler_pytorch_runs_silently(monkeypatch, fresh):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    x = randn(1, 3, 32, dtype=F32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.cpp_library(F32) is None
        close(kernels.silu_mul(x), silu(x))


def test_what_was_built_is_kept(monkeypatch, fresh):
    """Built into XDG_CACHE_HOME once per element type, compiler and source, in one move."""
    builds = []

    def fake(command, **options):
        builds.append(command)
        path = command[command.index("-o") + 1]
        with open(path, "w") as file:
            file.write("code")

    monkeypatch.setattr(kernels.subprocess, "run", fake)
    first = kernels._build_cpu_source("c++", "float")
    assert first.parent == fresh / "nanoserve" and first.read_text() == "code"
    assert kernels._build_cpu_source("c++", "float") == first and len(builds) == 1
    assert "-DT=float" in builds[0]
    others = {kernels._build_cpu_source("c++", "bf16"), kernels._build_cpu_source("clang++", "float")}
    monkeypatch.setattr(kernels, "CPU_SOURCE", kernels.CPU_SOURCE + "// changed")
    others.add(kernels._build_cpu_source("c++", "float"))
    assert len(others | {first}) == 4 and len(builds) == 4
    assert kernels._build_cpu_source("ccache g++", "float") not in others and builds[-1][:2] == ["ccache", "g++"]
    assert len(builds) == 5 == len(list(first.parent.iterdir()))  # nothing else lies about


def test_a_damaged_build_is_not_fatal(monkeypatch, fresh):
    """A library in the cache folder that cannot be loaded costs a warning, not the run."""
    monkeypatch.setattr(kernels, "_build_cpu_source", lambda *args: fresh / "broken.so")
    (fresh / "broken.so").write_text("not a library")
    monkeypatch.setenv("CXX", "c++")
    with pytest.warns(UserWarning, match="broken.so"):
        assert kernels.cpp_library(F32) is None


def test_cuda_on_cpu_says_that_there_is_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="silu_mul: there is no C\\+\\+ compiler"):
        cuda_on_cpu.library.__wrapped__("", "silu_mul")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 levels")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_older_cpus_compute_the_same(level, monkeypatch, fresh):
    """What one instruction of a newer CPU does, the branches for those without it do too: here no CPU runs them else."""
    needed = {"x86-64-v3": ("AVX2", "AVX512"), "x86-64-v4": ("AVX512",)}.get(level)
    if needed and torch.backends.cpu.get_cpu_capability() not in needed:
        pytest.skip("this CPU is older")
    run, swap = kernels.subprocess.run, {"-march=native": f"-march={level}", "-O3": "-O1"}
    monkeypatch.setattr(kernels.subprocess, "run", lambda command, **o: run([swap.get(w, w) for w in command], **o))
    if kernels.cpp_library(BF16) is None:
        pytest.skip("no C++ compiler here")
    for D, heads, kv_heads, int8 in ((24, 2, 2, False), (80, 4, 1, False), (64, 6, 3, True), (24, 16, 2, True)):
        batch = Ragged(D, BF16, [1, 70, 41, 16], [1, 30, 2, 16], heads, kv_heads, D, 16, int8=int8)
        close(batch.run(), batch.expected())
    weight, x = randn(1, 70, 640, dtype=F32), randn(2, 17, 640, dtype=BF16)
    wrong = x.clone()
    wrong[3, 5] = torch.nan
    for w in (weight.bfloat16(), *(kernels.quantize(weight, *options) for options in ((8,), (8, 64), (4,), (4, 128)))):
        exact, packed = w.double() if isinstance(w, torch.Tensor) else w.dequantize(F64), kernels.PanelWeight.pack(w)
        for some in (x[:1], x):
            close(kernels.linear(some, packed), some.double() @ exact.T, rtol=1e-2, atol=0.02)
        assert kernels.linear(wrong, packed).isnan().any(1).nonzero().tolist() == [[3]]
    # Such a compiler on a CPU with bfloat16 instructions: oneDNN, which uses them, has the products.
    assert not isinstance(kernels.pack_weight(weight.bfloat16()), kernels.PanelWeight)
