"""The maths: every operation of a serving step as plain PyTorch, and where it pays a second body that runs faster.

Each public function is the definition of an operation: a student can read it, swap it, and get the same tokens. It runs
on any device. On a CPU with a C++ compiler, the small operations between the matrix products (attention over scattered
blocks, norms, rotary positions) also have a C++ body in `CPU_SOURCE` at the end of this file, built once in about three
seconds, kept in the user's cache folder and called with the tensors' pointers. `use_cpp = False` turns it off; the tests
hold the two bodies against each other.

Shapes, everywhere the same:
    T tokens of the flat, ragged batch      B requests in it          S rows that are sampled      V vocabulary
    Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), D head_dim, M blocks per row of a block table
    q [T, Hq, D]     k_cache, v_cache [num_blocks, block_size, Hkv, D]     block_tables [B, M] int32
    context_lens [B] int32: tokens of each request in the cache once this step has written its own
    query_start [B+1] int32: request b owns rows query_start[b] .. query_start[b+1]-1 of the flat batch

Survey A VI.C (Inference pipeline optimization) · B 3.2.5 · C KV Cache Optimization: Memory Management.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

use_cpp = True  # False: the PyTorch bodies only


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------------------------------


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Reorder a [out, in] weight, once, into the blocked layout oneDNN multiplies from; unchanged where there is none.

    F.linear does this reordering inside every call, which at a few dozen rows costs as much as the product itself.
    """
    if (weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
            and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        return torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
    """x [T, in] times weight [out, in], transposed, plus bias [out]; then GELU (tanh form) if asked. Returns [T, out]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def mixture_of_experts(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up, down) -> torch.Tensor:
    """Send every token through its K experts and add up what they say.

    x [T, H], experts [T, K] int64 and weights [T, K] from the router; gate_up[e] [2I, H] and down[e] [H, I].
    Returns [T, H]. Each expert runs once, over all tokens that chose it. Survey B 3.1.2 · C MoE. (arXiv:2101.03961)
    """
    out = torch.zeros_like(x)
    for e in experts.unique().tolist():
        rows, choice = (experts == e).nonzero(as_tuple=True)
        y = linear(silu_mul(linear(x[rows], gate_up[e])), down[e])
        out.index_add_(0, rows, (y * weights[rows, choice, None]).to(x.dtype))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Between the matrix products
# ---------------------------------------------------------------------------------------------------------------------


def add_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
             eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise it: (norm(x + delta), x + delta), each [T, H].

    RMSNorm, or LayerNorm where there is a bias. In at least float32, whatever the dtype of x.
    """
    if cpp := cpp_bodies(x, weight, *(t for t in (delta, bias) if t is not None)):
        x, delta = x.contiguous(), delta if delta is None else delta.contiguous()
        out = torch.empty_like(x)
        total = x if delta is None else torch.empty_like(x)
        cpp("add_norm", x, delta, weight, bias, out, total, *x.shape, eps)
        return out, total
    x = x if delta is None else x + delta
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight
    return (out if bias is None else out + bias).to(x.dtype), x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension (arXiv:1910.07467)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's middle (arXiv:2002.05202): gate_up [T, 2I] holds the gates, then the values; silu(gate) * up, [T, I]."""
    if cpp := cpp_bodies(gate_up):
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        cpp("silu_mul", gate_up, out, *out.shape)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_frequencies(rope: dict, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dimensions, [D/2] float32, and what cos and sin are multiplied by.

    `rope` is a Hugging Face rope dictionary: rope_type, rope_theta and that type's own fields. Context extension by
    `linear` (arXiv:2306.15595), `llama3` (Llama 3.1) and `yarn` (arXiv:2309.00071) scaling. Unknown types raise
    ValueError: a guess would be right on short prompts and wrong on long ones. Survey B 7 (Long context).
    """
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    inv = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if kind == "default":
        return inv, 1.0
    factor = rope.get("factor")
    if kind == "linear":
        return inv / factor, 1.0
    if kind == "llama3":
        # Wavelengths that fit the old context often are kept, those longer than it are stretched, between them a ramp.
        turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inv / factor * (1 - keep) + inv * keep, 1.0
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]

        def dimension(turns):  # the pair that makes so many turns over the original context
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        keep = 1 - ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        return inv / factor * (1 - keep) + inv * keep, _yarn_scale(rope, factor)
    raise ValueError(f"rope_type: {kind!r} is not supported (default, linear, llama3, yarn are)")


def _yarn_scale(rope: dict, factor: float) -> float:
    """YaRN's attention temperature. It multiplies cos and sin both, so scores get it squared."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def temperature(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def rope_table(rope: dict, head_dim: int, max_len: int, device) -> torch.Tensor:
    """cos and sin of every position's angles, [max_len, D] float32: D/2 cosines, then D/2 sines."""
    inv, scale = rope_frequencies(rope, head_dim)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv
    return torch.cat([angles.cos(), angles.sin()], dim=-1).mul_(scale).to(device)


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D] by its positions' angles, cos_sin [T, D] (arXiv:2104.09864).

    Dimension d is paired with d + D/2, as Hugging Face checkpoints are stored, not with d + 1 as in the paper.
    """
    cos, sin = cos_sin[:, None].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rope_and_write_kv(qkv: torch.Tensor, num_heads: int, positions: torch.Tensor, slots: torch.Tensor,
                      table: torch.Tensor | None, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
                      k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    """Everything between the q/k/v product and attention: split, normalise q and k per head, rotate, store k and v.

    qkv [T, (Hq + 2 Hkv) * D]; positions, slots [T] int64, a slot being block * block_size + offset; table from
    `rope_table`, None for models with learned positions; q_norm, k_norm [D] or None. Returns q [T, Hq, D], which may be
    a view of qkv.
    """
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    norms = () if q_norm is None else (q_norm, k_norm)
    if (cpp := cpp_bodies(qkv, k_cache, v_cache, *norms)) and qkv.is_contiguous():
        cpp("rope_and_write_kv", qkv, positions, slots, table, q_norm, k_norm, k_cache, v_cache,
            qkv.shape[0], num_heads, kv_heads, head_dim, eps)
        return qkv.view(qkv.shape[0], -1, head_dim)[:, :num_heads]
    q, k, v = qkv.view(qkv.shape[0], -1, head_dim).split([num_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if table is not None:
        q, k = apply_rope(q, table[positions]), apply_rope(k, table[positions])
    write_kv(k, v, k_cache, v_cache, slots)
    return q


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Store k, v [T, Hkv, D] at slots [T] int64 of the paged cache. Survey A III.A · B 3.2.3."""
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k.to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v.to(v_cache.dtype)


def paged_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
                    context_lens: torch.Tensor, query_start: torch.Tensor, scale: float, window: int = 0) -> torch.Tensor:
    """Causal attention of a ragged batch over the paged cache: any mix of query lengths in one call. Returns [T, Hq, D].

    The n queries of a request are its last n positions, so query i of n stands at position context_len - n + i and sees
    the keys up to there; with a `window` only the last `window` of them, itself included. Query head h reads key/value
    head h // (Hq // Hkv). Softmax in at least float32. Survey A III.A · B 3.2.3, 3.2.5. (arXiv:2309.06180)
    """
    T, num_heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    if (cpp := cpp_bodies(q, k_cache, v_cache)) and q.stride(2) == 1 and q.stride(1) == head_dim:
        block_tables, context_lens, query_start = (
            t.to(torch.int32).contiguous() for t in (block_tables, context_lens, query_start))
        out = q.new_empty(T, num_heads, head_dim)
        cpp("paged_attention", q, k_cache, v_cache, block_tables, context_lens, query_start, out,
            context_lens.shape[0], block_tables.shape[1], block_size, num_heads, kv_heads, head_dim, q.stride(0), window,
            scale)
        return out
    out, wide = torch.empty_like(q), torch.promote_types(q.dtype, torch.float32)
    starts, lengths = query_start.tolist(), context_lens.tolist()
    for b, (start, end, length) in enumerate(zip(starts, starts[1:], lengths)):
        blocks = block_tables[b, : -(-length // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:length].to(wide)  # [length, Hkv, D]
        v = v_cache[blocks].flatten(0, 1)[:length].to(wide)
        key = torch.arange(length, device=q.device)
        query = key[length - (end - start):, None]
        visible = key <= query if not window else (key <= query) & (key > query - window)
        grouped = q[start:end].to(wide).view(end - start, kv_heads, -1, head_dim)
        scores = torch.einsum("nhgd,lhd->hgnl", grouped, k) * scale
        probs = scores.masked_fill(~visible, -math.inf).softmax(-1)
        out[start:end] = torch.einsum("hgnl,lhd->nhgd", probs, v).reshape(end - start, num_heads, head_dim).to(q.dtype)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token
# ---------------------------------------------------------------------------------------------------------------------


def edit_logits(logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor,
                divide: torch.Tensor, subtract: torch.Tensor) -> torch.Tensor:
    """logits [S, V] with single entries changed; biases, bans and penalties are all of this form. Returns a new tensor.

    Entry (rows[i], tokens[i]) gets bias[i] added (-inf bans it), is moved towards "unlikely" by the factor divide[i]
    (repetition penalty: positive logits are divided, negative ones multiplied, arXiv:1909.05858), and loses subtract[i]
    (presence and frequency penalty). No entry may be named twice.
    """
    picked = logits[rows, tokens] + bias
    picked = torch.where(picked > 0, picked / divide, picked * divide) - subtract
    return logits.index_put((rows, tokens), picked)


def token_probabilities(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
                        min_p: torch.Tensor) -> torch.Tensor:
    """What a token is drawn from: logits [S, V] after temperature, top-k, top-p and min-p, in this order. [S, V] float32.

    All parameters are [S]; temperature > 0; top_k 0, top_p 1 and min_p 0 are off. Top-k keeps ties with the k-th
    logit, top-p the token that crosses p and its ties (arXiv:1904.09751), min-p whatever has at least min_p times the
    largest probability (arXiv:2407.01082). Survey B v1 3.2.5 (Sampling optimization).
    """
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]  # largest 0: nothing overflows
    V = logits.shape[-1]
    # A row is decided by one threshold on its logits. Sorting 150,000 of them to keep forty is a waste, so look at the
    # largest few first, and at more only if some row's top-p reaches further.
    size = int(torch.where(top_k > 0, top_k, 1).max())
    needs_order = bool((top_k > 0).any() or (top_p < 1).any())
    if needs_order:
        size = min(V, max(size, 256 if (top_p < 1).any() else 1))
        largest = logits.topk(size).values  # [S, size], descending
        kth = largest.gather(1, (top_k.clamp(1, size) - 1)[:, None])
        threshold = torch.where(top_k[:, None] > 0, kth, -math.inf)
        kept = logits.masked_fill(logits < threshold, -math.inf)
        total = kept.logsumexp(-1, keepdim=True)
        while True:
            mass = (largest.masked_fill(largest < threshold, -math.inf) - total).exp().cumsum(-1)
            if size == V or bool(((mass[:, -1] >= top_p) | (top_p >= 1) | (largest[:, -1] < threshold[:, 0])).all()):
                break
            size = min(V, 8 * size)
            largest = logits.topk(size).values
        crossing = (mass < top_p[:, None]).sum(-1, keepdim=True).clamp(max=size - 1)
        threshold = torch.where(top_p[:, None] < 1, torch.maximum(threshold, largest.gather(1, crossing)), threshold)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if bool((min_p > 0).any()):
        logits = logits.masked_fill(logits < min_p.log()[:, None], -math.inf)
    return logits.softmax(-1)


def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
           min_p: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one token per row of logits [S, V]; temperature 0 is argmax, row by row. Returns [S] int64.

    `noise` [S] in [0, 1), float64 where the device has it, is all the randomness there is: the token is where the
    cumulative probability passes it. So a row's token depends on that row alone, not on its neighbours or on how often
    anybody sampled before.
    """
    drawn = (temperature > 0).nonzero()[:, 0]
    if len(drawn) < len(logits):
        tokens = logits.max(-1).indices
        if len(drawn):
            tokens[drawn] = sample(logits[drawn], temperature[drawn], top_k[drawn], top_p[drawn], min_p[drawn], noise[drawn])
        return tokens
    mass = token_probabilities(logits, temperature, top_k, top_p, min_p).to(noise.dtype).cumsum(-1)
    # right=True finds the first entry *beyond* the target, which is never a token of probability zero.
    picked = torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)[:, 0]
    return picked.clamp(max=logits.shape[-1] - 1)


def uniform_noise(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, one for each (seed, position): a hash, so there is no state to lose.

    Two rounds of SplitMix64's finaliser (Steele et al. 2014) over uint64.
    """
    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = mix(mix(seeds.astype(np.uint64) + golden) + positions.astype(np.uint64) * golden)
    return (z >> np.uint64(11)) * 2.0**-53


# ---------------------------------------------------------------------------------------------------------------------
# C++ for the CPU: building and calling
# ---------------------------------------------------------------------------------------------------------------------

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16"}


class CppLibrary:
    """CPU_SOURCE built for one element type; calling it with a function's name and arguments runs that function."""

    signatures = {
        "add_norm": [_P] * 6 + [_I] * 2 + [_F],
        "silu_mul": [_P] * 2 + [_I] * 2,
        "rope_and_write_kv": [_P] * 8 + [_I] * 4 + [_F],
        "paged_attention": [_P] * 7 + [_I] * 8 + [_F],
    }

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self.functions = {name: getattr(library, name) for name in self.signatures}
        for name, arguments in self.signatures.items():
            self.functions[name].argtypes, self.functions[name].restype = arguments, None

    def __call__(self, name: str, *args) -> None:
        self.functions[name](*(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args))


def cpp_bodies(*tensors: torch.Tensor) -> CppLibrary | None:
    """The C++ bodies, if these tensors are ones they take: on the CPU, float32 or bfloat16, all of one dtype."""
    dtype = tensors[0].dtype
    if use_cpp and tensors[0].is_cpu and dtype in _ELEMENTS and all(t.dtype == dtype for t in tensors):
        return cpp_library(dtype)
    return None


@functools.cache
def cpp_library(dtype: torch.dtype) -> CppLibrary | None:
    """The C++ bodies for one dtype, built when first asked for; None, with one warning, where that fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    try:
        return CppLibrary(_build(compiler, _ELEMENTS[dtype]))
    except (OSError, subprocess.SubprocessError) as error:
        log = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"the C++ kernels could not be built, PyTorch runs instead (slower): {log}", stacklevel=2)
        return None


def _build(compiler: str, element: str) -> Path:
    """Compile CPU_SOURCE into the user's cache folder, under a name made of all that the machine code depends on."""
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", f"-DT={element}"]
    flags += ["-mcpu=native"] if platform.machine().startswith(("arm", "aarch")) else ["-march=native"]
    # OpenMP shares torch's own threads: two thread pools on the same cores would fight. Apple's compiler has none.
    flags += [] if sys.platform == "darwin" else ["-fopenmp"]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    key = hashlib.sha256("\0".join([CPU_SOURCE, compiler, *flags, platform.machine(), cpu]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoserve"
    target = folder / f"cpu-{element}-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            (source := Path(scratch) / "kernels.cpp").write_text(CPU_SOURCE)
            built = Path(scratch) / "kernels.so"
            subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True, capture_output=True, text=True,
                           timeout=120)
            built.replace(target)  # in one move: another process may be building the same
    return target


CPU_SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
#endif

// Sixteen floats; the compiler splits them over whatever vector registers the machine has.
constexpr int W = 16;
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t veci __attribute__((vector_size(4 * W)));
typedef uint32_t vecu __attribute__((vector_size(4 * W)));
typedef uint16_t half_vec __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };  // the upper half of a float32

// The element type T of every function, float or bf16, comes from the compiler's command line.

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; memcpy(&f, &u, 4); return f; }
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t u; memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline vec load(const bf16* p) {
#ifdef __AVX512F__  // what follows, in the two instructions that it could be
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (vec)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#endif
    half_vec h; memcpy(&h, p, sizeof h);
    vecu u = __builtin_convertvector(h, vecu) << 16;
    vec v; memcpy(&v, &u, sizeof v);
    return v;
}
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline float sum(vec v) {  // in halves: sixteen additions one after the other would be sixteen waits
    typedef float vec8 __attribute__((vector_size(32)));
    typedef float vec4 __attribute__((vector_size(16)));
    vec8 x[2]; memcpy(x, &v, sizeof v);
    vec8 y = x[0] + x[1];
    vec4 z[2]; memcpy(z, &y, sizeof y);
    vec4 w = z[0] + z[1];
    return (w[0] + w[2]) + (w[1] + w[3]);
}
// exp of a float to 2 units in the last place: 2^n times a polynomial on |r| <= ln(2)/2. The compiler vectorizes loops
// over this, which over the library's exp it may not.
static inline float exp_(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float shifted = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
    float n = shifted - 12582912.f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.f + r * (1.f + r * (0.5f + r * (0.166666657f + r * (0.0416657962f + r * (0.00833345018f
              + r * 0.00139273646f)))));
    int32_t bits, power; memcpy(&bits, &shifted, 4);
    power = (bits - 0x4b400000 + 127) << 23;
    float scale; memcpy(&scale, &power, 4);
    return p * scale;
}

constexpr int64_t BIG = 8192;  // elements from which on waking the other threads pays

// ---- total = x + delta; out = RMSNorm(total) * weight, or LayerNorm where there is a bias. All [rows, cols].
extern "C" void add_norm(const T* __restrict x, const T* __restrict delta, const T* __restrict weight,
                         const T* __restrict bias, T* __restrict out, T* __restrict total, int64_t rows, int64_t cols,
                         float eps) {
    #pragma omp parallel if (rows * cols > BIG)
    {
        std::vector<float> scratch(cols);
        float* __restrict row = scratch.data();
        #pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            const T *xr = x + r * cols, *dr = delta + r * cols;
            T *or_ = out + r * cols, *tr = total + r * cols;
            if (delta) {
                // Rounded as it is stored: the norm must see what the next layer's residual will see.
                #pragma omp simd
                for (int64_t c = 0; c < cols; c++) {
                    put(&tr[c], to_float(xr[c]) + to_float(dr[c]));
                    row[c] = to_float(tr[c]);
                }
            } else {
                #pragma omp simd
                for (int64_t c = 0; c < cols; c++) row[c] = to_float(xr[c]);
            }
            float s = 0, ss = 0, mean = 0;
            if (bias) {
                #pragma omp simd reduction(+ : s)
                for (int64_t c = 0; c < cols; c++) s += row[c];
                mean = s / cols;
            }
            #pragma omp simd reduction(+ : ss)
            for (int64_t c = 0; c < cols; c++) ss += (row[c] - mean) * (row[c] - mean);
            float inv = 1 / std::sqrt(ss / cols + eps);
            if (bias) {
                #pragma omp simd
                for (int64_t c = 0; c < cols; c++)
                    put(&or_[c], (row[c] - mean) * inv * to_float(weight[c]) + to_float(bias[c]));
            } else {
                #pragma omp simd
                for (int64_t c = 0; c < cols; c++) put(&or_[c], row[c] * inv * to_float(weight[c]));
            }
        }
    }
}

// ---- out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i]
extern "C" void silu_mul(const T* __restrict gate_up, T* __restrict out, int64_t rows, int64_t cols) {
    #pragma omp parallel for if (rows * cols > BIG)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = gate_up + r * 2 * cols, *up = gate + cols;
        T* o = out + r * cols;
        #pragma omp simd
        for (int64_t c = 0; c < cols; c++) {
            float g = to_float(gate[c]);
            put(&o[c], g / (1 + exp_(-g)) * to_float(up[c]));
        }
    }
}

// ---- Per token: normalise each head of q and k, rotate it, leave q in place, store k and v into their slot.
extern "C" void rope_and_write_kv(T* qkv, const int64_t* positions, const int64_t* slots, const float* table,
                                  const T* q_norm, const T* k_norm, T* k_cache, T* v_cache, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t D, float eps) {
    int64_t width = (heads + 2 * kv_heads) * D, half = D / 2;
    #pragma omp parallel if (tokens * width > BIG)
    {
        std::vector<float> scratch(D);
        float* __restrict x = scratch.data();
        #pragma omp for
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t h = 0; h < heads + kv_heads; h++) {
                const T *head = qkv + t * width + h * D, *norm = h < heads ? q_norm : k_norm;
                T* to = h < heads ? qkv + t * width + h * D : k_cache + (slots[t] * kv_heads + h - heads) * D;
                for (int64_t d = 0; d < D; d++) x[d] = to_float(head[d]);
                if (norm) {
                    float ss = 0;
                    #pragma omp simd reduction(+ : ss)
                    for (int64_t d = 0; d < D; d++) ss += x[d] * x[d];
                    float inv = 1 / std::sqrt(ss / D + eps);
                    for (int64_t d = 0; d < D; d++) x[d] *= inv * to_float(norm[d]);
                }
                if (table) {
                    const float *cos = table + positions[t] * D, *sin = cos + half;
                    #pragma omp simd
                    for (int64_t d = 0; d < half; d++) {
                        float a = x[d], b = x[d + half];
                        put(&to[d], a * cos[d] - b * sin[d]);
                        put(&to[d + half], b * cos[d] + a * sin[d]);
                    }
                } else {
                    for (int64_t d = 0; d < D; d++) put(&to[d], x[d]);
                }
            }
            const T* v = qkv + t * width + (heads + kv_heads) * D;
            std::copy(v, v + kv_heads * D, v_cache + slots[t] * kv_heads * D);
        }
    }
}

// ---- Attention over the paged cache. The rows of a task are (query, head) pairs. Online softmax (arXiv:1805.02867): m is
// the largest score of a row so far, l the sum of exp(score - m), acc the values weighted likewise; a larger score
// rescales both. KEYS positions are looked at in one go.
constexpr int KEYS = 32;
constexpr int ROWS = 64;  // rows of one task, at most, unless a single query has more heads
constexpr int FEW = 8;    // rows that share a key/value head, from which on arithmetic and not memory is the limit

struct Rows {
    int64_t D, Dp, rows = 0;  // Dp: D rounded up to whole vectors
    std::vector<float> q, s, acc, m, l;
    Rows(int64_t D, int64_t most) : D(D), Dp((D + W - 1) / W * W), q((most + 3) * Dp), s((most + 3) * KEYS),
        acc((most + 3) * Dp), m(most + 3), l(most + 3) {}

    void start(int64_t rows_) {
        rows = rows_;
        std::fill(acc.begin(), acc.end(), 0.f);
        std::fill(m.begin(), m.end(), -1e30f);
        std::fill(l.begin(), l.end(), 0.f);
    }
    void set_query(int64_t r, const T* from, float scale) {
        for (int64_t d = 0; d < D; d++) q[r * Dp + d] = to_float(from[d]) * scale;
    }
    // s becomes exp(s - m), 0 where not visible; row r sees the keys first .. last-1 of these
    void softmax(int64_t r, int first, int last) {
        float* __restrict p = &s[r * KEYS];
        float top = m[r], total = 0;
        #pragma omp simd reduction(max : top)
        for (int j = 0; j < KEYS; j++) {
            p[j] = j >= first && j < last ? p[j] : -1e30f;
            top = p[j] > top ? p[j] : top;
        }
        #pragma omp simd reduction(+ : total)
        for (int j = 0; j < KEYS; j++) {
            float e = exp_(p[j] - top);
            p[j] = j >= first && j < last ? e : 0.f;
            total += p[j];
        }
        if (top != m[r]) {
            float shrink = exp_(m[r] - top);
            l[r] *= shrink;
            for (int64_t d = 0; d < Dp; d++) acc[r * Dp + d] *= shrink;
        }
        l[r] += total;
        m[r] = top;
    }
    void finish(int64_t r, T* to) {
        for (int64_t d = 0; d < D; d++) put(&to[d], acc[r * Dp + d] / l[r]);
    }
};

// Few rows (decoding): memory is the limit, so read it in the order in which it lies. The heads of a token are neighbours;
// take all of them, token by token. Row h * group + r belongs to the h-th head. FIXED: D if known when compiling, else 0.
template <int FIXED>
static void scores_few(Rows& t, const T* const* k, const T* const* ahead, int64_t heads, int64_t group) {
    const int64_t D = FIXED ? FIXED : t.D, Dp = FIXED ? FIXED : t.Dp;
    for (int j = 0; j < KEYS; j++) {
        for (int64_t d = 0; d < heads * D; d += 64 / sizeof(T)) __builtin_prefetch(ahead[j] + d, 0, 2);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t r = h * group; r < (h + 1) * group; r++) {
                const T* key = k[j] + h * D;
                const float* query = &t.q[r * Dp];
                vec a = {};
                int64_t d = 0;
                for (; d + W <= D; d += W) a += load(query + d) * load(key + d);
                float x = sum(a);
                for (; d < D; d++) x += query[d] * to_float(key[d]);
                t.s[r * KEYS + j] = x;
            }
    }
}
template <int FIXED>
static void values_few(Rows& t, const T* const* v, const T* const* ahead, int64_t heads, int64_t group) {
    const int64_t D = FIXED ? FIXED : t.D, Dp = FIXED ? FIXED : t.Dp;
    for (int j = 0; j < KEYS; j += 4) {
        for (int i = 0; i < 4; i++)
            for (int64_t d = 0; d < heads * D; d += 64 / sizeof(T)) __builtin_prefetch(ahead[j + i] + d, 0, 2);
        for (int64_t h = 0; h < heads; h++) {
            const T *v0 = v[j] + h * D, *v1 = v[j + 1] + h * D, *v2 = v[j + 2] + h * D, *v3 = v[j + 3] + h * D;
            for (int64_t r = h * group; r < (h + 1) * group; r++) {
                const float* p = &t.s[r * KEYS + j];
                float* acc = &t.acc[r * Dp];
                int64_t d = 0;
                for (; d + W <= D; d += W)
                    store(acc + d, load(acc + d) + (p[0] * load(v0 + d) + p[1] * load(v1 + d))
                                                 + (p[2] * load(v2 + d) + p[3] * load(v3 + d)));
                for (; d < D; d++)
                    acc[d] += p[0] * to_float(v0[d]) + p[1] * to_float(v1[d])
                            + p[2] * to_float(v2[d]) + p[3] * to_float(v3[d]);
            }
        }
    }
}

// Many rows of one head (prefill): arithmetic is the limit. Keys are turned into columns, so that four rows by 32 keys of
// accumulators stay in registers; likewise four rows of values.
static void scores_many(Rows& t, const T* const* k, float* kt) {
    for (int j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < t.D; d++) kt[d * KEYS + j] = to_float(k[j][d]);
    for (int64_t r = 0; r < t.rows; r += 4) {
        vec a[4][2] = {};
        for (int64_t d = 0; d < t.D; d++) {
            vec k0 = load(&kt[d * KEYS]), k1 = load(&kt[d * KEYS + W]);
            for (int i = 0; i < 4; i++) { float x = t.q[(r + i) * t.Dp + d]; a[i][0] += x * k0; a[i][1] += x * k1; }
        }
        for (int i = 0; i < 4; i++) { store(&t.s[(r + i) * KEYS], a[i][0]); store(&t.s[(r + i) * KEYS + W], a[i][1]); }
    }
}
static void values_many(Rows& t, const T* const* v, float* wide) {
    for (int j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < t.D; d++) wide[j * t.Dp + d] = to_float(v[j][d]);
    for (int64_t r = 0; r < t.rows; r += 4)
        for (int64_t d = 0; d < t.Dp; d += W) {
            vec a[4];
            for (int i = 0; i < 4; i++) a[i] = load(&t.acc[(r + i) * t.Dp + d]);
            for (int j = 0; j < KEYS; j++) {
                vec x = load(&wide[j * t.Dp + d]);
                for (int i = 0; i < 4; i++) a[i] += t.s[(r + i) * KEYS + j] * x;
            }
            for (int i = 0; i < 4; i++) store(&t.acc[(r + i) * t.Dp + d], a[i]);
        }
}

extern "C" void paged_attention(const T* q, const T* k_cache, const T* v_cache, const int32_t* block_tables,
                                const int32_t* context_lens, const int32_t* query_start, T* out, int64_t B, int64_t M,
                                int64_t block_size, int64_t heads, int64_t kv_heads, int64_t D, int64_t q_stride,
                                int64_t window, float scale) {
    int64_t group = heads / kv_heads, most = std::max<int64_t>(1, ROWS / group);  // queries of a task
    // A task with few rows takes all heads of its request, or as many as leave every thread something to do.
    int64_t together = std::clamp<int64_t>(B * kv_heads / (4 * omp_get_max_threads()), 1, kv_heads);
    auto scores = D == 64 ? scores_few<64> : D == 128 ? scores_few<128> : scores_few<0>;
    auto values = D == 64 ? values_few<64> : D == 128 ? values_few<128> : values_few<0>;
    struct Task { int64_t b, h0, h1, first, last; };  // queries first .. last-1 of request b, key/value heads h0 .. h1-1
    std::vector<Task> tasks;
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0, n = query_start[b + 1] - query_start[b]; i < n; i += most) {
            int64_t last = std::min(i + most, n), step = (last - i) * group < FEW ? together : 1;
            for (int64_t h = 0; h < kv_heads; h += step) tasks.push_back({b, h, std::min(h + step, kv_heads), i, last});
        }
    #pragma omp parallel if (tasks.size() > 1)
    {
        Rows t(D, std::max(most * group, together * FEW));
        std::vector<float> scratch(KEYS * t.Dp);
        #pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); task++) {
            auto [b, h0, h1, first, last] = tasks[task];
            int64_t start = query_start[b], position0 = context_lens[b] - (query_start[b + 1] - start);
            int64_t rows = (last - first) * group, n_heads = h1 - h0;  // rows of one key/value head
            bool few = rows < FEW;
            t.start(rows * n_heads);
            // Row r of head h: query first + r / group, query head h * group + r % group.
            auto place = [&](int64_t r) { return start + first + r % rows / group; };
            auto head = [&](int64_t r) { return (h0 + r / rows) * group + r % group; };
            for (int64_t r = 0; r < t.rows; r++) t.set_query(r, q + place(r) * q_stride + head(r) * D, scale);
            int64_t lo = window ? std::max<int64_t>(0, position0 + first - window + 1) : 0, hi = position0 + last;
            const T *k[KEYS], *v[KEYS], *next[KEYS];
            auto locate = [&](int64_t j0, const T* cache, const T** to) {  // past the end: the last one again
                for (int64_t j = 0; j < KEYS; j++) {
                    int64_t at = std::min(j0 + j, hi - 1), block = block_tables[b * M + at / block_size];
                    to[j] = cache + ((block * block_size + at % block_size) * kv_heads + h0) * D;
                }
            };
            locate(lo, k_cache, next);
            for (int64_t j0 = lo; j0 < hi; j0 += KEYS) {
                std::copy(next, next + KEYS, k);
                locate(j0, v_cache, v);
                locate(j0 + KEYS, k_cache, next);
                // Blocks are scattered, so no hardware guesses what comes next: while reading the keys ask for the values,
                // while reading the values for the next keys.
                if (few) scores(t, k, v, n_heads, rows); else scores_many(t, k, scratch.data());
                for (int64_t r = 0; r < t.rows; r++) {
                    int64_t position = position0 + first + r % rows / group;
                    int64_t from = window ? std::clamp<int64_t>(position - window + 1 - j0, 0, KEYS) : 0;
                    t.softmax(r, from, std::clamp<int64_t>(position + 1 - j0, 0, KEYS));
                }
                if (few) values(t, v, next, n_heads, rows); else values_many(t, v, scratch.data());
            }
            for (int64_t r = 0; r < t.rows; r++) t.finish(r, out + (place(r) * heads + head(r)) * D);
        }
    }
}
"""
