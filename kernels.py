"""The maths: every operation of a serving step in plain PyTorch and, where it pays, in compiled code that is faster.

Each public function defines one operation in PyTorch, which runs on any device: read it, swap it, and get the same tokens.
Attention over scattered blocks, norms, rotary positions, sampling and products with packed or low-bit weights also have
compiled bodies, which get the tensors' addresses; the tests compare all bodies with each other.
  * On a CPU with a C++ compiler: C++, in `CPU_SOURCE`, built once in some five seconds. `use_cpp = False` turns it off.
  * On a GPU from sm_80 on: CUDA C++, in `CUDA`, compiled by torch's NVRTC at first use. Without a GPU the same sources run
    on the CPU, slowly: see tutorial/cuda_on_cpu.py. `use_cuda = False` turns them off, as does one that does not compile.

Shapes, everywhere the same:
    T tokens of the flat, ragged batch      B requests in it          S rows that are sampled      V vocabulary
    Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), D head_dim, M blocks per row of a block table
    q [T, Hq, D]     k_cache, v_cache [num_blocks, block_size, Hkv, D]     block_tables [B, M] int32
    scales: of an int8 cache, the factors of k and v, each [num_blocks, Hkv, block_size] bfloat16; otherwise None
    context_lens [B] int32: tokens of each request in the cache once this step has written its own
    query_start [B+1] int32: request b owns rows query_start[b] .. query_start[b+1]-1 of the flat batch

Survey A VI.C (Inference pipeline optimization) · B 3.2.5 · C KV Cache Optimization: Memory Management.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

use_cpp = True  # False: no C++ bodies on the CPU
use_cuda = True  # False: no CUDA bodies
use_flash = True  # False: on a GPU, steps of prompts go through this file's kernels instead of torch's FlashAttention
use_tiles = True  # False: on a GPU, long prompts too go through the attention kernel for few queries
cuda_on_cpu = None  # tutorial/cuda_on_cpu.py sets this, and the CUDA bodies then run on the CPU's tensors


# ---------------------------------------------------------------------------------------------------------------------
# Which body runs
# ---------------------------------------------------------------------------------------------------------------------


def compiled(*tensors: torch.Tensor | None, cache: torch.Tensor | None = None
             ) -> tuple[CppLibrary | None, CudaKernels | None]:
    """The compiled bodies for an operation on these tensors, (C++, CUDA): one of the two, or neither.

    They take tensors of one dtype: float32 or bfloat16 on the CPU, these or float16 on a GPU. A KV cache may also be int8,
    and on the CPU bfloat16.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    fits = cache is None or cache.dtype in (dtype, torch.int8)
    if all(t is None or t.dtype == dtype for t in tensors):
        if use_cuda and cuda_on_cpu and fits and dtype in _CUDA_ELEMENTS:
            return None, cuda_on_cpu(dtype)
        if device.type == "cpu" and use_cpp and dtype in _CPP_ELEMENTS and (fits or cache.dtype == torch.bfloat16):
            return cpp_library(dtype), None
        if use_cuda and device.type == "cuda" and fits and dtype in _CUDA_ELEMENTS:
            return None, cuda_kernels(device, dtype)
    return None, None


class CompileError(RuntimeError):
    """A CUDA kernel could not be compiled, for the reason that it gives."""


def or_definition(operation):
    """For an operation with CUDA bodies: if one of them cannot be compiled, PyTorch runs from then on, in all operations."""
    @functools.wraps(operation)
    def run(*args, **kwargs):
        try:
            return operation(*args, **kwargs)
        except CompileError as error:
            _give_up_cuda(error)
            return operation(*args, **kwargs)
    return run


def _give_up_cuda(error: Exception) -> None:
    global use_cuda
    use_cuda = False
    warnings.warn(f"the CUDA kernels could not be compiled, PyTorch runs instead (slower): {error}", stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class LowBitWeight:
    """A weight [out, in] in 8 or 4 bits: code * scale, one scale for every `group` neighbouring inputs of an output.

    codes: int8 [out, in], or for 4 bits int32 [out, in / 8]. Such a word has code + 8 of eight inputs, 2i and 2i + 1 of them
    from bits 4i and 4i + 16 on: a shift and a mask leave two neighbours in its two halves, as a GPU multiplies them.
    scales: bfloat16 [out, in / group]. Survey A III.C · B 3.2.1 · C KV Cache Optimization: Compression Techniques.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in); of a stack (number, out, in)."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * (1 if self.bits == 8 else 8)

    def __getitem__(self, i: int) -> LowBitWeight:
        """Weight i of a stack; no copy."""
        return LowBitWeight(self.codes[i], self.scales[i])

    def __setitem__(self, i: int, weight: LowBitWeight) -> None:
        """Put a weight into a stack."""
        self.codes[i], self.scales[i] = weight.codes, weight.scales

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that this stands for, [out, in]."""
        codes = self.codes
        _, cuda = compiled(codes.new_empty(0, dtype=dtype))
        if cuda:
            out, group = codes.new_empty(self.shape, dtype=dtype), self.shape[1] // self.scales.shape[1]
            vectors = out.numel() // (N := math.gcd(group, 8))
            cuda("dequantize", (-(-vectors // 1024),), 256, codes, self.scales, out, vectors, group, BITS=self.bits, N=N)
            return out
        if self.bits == 4:
            codes = ((codes[..., None] >> _shifts(codes)) & 15).flatten(1) - 8
        grouped = codes.float().view(len(codes), self.scales.shape[1], -1)
        return (grouped * self.scales.float()[..., None]).flatten(1).to(dtype)


def quantize(weight: torch.Tensor, bits: int, group: int | None = None) -> LowBitWeight:
    """Round a weight [out, in] to the nearest of 2^bits - 1 evenly spaced values, in groups that share a scale.

    bits 8, by default one group per output; bits 4, by default groups of 32 (64 and 128 are usual too). ValueError if the
    groups do not divide the inputs. Survey B 3.2.1 (arXiv:2208.07339 for what 8 bits per channel cost).
    """
    group = group or (weight.shape[1] if bits == 8 else 32)
    if bits not in (8, 4) or weight.shape[1] % group or (bits == 4 and group % 32):
        raise ValueError(f"quantize: {bits} bits in groups of {group} do not fit a weight with {weight.shape[1]} inputs "
                         f"(8 bits: any divisor; 4 bits: a divisor that is a multiple of 32)")
    parts = []
    for rows in weight.split(1024):  # in parts: the temporaries are wider than the weight
        codes, scales = _to_codes(rows.view(len(rows), -1, group), 2 ** (bits - 1) - 1)
        if bits == 4:
            codes = ((codes.long() + 8).view(len(rows), -1, 8) << _shifts(codes)).sum(-1).to(torch.int32)
        parts.append((codes.flatten(1), scales))
    return LowBitWeight(*(torch.cat(tensors) for tensors in zip(*parts)))


def _to_codes(x, most) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from -most to most, int8 [..., n], and their scales, bfloat16 [...]: x is about codes * scales."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The scale is rounded before it divides, so the codes suit the scale that they will be multiplied by, and its rounding
    # costs nothing. The largest entry moves from 127 to 127.25 at most: still 127.
    scales = (wide.abs().amax(-1) / most).clamp(min=1e-30).bfloat16()
    return (wide / scales.to(wide.dtype)[..., None]).round().to(torch.int8), scales


def _shifts(codes):
    """Where in its word each of eight codes lies. Computed on the device: a graph cannot capture a copy from the host."""
    i = torch.arange(8, dtype=torch.int32, device=codes.device)
    return i // 2 * 4 + i % 2 * 16


SIGNS = -0x77777778  # 0x88888888 as an int32: flipping the top bit of each four turns code + 8 into the code, and back


@dataclass
class PanelWeight:
    """A weight in panels of 32 outputs, for the CPU: words [out / 32, words of an output, 32], padded with zeros.

    A panel is read from front to end, 32 products for each input, while memory already brings the next piece of it. A
    word is a float32, an int32 of two bfloat16, an int16 of two 8-bit codes, or an int32 of eight 4-bit codes (in two's
    complement, where LowBitWeight has code + 8). scales: float32 [out / 32, groups, 32] for codes.
    """

    words: torch.Tensor
    scales: torch.Tensor | None
    bits: int
    shape: tuple[int, int]  # (out, in)

    @classmethod
    def pack(cls, weight: torch.Tensor | LowBitWeight) -> PanelWeight:
        """From a float32, bfloat16 or low-bit weight [out, in]."""
        low = isinstance(weight, LowBitWeight)
        words, bits = (weight.codes, weight.bits) if low else (weight, 8 * weight.itemsize)
        if bits == 4:
            words = words ^ SIGNS
        elif bits < 32:  # two to a word
            words = (F.pad(words, (0, 1)) if words.shape[1] % 2 else words).flatten()
            words = words.view(torch.int16 if bits == 8 else torch.int32).view(weight.shape[0], -1)
        return cls(to_panels(words), to_panels(weight.scales.float()) if low else None, bits, tuple(weight.shape))

    def unpack(self) -> torch.Tensor | LowBitWeight:
        """What was packed."""
        words = from_panels(self.words, self.shape[0])
        if self.bits == 4:
            words = words ^ SIGNS
        elif self.bits < 32:
            words = words.view(torch.int8 if self.bits == 8 else torch.bfloat16)[:, : self.shape[1]].contiguous()
        return words if self.scales is None else LowBitWeight(words, from_panels(self.scales, self.shape[0]).bfloat16())


def to_panels(rows: torch.Tensor) -> torch.Tensor:
    """[out, n] -> [out / 32 rounded up, n, 32]: the same column of 32 outputs side by side."""
    panels = rows.new_zeros(-(-len(rows) // 32), rows.shape[1], 32)
    for panel, part in zip(panels, rows.split(32)):
        panel[:, : len(part)] = part.T
    return panels


def from_panels(panels: torch.Tensor, outputs: int) -> torch.Tensor:
    """What `to_panels` was given."""
    rows = panels.transpose(1, 2).flatten(0, 1)[:outputs]
    return rows.clone(memory_format=torch.contiguous_format)  # so that it can be viewed in another dtype, one column too


def pack_weight(weight: torch.Tensor | LowBitWeight, dtype: torch.dtype | None = None
                ) -> torch.Tensor | PanelWeight | LowBitWeight:
    """Reorder a weight [out, in], once, into the layout that `linear` is fastest with; as it is where there is none.

    dtype: that of the inputs, by default the weight's own (for codes float32). On a CPU with a C++ compiler: panels, for
    codes of 8 or 4 bits and, with AVX-512, for float32 and bfloat16 (not bfloat16 where oneDNN has AMX for it). Else
    oneDNN's blocked layout; F.linear would do that reordering inside every call.
    """
    if isinstance(weight, LowBitWeight):
        cpp, _ = compiled(torch.empty(0, dtype=dtype or torch.float32, device=weight.codes.device))
        group = weight.shape[1] // weight.scales.shape[1]  # no word may lie in two groups
        return PanelWeight.pack(weight) if cpp and (group % 2 == 0 or group == weight.shape[1]) else weight
    if (weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16)
            or dtype not in (None, weight.dtype)):
        return weight
    cpp, _ = compiled(weight)
    if weight.dtype == torch.float32:
        fast = cpp and torch.backends.cpu.get_cpu_capability() == "AVX512"
    else:
        fast = cpp and hasattr(cpp.library, "multiplies_pairs") and not torch.cpu._is_amx_tile_supported()
    if fast:
        return PanelWeight.pack(weight)
    if (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        return torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return weight


@or_definition
def linear(x: torch.Tensor, weight: torch.Tensor | PanelWeight | LowBitWeight, bias: torch.Tensor | None = None,
           gelu: bool = False) -> torch.Tensor:
    """x [T, in] times weight [out, in], transposed, plus bias [out]; then GELU (tanh form) if asked. Returns [T, out]."""
    if isinstance(weight, PanelWeight):
        cpp, _ = compiled(x, bias)
        if cpp and weight.bits in (4, 8, 8 * x.itemsize):
            x, (outputs, inputs) = x.contiguous(), weight.shape
            assert x.shape[1] == inputs, (x.shape, weight.shape)  # C++ would read whatever lies there
            out, groups = x.new_empty(len(x), outputs), 1 if weight.scales is None else weight.scales.shape[1]
            sizes = len(x), outputs, inputs, groups, weight.bits
            cpp("panel_linear", x, weight.words, weight.scales, bias, out, *sizes, gelu)
            return out
        weight = weight.unpack()  # C++ was turned off, or has no body for x's dtype
        weight = weight.to(x.dtype) if isinstance(weight, torch.Tensor) else weight
    if isinstance(weight, LowBitWeight):
        y = _low_bit_linear(x, weight)
        y = y if bias is None else y + bias
    elif weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")
    else:
        y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _low_bit_linear(x, weight):
    """For few rows the weight is read as it is and widened on the way, for many it is widened first. 64: see the kernel."""
    cuda = _kernel_for(x, weight) if len(x) <= 64 else None
    return _few_rows_linear(cuda, x, weight) if cuda else F.linear(x, weight.dequantize(x.dtype))


def _kernel_for(x, weight) -> CudaKernels | None:
    """Where CUDA["few_rows_linear"] can multiply x by such a weight or a stack of them: low-bit, or of x's dtype."""
    low = isinstance(weight, LowBitWeight)
    plain = isinstance(weight, torch.Tensor) and weight.dtype == x.dtype and not weight.is_mkldnn
    if x.element_size() != 2 or not (low or plain):
        return None
    step = 512 // (weight.bits if low else 16)  # inputs that a warp takes at a time
    fits = weight.shape[-1] % step == 0 and (step != 64 or weight.scales.shape[-1] == 1)
    return compiled(x)[1] if fits else None


def _few_rows_linear(cuda, x, weight, ends=None):
    """CUDA["few_rows_linear"]: x [T, in] times weight [out, in], or, with `ends`, weights [E, out, in]; transposed."""
    low, rows, (outputs, inputs) = isinstance(weight, LowBitWeight), len(x), weight.shape[-2:]
    E = 1 if ends is None else len(ends)
    bits, codes, scales = (weight.bits, weight.codes, weight.scales) if low else (16, weight, None)
    R, alone = 8 if rows <= 8 * E else 16, rows <= E  # alone: few rows, hardly two of them with the same weight
    blocks = -(-rows // R) if ends is None else rows if alone else rows // R + E
    x, out = x.contiguous(), x.new_empty(rows, outputs)
    cuda("few_rows_linear", (blocks, -(-outputs // (2 * R))), 256, x, codes, scales, out, rows, outputs, inputs, ends, E,
         alone, BITS=bits, GROUP=inputs // scales.shape[-1] if bits == 4 else 1, ROWS=R)
    return out


@or_definition
def mixture_of_experts(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up, down) -> torch.Tensor:
    """Send every token through its K experts and add up their outputs, weighted.

    x [T, H], experts [T, K] int64 and float32 weights [T, K] from the router. gate_up [E, 2I, H] and down [E, H, I], as
    `stack_experts` has them: grouped products over all experts, and up to `most_pairs` the host need not know which token
    chose which; else each expert that was chosen runs once, over all its tokens. Returns [T, H]. Survey B 3.1.2 · C MoE.
    (arXiv:2101.03961)
    """
    if 0 < experts.numel() <= most_pairs(gate_up, down):
        order = experts.flatten().argsort(stable=True)  # pairs of token and choice, those of the first expert first
        each = torch.arange(gate_up.shape[0], device=x.device)
        ends = torch.searchsorted(experts.flatten()[order], each, right=True).int()
        y = silu_mul(_grouped_linear(x[order // experts.shape[1]], gate_up, ends))
        y = _grouped_linear(y, down, ends)[order.argsort()].view(*experts.shape, -1)
        return (y * weights[..., None]).sum(1).to(x.dtype)
    out = torch.zeros_like(x)
    for e in experts.unique().tolist():
        rows, choice = (experts == e).nonzero(as_tuple=True)
        y = linear(silu_mul(linear(x[rows], gate_up[e])), down[e])
        out.index_add_(0, rows, (y * weights[rows, choice, None]).to(x.dtype))
    return out


def _grouped_linear(x, weight, ends):
    """x [P, in] times weights [E, out, in], transposed: rows ends[e - 1] to ends[e] - 1 by weight e. Returns [P, out]."""
    if can_group(weight[0]) or not (cuda := _kernel_for(x, weight)):
        return F.grouped_mm(x, weight.mT, offs=ends)
    return _few_rows_linear(cuda, x, weight, ends)


def stack_experts(weight: torch.Tensor | PanelWeight | LowBitWeight, n: int, x: torch.Tensor):
    """Room for n weights like this one, for `mixture_of_experts` of inputs like x: a stack on a GPU from sm_80 on, in 16
    bits, in rows that `few_rows_linear` takes; else a list. So for float32: the only product that it has takes one weight.
    """
    if not can_group(weight) and not _kernel_for(x, weight):
        return [None] * n
    if isinstance(weight, LowBitWeight):
        return LowBitWeight(*(t.new_empty(n, *t.shape) for t in (weight.codes, weight.scales)))
    return weight.new_empty(n, *weight.shape)


def most_pairs(gate_up, down) -> int:
    """For how many pairs of token and choice `mixture_of_experts` is grouped products; graphs capture no others. Torch's
    take any number, those of `few_rows_linear` 64 for an expert, 16 in 16 bits: with more, `linear` moves less.
    """
    if isinstance(gate_up, list) or isinstance(down, list):
        return 0
    if can_group(gate_up[0]) and can_group(down[0]):
        return sys.maxsize
    if not use_cuda:
        return 0
    return (64 if isinstance(gate_up, LowBitWeight) else 16) * gate_up.shape[0]


def can_group(weight: torch.Tensor | PanelWeight | LowBitWeight) -> bool:
    """Whether torch has a grouped product by weights like this one: bfloat16 in rows of whole 16 bytes, on a GPU for which
    it has a kernel (sm_90, sm_100). On others it copies `offs` to the host, which no graph can capture.
    """
    return (isinstance(weight, torch.Tensor) and weight.device.type == "cuda" and weight.dtype == torch.bfloat16
            and not any(size % 8 for size in weight.shape) and torch.cuda.get_device_capability(weight.device)[0] in (9, 10))


# ---------------------------------------------------------------------------------------------------------------------
# Between the matrix products
# ---------------------------------------------------------------------------------------------------------------------


@or_definition
def add_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
             eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise it: (norm(x + delta), x + delta), each [T, H].

    RMSNorm, or LayerNorm where there is a bias. In at least float32, whatever the dtype of x.
    """
    cpp, cuda = compiled(x, delta, weight, bias)
    if cpp or cuda:
        x, delta = x.contiguous(), delta if delta is None else delta.contiguous()
        out = torch.empty_like(x)
        total = x if delta is None else torch.empty_like(x)
        rows, cols = x.shape
        if cpp:
            cpp("add_norm", x, delta, weight, bias, out, total, rows, cols, eps)
        else:
            N = vector_width(cols, x, delta, weight, bias)
            cuda("add_norm", (rows,), threads(cols // N), x, delta, weight, bias, out, total, cols, float(eps), N=N)
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


@or_definition
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's middle (arXiv:2002.05202): gate_up [T, 2I] holds the gates, then the values; silu(gate) * up, [T, I]."""
    cpp, cuda = compiled(gate_up)
    if cpp or cuda:
        gate_up = gate_up.contiguous()
        rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, cols)
        if cpp:
            cpp("silu_mul", gate_up, out, rows, cols)
        else:
            N = vector_width(cols, gate_up, out)
            block = min(256, threads(cols // N))
            cuda("silu_mul", (rows, -(-cols // (N * block))), block, gate_up, out, cols, N=N)
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
    factor, keep, scale = rope.get("factor"), 0.0, 1.0  # keep: the share of an angle that is not stretched
    if kind == "llama3":
        # Angles that make many turns over the original context are kept, slow ones are stretched, with a ramp between.
        turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        original = rope["original_max_position_embeddings"]

        def dimension(turns):  # index of the pair that makes so many turns over the original context
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        keep = 1 - ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        scale = _yarn_scale(rope, factor)
    elif kind != "linear":
        raise ValueError(f"rope_type: {kind!r} is not supported (default, linear, llama3, yarn are)")
    return inv / factor * (1 - keep) + inv * keep, scale


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


@or_definition
def rope_and_write_kv(qkv: torch.Tensor, num_heads: int, positions: torch.Tensor, slots: torch.Tensor,
                      table: torch.Tensor | None, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
                      k_cache: torch.Tensor, v_cache: torch.Tensor,
                      scales: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Everything between the q/k/v product and attention: split, normalise q and k per head, rotate, store k and v.

    qkv [T, (Hq + 2 Hkv) * D]; positions, slots [T] int64, a slot being block * block_size + offset; table from
    `rope_table`, None for models with learned positions; q_norm, k_norm [D] or None. Returns q [T, Hq, D], which may be
    a view of qkv.
    """
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    cpp, cuda = compiled(qkv, q_norm, k_norm, cache=k_cache)
    if (cpp or cuda) and qkv.is_contiguous():
        tensors = qkv, positions, slots, table, q_norm, k_norm, k_cache, v_cache, *(scales or (None, None))
        if cpp:
            cache_bits = 8 * k_cache.itemsize
            cpp("rope_and_write_kv", *tensors, len(qkv), num_heads, kv_heads, head_dim, block_size, cache_bits, eps)
        else:
            heads = num_heads + 2 * kv_heads
            cuda("rope_and_write_kv", (len(qkv), -(-heads // 4)), 128, *tensors, num_heads, kv_heads, block_size, float(eps),
                 D=head_dim, INT8=int(scales is not None))
        return qkv.view(len(qkv), -1, head_dim)[:, :num_heads]
    q, k, v = qkv.view(qkv.shape[0], -1, head_dim).split([num_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if table is not None:
        q, k = apply_rope(q, table[positions]), apply_rope(k, table[positions])
    write_kv(k, v, k_cache, v_cache, slots, scales)
    return q


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
             scales: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
    """Store k, v [T, Hkv, D] at slots [T] int64 of the paged cache. Survey A III.A · B 3.2.3."""
    for x, cache, scale in zip((k, v), (k_cache, v_cache), scales or (None, None)):
        if scale is not None:
            block_size = cache.shape[1]
            x, scale[slots // block_size, :, slots % block_size] = quantize_kv(x)
        cache.view(-1, *cache.shape[2:])[slots] = x.to(cache.dtype)


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token's keys or values x [T, Hkv, D], head by head, to 255 evenly spaced values around 0.

    Returns codes int8 [T, Hkv, D] and scales bfloat16 [T, Hkv]; x is about codes * scales. A scale depends on its own
    row only, so what a token leaves in the cache does not depend on when, or beside whom, it is computed.
    Survey A III.C · B 3.2.1 · C KV Cache Optimization: Compression Techniques. (arXiv:2402.02750 for other groupings)
    """
    return _to_codes(x, 127)


@or_definition
def paged_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
                    context_lens: torch.Tensor, query_start: torch.Tensor, scale: float, window: int = 0,
                    scales: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Causal attention of a ragged batch over the paged cache: any mix of query lengths in one call. Returns [T, Hq, D].

    The n > 0 queries of a request are its last n positions, so query i of n stands at position context_len - n + i and
    sees the keys up to there; with a `window` only the last `window` of them, itself included. Query head h reads
    key/value head h // (Hq // Hkv). Softmax in at least float32. Survey A III.A · B 3.2.3, 3.2.5. (arXiv:2309.06180)

    An int8 cache needs no dequantized copy: a key has one scale, so its score is multiplied by that instead, and the
    probability by the scale of the value that it weighs.
    """
    T, num_heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    cpp, cuda = compiled(q, cache=k_cache)
    if (cpp or cuda) and q.stride()[1:] == (head_dim, 1):
        caches = k_cache, v_cache, *(scales or (None, None))
        tables = [t.to(torch.int32).contiguous() for t in (block_tables, context_lens, query_start)]
        if cpp:
            out = q.new_empty(T, num_heads, head_dim)
            cpp("paged_attention", q, *caches, *tables, out, len(context_lens), block_tables.shape[1], block_size,
                num_heads, kv_heads, head_dim, q.stride(0), window, 8 * k_cache.itemsize, scale)
            return out
        shapes = T, *block_tables.shape, block_size, head_dim, q.itemsize
        if q.is_cuda and use_flash and scales is None and is_for_flash(*shapes):
            with _without_flash_if_it_fails():
                return _flash_attention(q, k_cache, v_cache, *tables, scale, window)
        if has_cuda_attention(head_dim):
            return _paged_attention_cuda(cuda, q, *caches, *tables, scale, window)
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
        if scales:  # [Hkv, 1, 1, length]
            k_scale, v_scale = (s[blocks].transpose(0, 1).flatten(1)[:, None, None, :length].to(wide) for s in scales)
            scores = scores * k_scale
        probs = scores.masked_fill(~visible, -math.inf).softmax(-1)
        probs = probs * v_scale if scales else probs
        out[start:end] = torch.einsum("hgnl,lhd->nhgd", probs, v).reshape(end - start, num_heads, head_dim).to(q.dtype)
    return out


def has_cuda_attention(head_dim: int) -> bool:
    """Whether the CUDA bodies of attention take this head size: beyond 256 a tile's sums leave the registers."""
    return head_dim % 16 == 0 and head_dim <= 256


def _paged_attention_cuda(cuda, q, k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, query_start, scale,
                          window):
    (T, heads, head_dim), (B, M), (block_size, kv_heads) = q.shape, block_tables.shape, k_cache.shape[1:3]
    group, out = heads // kv_heads, q.new_empty(T, heads, head_dim)
    # `tiled_attention` takes the requests with more queries than one of its tiles holds. For the others, one block per kv
    # head would go through all keys, so `paged_attention` takes them: it splits the keys and keeps the whole GPU busy. Only
    # the device knows how many queries a request has, so both kernels look, and skip the other's; shapes give a bound.
    max_queries, rows = T - B + 1, 128 if head_dim <= 128 else 64
    few = max(1, rows // group)
    int8, caches = int(k_scales is not None), (k_cache, v_cache, k_scales, v_scales)
    if use_tiles and max_queries > few and q.element_size() == 2 and scale > 0:
        tiles = T * group // rows + min(B, (T - B) // few)  # the kernel's first_tile(B)
        cuda("tiled_attention", (tiles, kv_heads), 128, q, *caches, block_tables, context_lens, query_start, out, B, M,
             block_size, few, heads, kv_heads, q.stride(0), window, float(scale), D=head_dim, ROWS=rows, INT8=int8,
             SHARED=(rows + 2 * 64) * (head_dim + 8) * 2)
        if B == 1:
            return out
        max_queries = few
    # Tiles of 16 rows where requests may have more than 8, and where the registers hold their sums.
    R = 16 if (T > B or group > 8) and q.element_size() == 2 and head_dim <= 128 else 8
    tiles = min(T * group // R + B, B * -(-max_queries * group // R))  # likewise
    blocks = blocks_at_once(head_dim, R, q.element_size(), int8)
    constants = {"D": head_dim, "R": R, "DECODE": int(T == B and group <= R), "INT8": int8, "BLOCKS": blocks}
    splits = _splits(B, tiles * kv_heads, M * block_size, cuda.num_sms, blocks * cuda.num_sms)
    sums, stats, sum_tokens = None, None, min(T, B * max_queries)
    if splits > 1:
        sums, stats = (q.new_empty(splits, sum_tokens, heads, n, dtype=torch.float32) for n in (head_dim, 2))
    cuda("paged_attention", (tiles, kv_heads, splits), 128, q, *caches, block_tables, context_lens, query_start, out, sums,
         stats, B, M, block_size, max_queries, sum_tokens, heads, kv_heads, q.stride(0), window, float(scale), **constants)
    if splits > 1:
        cuda("combine_splits", (sum_tokens * heads,), 32 * min(16, splits), sums, stats, query_start, out, B, max_queries,
             heads, splits, **constants)
    return out


def is_for_flash(T: int, B: int, M: int, block_size: int, head_dim: int, itemsize: int) -> bool:
    """Whether torch's FlashAttention shall take a batch of these shapes: many queries for a request, and not many more
    keys than queries, as all keys that the block tables have room for are gathered.
    """
    return itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256 and T >= 64 * B and B * M * block_size <= 4 * T


def _flash_attention(q, k_cache, v_cache, block_tables, context_lens, query_start, scale, window):
    """It wants each request's keys right behind those of the one before, so they are gathered; how many there are only the
    device knows, so beyond the last one whatever lies there comes along, and is not looked at.
    """
    from torch.nn.attention.varlen import varlen_attn

    (B, M), block_size = block_tables.shape, k_cache.shape[1]
    key_start = F.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    i = torch.arange(B * M * block_size, dtype=torch.int32, device=q.device)
    request = torch.searchsorted(key_start[1:], i, right=True).clamp(max=B - 1)
    position = (i - key_start[request]).clamp(max=M * block_size - 1)
    slots = block_tables[request, position // block_size].long() * block_size + position % block_size
    k, v = (cache.flatten(0, 1)[slots] for cache in (k_cache, v_cache))
    return varlen_attn(q, k, v, query_start, key_start, len(q) - B + 1, M * block_size, scale=scale,
                       window_size=(window - 1, 0), **_flash_options(varlen_attn))


@functools.cache
def _flash_options(varlen_attn) -> dict[str, bool]:
    """Torch 2.11 takes groups of query heads as they are, later versions want to be told."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@contextlib.contextmanager
def _without_flash_if_it_fails():
    """As where torch was built without it, or it is not made for this GPU: from then on this file's kernels run. Where there
    is no memory to gather the keys, they run this time.
    """
    global use_flash
    try:
        yield
    except torch.OutOfMemoryError:
        pass
    except (ImportError, TypeError, RuntimeError) as error:
        use_flash = False
        warnings.warn(f"torch's FlashAttention does not run here, a kernel of nanoserve's does: {error}", stacklevel=3)


def blocks_at_once(D: int, R: int, itemsize: int, int8: int) -> int:
    """How many blocks of `paged_attention` a multiprocessor has room for: the compiler gives each so few registers."""
    return 2 if R == 16 or D > 128 or itemsize == 4 else 4 if int8 else 3


@functools.lru_cache(4096)
def _splits(requests, blocks, keys, num_sms, at_once):
    """How often to split `blocks` blocks of `paged_attention` with up to `keys` keys each, if `at_once` of them run at once.

    From shapes alone, so that a captured graph can be replayed. All in times that a block takes for one key: a wave of
    blocks takes as long as one of them; a last wave that is not full less than that, but more than its share. To begin
    and end, a block takes as long as for some 64 keys, and so does `combine_splits`.
    """
    def cost(splits):
        waves = blocks * splits / at_once
        return (waves + math.ceil(waves)) / 2 * keys / splits + 64 * (math.ceil(waves) + (splits > 1))

    # At least 256 keys to a split, and no more sums than 16 blocks for each multiprocessor write. Requests differ in length:
    # several get two waves at least, so that there is something to do where a short one has ended.
    most = max(1, min(16 * num_sms // max(1, blocks), keys // 256))
    fewest = 1 if requests == 1 else min(most, -(-2 * at_once // max(1, blocks)))
    return min(range(fewest, most + 1), key=cost)


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token
# ---------------------------------------------------------------------------------------------------------------------


def edit_logits(logits: torch.Tensor, starts: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
    """A copy of logits [S, V], in float32 or wider, with single entries changed, as biases, bans and penalties do.

    edits: [N, 4], float64 where the device has it; those of row i are edits[starts[i]:starts[i + 1]]. starts: [S + 1] int64.
    The columns are token, bias, divide and subtract: the token's logit gets bias added (-inf bans it), is moved towards
    "unlikely" by the factor divide (repetition penalty: positive logits are divided, negative ones multiplied,
    arXiv:1909.05858), and loses subtract (presence and frequency penalty). No row may name a token twice.
    """
    cpp, _ = compiled(logits)
    if cpp and logits.stride(1) == 1:
        out = torch.empty(logits.shape)
        cpp("edit_logits", logits, starts.long(), edits.double().contiguous(), out, *logits.shape, logits.stride(0))
        return out
    out = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    tokens, bias, divide, subtract = edits.unbind(1)
    rows = torch.arange(len(out), device=out.device).repeat_interleave(starts.diff(), output_size=len(edits))
    entries, at = out.view(-1), rows * out.shape[1] + tokens.long()
    picked = entries[at] + bias
    entries[at] = (torch.where(picked > 0, picked / divide, picked * divide) - subtract).to(out.dtype)
    return out


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
    needs_top_p = bool((top_p < 1).any())
    if needs_top_p or (top_k > 0).any():
        size = min(V, max(int(top_k.max()), 256 if needs_top_p else 1))
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
    if (min_p > 0).any():
        logits = logits.masked_fill(logits < min_p.log()[:, None], -math.inf)
    return logits.softmax(-1)


@or_definition
def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
           min_p: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one token per row of logits [S, V]; temperature 0 is argmax, row by row. Returns [S] int64.

    `noise` [S] in [0, 1), float64 where the device has it, is all the randomness there is: the token is where the
    cumulative probability passes it. So a row's token depends on that row alone, not on its neighbours or on how often
    anybody sampled before. A row that makes no sense (NaN, infinity, or nothing left to choose) gets -1.
    """
    cpp, cuda = compiled(logits)
    if (cpp or cuda) and logits.stride(1) == 1:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        settings = temperature.float(), top_k.long(), top_p.float(), min_p.float(), noise.double()
        tensors = logits, *(t.contiguous() for t in settings), tokens
        if cpp:
            cpp("sample", *tensors, *logits.shape, logits.stride(0))
        else:
            cuda("sample", (len(logits),), 1024, *tensors, logits.shape[1], logits.stride(0))
        return tokens
    best, tokens = logits.max(-1)
    finite = best.float().isfinite()  # as probabilities are float32, whatever the logits are
    drawn = (finite & (temperature > 0)).nonzero()[:, 0]
    if len(drawn):
        rows = (t[drawn] for t in (logits, temperature, top_k, top_p, min_p))
        mass, noise = token_probabilities(*rows).to(noise.dtype).cumsum(-1), noise[drawn]
        # right=True finds the first entry *beyond* the target, which is never a token of probability zero.
        picked = torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)[:, 0]
        tokens[drawn] = picked.clamp(max=logits.shape[-1] - 1)
    return tokens.masked_fill_(~finite, -1)


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
# Files in the user's cache folder
# ---------------------------------------------------------------------------------------------------------------------


def cache_file(name: str, suffix: str, *depends: str) -> Path:
    """A path in the user's cache folder, with a hash in its name of everything that the file depends on."""
    key = hashlib.sha256("\0".join(depends).encode()).hexdigest()[:16]
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers: in no folder at all
        folder = os.devnull
    return Path(folder) / "nanoserve" / f"{name}-{key}{suffix}"


@contextlib.contextmanager
def new_file(target: Path):
    """A path to write to, renamed to `target` at the end, in one move: another process may be writing the same file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        yield (path := Path(scratch) / target.name)
        path.replace(target)


# ---------------------------------------------------------------------------------------------------------------------
# C++ for the CPU: building and calling
# ---------------------------------------------------------------------------------------------------------------------

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_CPP_ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16"}


class CppLibrary:
    """CPU_SOURCE built for one element type; calling it with a function's name and arguments runs that function."""

    signatures = {
        "add_norm": [_P] * 6 + [_I] * 2 + [_F],
        "silu_mul": [_P] * 2 + [_I] * 2,
        "rope_and_write_kv": [_P] * 10 + [_I] * 6 + [_F],
        "paged_attention": [_P] * 9 + [_I] * 9 + [_F],
        "panel_linear": [_P] * 5 + [_I] * 6,
        "edit_logits": [_P] * 4 + [_I] * 3,
        "sample": [_P] * 7 + [_I] * 3,
    }

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        for name, arguments in self.signatures.items():
            getattr(self.library, name).argtypes = arguments

    def __call__(self, name: str, *args) -> None:
        getattr(self.library, name)(*(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args))


def cpp_compiler() -> str | None:
    """The system's C++ compiler, which CXX may name with a word before it or after it, such as "ccache g++"."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


@functools.cache
def cpp_library(dtype: torch.dtype) -> CppLibrary | None:
    """The C++ bodies for one dtype, built when first asked for; None without a compiler and, warning once, if that fails."""
    if not (compiler := cpp_compiler()):
        return None
    try:
        return CppLibrary(_build_cpu_source(compiler, _CPP_ELEMENTS[dtype]))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: CXX has a quote that does not end
        log = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"the C++ kernels could not be built, PyTorch runs instead (slower): {log}", stacklevel=2)
        return None


def build_library(name: str, compiler: str, flags: list[str], source: str, *depends: str) -> Path:
    """The shared library of a C++ source, built unless the cache folder has it. depends: what else it depends on."""
    command = [*shlex.split(compiler), *flags, "-shared", "-fPIC", "-x", "c++", "-"]
    target = cache_file(name, ".so", source, *command, *depends)
    if not target.exists():
        with new_file(target) as path:
            subprocess.run([*command, "-o", str(path)], input=source, text=True, check=True, capture_output=True,
                           timeout=300)
    return target


def _build_cpu_source(compiler: str, element: str) -> Path:
    flags = ["-O3", "-std=c++17", "-fno-math-errno", f"-DT={element}"]
    flags += ["-mcpu=native"] if platform.machine().startswith(("arm", "aarch")) else ["-march=native"]
    # OpenMP shares torch's own threads: two thread pools on the same cores would fight. Apple's compiler lacks OpenMP.
    flags += [] if sys.platform == "darwin" else ["-fopenmp"]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return build_library(f"cpu-{element}", compiler, flags, CPU_SOURCE, platform.machine(), cpu)


CPU_SOURCE = r"""
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>
#if defined __AVX512F__ || defined __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
#endif

// Floats in a vector register. GCC accepts longer vectors, too, but does part of their work one number at a time.
#if defined __AVX512F__
constexpr int W = 16;
#elif defined __AVX2__
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
template <class E, int N> struct Vector { typedef E type __attribute__((vector_size(sizeof(E) * N))); };
template <class E, int N = W> using Simd = typename Vector<E, N>::type;
typedef Simd<float> vec;
typedef Simd<int32_t> veci;
typedef Simd<uint32_t> vecu;
typedef Simd<int16_t, 2 * W> short_vec;

struct bf16 { uint16_t bits; };  // the upper half of a float32

// The element type T of every function, float or bf16, comes from the compiler's command line.

static inline float to_float(float x) { return x; }
static inline float to_float(int8_t x) { return x; }
static inline float to_float(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; memcpy(&f, &u, 4); return f; }
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t u; memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline vec load(const bf16* p) {
#if defined __AVX512F__  // the portable code below in two instructions, which GCC does not find
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined __AVX2__
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
    Simd<uint16_t> h; memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, vecu) << 16);
}
static inline vec load(const int8_t* p) {
#if defined __AVX512F__  // likewise
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined __AVX2__
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
    Simd<int8_t> b; memcpy(&b, p, sizeof b);  // in steps: GCC would convert one at a time
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Simd<int16_t>), veci), vec);
}
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
template <int N = W>
static inline float sum(Simd<float, N> v) {  // in halves: one after the other, each addition would wait for the last
    if constexpr (N == 4) {
        return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
        Simd<float, N / 2> x[2]; memcpy(x, &v, sizeof v);
        return sum<N / 2>(x[0] + x[1]);
    }
}
// exp of a float to 2 units in the last place: 2^n times a polynomial on |r| <= ln(2)/2. The compiler vectorizes loops
// over this; over the library's exp it may not.
static inline float exp_(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float shifted = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
    float n = shifted - 12582912.f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.f + r * (1.f + r * (0.5f + r * (0.166666657f + r * (0.0416657962f + r * (0.00833345018f
              + r * 0.00139273646f)))));
    uint32_t bits, power; memcpy(&bits, &shifted, 4);
    power = (bits - 0x4b400000 + 127) << 23;
    float scale; memcpy(&scale, &power, 4);
    return p * scale;
}

constexpr int64_t BIG = 8192;  // elements; for fewer it does not pay to wake the other threads

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
            #pragma omp simd
            for (int64_t c = 0; c < cols; c++) {
                // Rounded as it is stored: the norm must see what the next layer's residual will see.
                if (delta) put(&tr[c], to_float(xr[c]) + to_float(dr[c]));
                row[c] = delta ? to_float(tr[c]) : to_float(xr[c]);
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

// Codes of D numbers, and their scale, rounded to bf16 before it divides.
static void quantize(const float* x, int64_t D, int8_t* codes, bf16* scale) {
    uint32_t largest = 0;  // without signs, floats sort like their bits, and NaN, which has to show, above all
    #pragma omp simd reduction(max : largest)
    for (int64_t d = 0; d < D; d++) {
        uint32_t bits; memcpy(&bits, &x[d], 4);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    float step; memcpy(&step, &largest, 4);
    step /= 127;
    put(scale, step < 1e-30f ? 1e-30f : step);
    step = to_float(*scale);
    #pragma omp simd
    for (int64_t d = 0; d < D; d++) {
        float shifted = x[d] / step + 12582912.f;  // rounds to an integer in the low bits, as in exp_
        uint32_t bits; memcpy(&bits, &shifted, 4);
        codes[d] = int8_t(bits);
    }
}
// ---- Per token: normalise each head of q and k, rotate it, leave q in place, store k and v in their slot.
extern "C" void rope_and_write_kv(T* qkv, const int64_t* positions, const int64_t* slots, const float* table,
                                  const T* q_norm, const T* k_norm, void* k_cache, void* v_cache, bf16* k_scales,
                                  bf16* v_scales, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t D,
                                  int64_t block_size, int64_t cache_bits, float eps) {
    int64_t width = (heads + 2 * kv_heads) * D, half = D / 2;
    #pragma omp parallel if (tokens * width > BIG)
    {
        std::vector<float> scratch(2 * D);
        float *__restrict x = scratch.data(), *__restrict wide = x + D;
        #pragma omp for
        for (int64_t t = 0; t < tokens; t++) {
            int64_t block = slots[t] / block_size, first_scale = block * kv_heads * block_size + slots[t] % block_size;
            for (int64_t h = 0; h < heads + kv_heads; h++) {
                T* head = qkv + t * width + h * D;
                const T* norm = h < heads ? q_norm : k_norm;
                for (int64_t d = 0; d < D; d++) x[d] = to_float(head[d]);
                if (norm) {
                    float ss = 0;
                    #pragma omp simd reduction(+ : ss)
                    for (int64_t d = 0; d < D; d++) ss += x[d] * x[d];
                    float inv = 1 / std::sqrt(ss / D + eps);
                    for (int64_t d = 0; d < D; d++) x[d] *= inv * to_float(norm[d]);
                }
                auto rotate = [&](auto* to) {
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
                };
                int64_t place = (slots[t] * kv_heads + h - heads) * D;
                if (h < heads) {
                    rotate(head);
                } else if (k_scales) {
                    rotate(wide);
                    quantize(wide, D, (int8_t*)k_cache + place, k_scales + first_scale + (h - heads) * block_size);
                } else if (cache_bits == 16) {
                    rotate((bf16*)k_cache + place);
                } else {
                    rotate((T*)k_cache + place);
                }
            }
            const T* v = qkv + t * width + (heads + kv_heads) * D;
            int64_t row = slots[t] * kv_heads * D;
            if (cache_bits == 8 * sizeof(T)) std::copy(v, v + kv_heads * D, (T*)v_cache + row);
            else if (!v_scales) for (int64_t d = 0; d < kv_heads * D; d++) put((bf16*)v_cache + row + d, to_float(v[d]));
            else for (int64_t h = 0; h < kv_heads; h++) {
                for (int64_t d = 0; d < D; d++) wide[d] = to_float(v[h * D + d]);
                quantize(wide, D, (int8_t*)v_cache + (slots[t] * kv_heads + h) * D, v_scales + first_scale + h * block_size);
            }
        }
    }
}

// ---- out = x W^T + bias, then GELU if asked. W lies in panels of 32 outputs, [outputs / 32, words, 32]; a word holds one
// input of an output or several neighbouring ones. A panel is read once for 56 rows, from front to end: a piece of it is
// multiplied with all of them, in tiles of up to 14 rows by 32 outputs (whose sums take 28 of AVX-512's 32 registers), which
// prefetch the next piece meanwhile. A row's result does not depend on its neighbours.
constexpr int PANEL = 32, COLS = PANEL / W, PIECE = 256, MOST_ROWS = 56;
#ifdef __AVX512F__
constexpr int TILE = 14;
#else
constexpr int TILE = 3;  // fewer and smaller registers
#endif

// The kinds of words. make_ready turns inputs of a row into what a word is multiplied with, as multiples of a unit that it
// returns. A word has INPUTS inputs, in STEPS operands; add_product multiplies an operand with one Input of a row.
template <class E>
struct Numbers {
    typedef vec Sum;
    static float make_ready(const T* from, void* to, int64_t n) {
        #pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            E y; put(&y, to_float(from[i]));
            memcpy((E*)to + i, &y, sizeof y);  // copied, not assigned: it is read as an Input
        }
        return 1;
    }
};
struct Floats : Numbers<float> {
    typedef float Word; typedef float Input;
    static constexpr int STEPS = 1, INPUTS = 1;
    static vec operand(const Word* w, int) { return load(w); }
    static vec add_product(vec sum, Input x, vec w) { return sum + x * w; }
};
struct Pairs : Numbers<bf16> {  // two to a word: some CPUs multiply and add both in one instruction
    typedef uint32_t Word; typedef uint32_t Input;
    static constexpr int STEPS = 1, INPUTS = 2;
    static vecu operand(const Word* w, int) { vecu u; memcpy(&u, w, sizeof u); return u; }
    static vec add_product(vec sum, Input x, vecu w) {
#ifdef __AVX512BF16__
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
#endif
        vecu xs = vecu{} + x, upper = vecu{} + 0xffff0000;
        return sum + (vec)(xs << 16) * (vec)(w << 16) + (vec)(xs & upper) * (vec)(w & upper);
    }
};
// Codes are multiplied as integers. x is rounded to 16 bits, the largest of its PIECE being 32767: finer than bfloat16 for
// all that is above a 128th of the largest. 256 products of 7 and 15 bits add up to less than 31 bits.
struct Bytes {
    typedef uint16_t Word; typedef uint32_t Input; typedef veci Sum;
    static constexpr int STEPS = 1, INPUTS = 2;
    static float make_ready(const T* from, void* to, int64_t n) {
        float largest = 1e-30f, zero = 0;  // zero: NaN if an input is NaN or infinite, and the unit with it
        #pragma omp simd reduction(max : largest) reduction(+ : zero)
        for (int64_t i = 0; i < n; i++) {
            float y = to_float(from[i]), size = y < 0 ? -y : y;
            largest = size > largest ? size : largest;
            zero += y - y;
        }
        float per_unit = zero == 0 ? 32767 / largest : 0;
        #pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float y = to_float(from[i]) * per_unit;
            int16_t units = int16_t(int32_t((y == y ? y : 0) + 32768.5f) - 32768);
            memcpy((int16_t*)to + i, &units, sizeof units);
        }
        return largest / 32767 + zero;
    }
    static short_vec operand(const Word* w, int) {
#ifdef __AVX512BW__  // the portable code below in one instruction
        return (short_vec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
#endif
        Simd<int8_t, 2 * W> b; memcpy(&b, w, sizeof b);
        return __builtin_convertvector(b, short_vec);
    }
    static veci add_product(veci sum, Input x, short_vec w) {
#ifdef __AVX512VNNI__
        return (veci)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif defined __AVX512BW__
        return sum + (veci)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined __AVX2__ && !defined __AVX512F__
        return sum + (veci)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#endif
        return sum + int16_t(x) * ((veci)w << 16 >> 16) + (int32_t(x) >> 16) * ((veci)w >> 16);
    }
};
struct Nibbles : Bytes {  // inputs 2i and 2i + 1 in bits 4i and 4i + 16
    typedef uint32_t Word;
    static constexpr int STEPS = 4, INPUTS = 8;
    static short_vec operand(const Word* w, int step) {
        vecu u; memcpy(&u, w, sizeof u);
        return (short_vec)(u << (12 - 4 * step)) >> 12;  // shifted out with its sign
    }
};
template <class K> constexpr bool is_code = std::is_same<typename K::Sum, veci>::value;

// R rows of x times n words of 32 columns, added to sums. Codes have a scale per column, and one per row.
template <class K, int R>
static void tile(const typename K::Input* x, int64_t x_stride, const typename K::Word* w, int64_t w_stride, int64_t n,
                 const float* scales, const float* row_scales, float* sums, int64_t stride) {
    typename K::Sum acc[R][COLS] = {};
    for (int64_t i = 0; i < n; i++, w += w_stride) {
        for (int byte = 0; byte < PANEL * int(sizeof *w); byte += 64)
            __builtin_prefetch((const char*)(w + PIECE / K::INPUTS * PANEL) + byte, 0, 2);
        #pragma GCC unroll 4
        for (int step = 0; step < K::STEPS; step++, x++) {
            decltype(K::operand(w, step)) b[COLS];
            #pragma GCC unroll 8
            for (int c = 0; c < COLS; c++) b[c] = K::operand(w + c * W, step);
            #pragma GCC unroll 14
            for (int r = 0; r < R; r++)
                #pragma GCC unroll 8
                for (int c = 0; c < COLS; c++) acc[r][c] = K::add_product(acc[r][c], x[r * x_stride], b[c]);
        }
    }
    for (int c = 0; c < COLS; c++)
        for (int r = 0; r < R; r++) {
            float* to = sums + r * stride + c * W;
            if constexpr (is_code<K>)
                store(to, load(to) + __builtin_convertvector(acc[r][c], vec) * (load(scales + c * W) * row_scales[r]));
            else store(to, load(to) + acc[r][c]);
        }
}
template <class K, int... R>
static constexpr auto tiles_of(std::integer_sequence<int, R...>) {
    return std::array{(decltype(&tile<K, 1>))nullptr, &tile<K, R + 1>...};
}
// The same for any number of rows, in tiles of about one size; tiles[R] is `tile` for R rows.
template <class K>
static void multiply(int64_t rows, const typename K::Input* x, int64_t x_stride, const typename K::Word* w,
                     int64_t w_stride, int64_t n, const float* scales, const float* row_scales, float* sums,
                     int64_t stride) {
    static constexpr auto tiles = tiles_of<K>(std::make_integer_sequence<int, TILE>());
    for (int64_t t = 0, num_tiles = (rows + TILE - 1) / TILE, r = 0, next; t < num_tiles; t++, r = next) {
        next = rows * (t + 1) / num_tiles;
        tiles[next - r](x + r * x_stride, x_stride, w, w_stride, n, scales, row_scales + r, sums + r * stride, stride);
    }
}

template <class K>
static void panels_times(const T* x, const void* panels, const float* scales, const T* bias, T* out, int64_t rows,
                         int64_t outputs, int64_t inputs, int64_t groups, int64_t gelu) {
    typedef typename K::Input Input;
    int64_t num_panels = (outputs + PANEL - 1) / PANEL, words = (inputs + K::INPUTS - 1) / K::INPUTS;
    int64_t per_group = words / groups, per_piece = PIECE / K::INPUTS, num_pieces = (words + per_piece - 1) / per_piece;
    // 16 more than needed: rows a power of two apart would all compete for the same few lines of the cache.
    int64_t stride = words * K::STEPS + 16;
    #pragma omp parallel if (outputs * inputs > BIG)
    {
        std::vector<float> scratch(MOST_ROWS * PANEL), units(MOST_ROWS * num_pieces);
        std::vector<Input> ready(std::min<int64_t>(rows, MOST_ROWS) * stride);
        float* sums = scratch.data();
        for (int64_t row = 0; row < rows; row += MOST_ROWS) {
            int64_t batch = std::min<int64_t>(MOST_ROWS, rows - row);
            for (int64_t r = 0; r < batch; r++)
                for (int64_t i = 0; i < num_pieces; i++)
                    units[i * batch + r] = K::make_ready(x + (row + r) * inputs + i * PIECE,
                                                        ready.data() + r * stride + i * per_piece * K::STEPS,
                                                        std::min<int64_t>(PIECE, inputs - i * PIECE));
            #pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < num_panels; p++) {
                std::fill(sums, sums + batch * PANEL, 0.f);
                for (int64_t k = 0, n; k < words; k += n) {  // to where a piece or a group ends
                    int64_t piece = k / per_piece, g = k / per_group;
                    n = std::min({(piece + 1) * per_piece, (g + 1) * per_group, words}) - k;
                    multiply<K>(batch, ready.data() + k * K::STEPS, stride,
                                (const typename K::Word*)panels + (p * words + k) * PANEL, PANEL, n,
                                scales + (p * groups + g) * PANEL, units.data() + piece * batch, sums, PANEL);
                }
                int64_t first = p * PANEL, count = std::min<int64_t>(PANEL, outputs - first);
                for (int64_t r = 0; r < batch; r++) {
                    T* to = out + (row + r) * outputs + first;
                    float* y = sums + r * PANEL;
                    for (int64_t c = 0; c < count && bias; c++) y[c] += to_float(bias[first + c]);
                    if (gelu)
                        for (int64_t c = 0; c < count; c++)
                            y[c] /= 1 + exp_(-1.5957691216f * (y[c] + 0.044715f * y[c] * y[c] * y[c]));
                    for (int64_t c = 0; c < count; c++) put(&to[c], y[c]);
                }
            }
        }
    }
}
extern "C" void panel_linear(const T* x, const void* panels, const float* scales, const T* bias, T* out, int64_t rows,
                             int64_t outputs, int64_t inputs, int64_t groups, int64_t bits, int64_t gelu) {
    auto product = bits == 32 ? panels_times<Floats> : bits == 16 ? panels_times<Pairs>
                 : bits == 8 ? panels_times<Bytes> : panels_times<Nibbles>;
    product(x, panels, scales, bias, out, rows, outputs, inputs, groups, gelu);
}
#ifdef __AVX512BF16__  // tells `pack_weight`: without this instruction oneDNN is twice as fast
extern "C" void multiplies_pairs() {}
#endif

// ---- A copy of the logits with single entries changed.
extern "C" void edit_logits(const T* logits, const int64_t* starts, const double* edits, float* out, int64_t rows, int64_t V,
                            int64_t stride) {
    #pragma omp parallel for if (rows * V > BIG)
    for (int64_t r = 0; r < rows; r++) {
        const T* from = logits + r * stride;
        float* to = out + r * V;
        for (int64_t i = 0; i < V; i++) to[i] = to_float(from[i]);
        for (const double* edit = edits + 4 * starts[r]; edit < edits + 4 * starts[r + 1]; edit += 4) {
            float& logit = to[(int64_t)edit[0]];
            double picked = logit + edit[1], less = picked / edit[2], more = picked * edit[2];
            logit = float((picked > 0 ? less : more) - edit[3]);
        }
    }
}

// ---- One token per row: the one where the cumulative probability, of those that the filters keep, passes the noise. Each
// filter is a limit on the depth: how far a logit lies below the largest one, after temperature.
static float reach(std::vector<float>& depths, double share) {  // top-p: the depth at which this share is reached
    auto mass = [&](size_t first, size_t last) {
        double sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (size_t i = first; i < last; i++) sum += exp_(-depths[i]);
        return sum;
    };
    size_t first = 0, last = depths.size();
    double wanted = share * mass(first, last);
    while (last - first > 1) {  // halve, as a sort would, but go on only in the half where it is reached
        size_t middle = (first + last) / 2;
        std::nth_element(depths.begin() + first, depths.begin() + middle, depths.begin() + last);
        double half = mass(first, middle);
        if (half >= wanted) last = middle;
        else wanted -= half, first = middle;
    }
    return depths[first];
}
extern "C" void sample(const T* logits, const float* temperature, const int64_t* top_k, const float* top_p,
                       const float* min_p, const double* noise, int64_t* out, int64_t rows, int64_t V, int64_t stride) {
    #pragma omp parallel if (rows * V > BIG)
    {
        std::vector<float> depths(V), kept;
        #pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            const T* row = logits + r * stride;
            float largest = -INFINITY, sum = 0;
            #pragma omp simd reduction(max : largest) reduction(+ : sum)
            for (int64_t i = 0; i < V; i++) {
                float x = to_float(row[i]);
                largest = x > largest ? x : largest;
                sum += x != x ? x : 0;  // NaN if there is one
            }
            if (!std::isfinite(largest) || sum != sum) { out[r] = -1; continue; }
            if (temperature[r] == 0) {
                out[r] = std::find_if(row, row + V, [&](T x) { return to_float(x) == largest; }) - row;
                continue;
            }
            float limit = 87.f;  // exp_ goes no lower: what lies deeper gets no probability at all
            #pragma omp simd
            for (int64_t i = 0; i < V; i++) depths[i] = (largest - to_float(row[i])) / temperature[r];
            if (top_k[r] > 0 && top_k[r] < V) {
                kept = depths;
                std::nth_element(kept.begin(), kept.begin() + top_k[r] - 1, kept.end());
                limit = std::min(limit, kept[top_k[r] - 1]);
            }
            if (top_p[r] < 1) {
                kept.clear();
                std::copy_if(depths.begin(), depths.end(), std::back_inserter(kept), [&](float d) { return d <= limit; });
                limit = std::min(limit, reach(kept, top_p[r]));
            }
            if (min_p[r] > 0) limit = std::min(limit, -std::log(min_p[r]));
            #pragma omp simd
            for (int64_t i = 0; i < V; i++) depths[i] = depths[i] <= limit ? exp_(-depths[i]) : 0.f;
            double total = 0, before = 0;
            for (int64_t i = 0; i < V; i++) total += depths[i];
            int64_t choice = 0;
            for (int64_t i = 0; i < V && before <= noise[r] * total; i++)
                if (depths[i] > 0) before += depths[i], choice = i;
            out[r] = choice;
        }
    }
}

// ---- Attention over the paged cache. The rows of a task are (query, head) pairs. Online softmax (arXiv:1805.02867): m is
// the largest score of a row so far, l the sum of exp(score - m), acc the values weighted likewise; a larger score
// rescales both. KEYS positions are taken at a time. C is what the cache holds: T, bf16, or int8_t with scales.
constexpr int KEYS = 32;
constexpr int ROWS = 64;  // rows of one task, at most, unless a single query has more heads
constexpr int FEW = 8;    // with so many rows to a key/value head arithmetic is the limit, with fewer memory

struct Rows {
    int64_t D, Dp, rows;  // Dp: D rounded up to whole panels
    std::vector<float> q, s, acc, m, l;
    Rows(int64_t D, int64_t most) : D(D), Dp((D + PANEL - 1) / PANEL * PANEL), q(most * Dp), s(most * KEYS), acc(most * Dp),
        m(most), l(most) {}

    // s becomes exp(s - m), 0 where not visible; row r sees the keys first .. last-1 of these. SCALED: s is first
    // multiplied by the scales of the keys, in the end by those of the values.
    template <bool SCALED>
    void softmax(int64_t r, int first, int last, const float* k_scales, const float* v_scales) {
        float* __restrict p = &s[r * KEYS];
        float top = m[r], total = 0;
        #pragma omp simd reduction(max : top)
        for (int j = 0; j < KEYS; j++) {
            p[j] = j >= first && j < last ? (SCALED ? p[j] * k_scales[j] : p[j]) : -1e30f;
            top = p[j] > top ? p[j] : top;
        }
        #pragma omp simd reduction(+ : total)
        for (int j = 0; j < KEYS; j++) {
            float e = exp_(p[j] - top);
            e = j >= first && j < last ? e : 0.f;
            p[j] = SCALED ? e * v_scales[j] : e;
            total += e;
        }
        if (top != m[r]) {
            float shrink = exp_(m[r] - top);
            l[r] *= shrink;
            for (int64_t d = 0; d < Dp; d++) acc[r * Dp + d] *= shrink;
        }
        l[r] += total;
        m[r] = top;
    }
};

// Few rows (decoding): memory is the limit, so it is read in the order in which it lies: token by token, each with all its
// heads. The h-th head has rows h * per_head and on. `ahead` is what to prefetch. FIXED: D if known when compiling, else 0.
template <int FIXED, class C>
static void scores_few(Rows& t, const C* const* k, const C* const* ahead, int64_t heads, int64_t per_head) {
    const int64_t D = FIXED ? FIXED : t.D, Dp = FIXED ? FIXED : t.Dp;
    for (int j = 0; j < KEYS; j++) {
        for (int64_t d = 0; d < heads * D; d += 64 / sizeof(C)) __builtin_prefetch(ahead[j] + d, 0, 2);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t r = h * per_head; r < (h + 1) * per_head; r++) {
                const C* key = k[j] + h * D;
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
template <int FIXED, class C>
static void values_few(Rows& t, const C* const* v, const C* const* ahead, int64_t heads, int64_t per_head) {
    const int64_t D = FIXED ? FIXED : t.D, Dp = FIXED ? FIXED : t.Dp;
    for (int j = 0; j < KEYS; j += 4) {
        for (int i = 0; i < 4; i++)
            for (int64_t d = 0; d < heads * D; d += 64 / sizeof(C)) __builtin_prefetch(ahead[j + i] + d, 0, 2);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t r = h * per_head; r < (h + 1) * per_head; r++) {
                const float* p = &t.s[r * KEYS + j];
                float* acc = &t.acc[r * Dp];
                int64_t d = 0;
                for (; d + W <= D; d += W) {
                    vec a = load(acc + d);
                    for (int i = 0; i < 4; i += 2)
                        a += p[i] * load(v[j + i] + h * D + d) + p[i + 1] * load(v[j + i + 1] + h * D + d);
                    store(acc + d, a);
                }
                for (; d < D; d++)
                    for (int i = 0; i < 4; i++) acc[d] += p[i] * to_float(v[j + i][h * D + d]);
            }
    }
}

// Many rows of one head (prefill): arithmetic is the limit, and it is that of `panel_linear`. Keys are turned into columns.
template <class C>
static void scores_many(Rows& t, const C* const* k, float* kt) {
    for (int j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < t.D; d++) kt[d * KEYS + j] = to_float(k[j][d]);
    std::fill_n(t.s.begin(), t.rows * KEYS, 0.f);
    multiply<Floats>(t.rows, t.q.data(), t.Dp, kt, KEYS, t.D, nullptr, nullptr, t.s.data(), KEYS);
}
template <class C>
static void values_many(Rows& t, const C* const* v, float* wide) {
    for (int j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < t.D; d++) wide[j * t.Dp + d] = to_float(v[j][d]);
    for (int64_t d = 0; d < t.Dp; d += PANEL)
        multiply<Floats>(t.rows, t.s.data(), KEYS, wide + d, t.Dp, KEYS, nullptr, nullptr, &t.acc[d], t.Dp);
}

template <class C>
static void attend(const T* q, const void* k_cache, const void* v_cache, const bf16* k_scales, const bf16* v_scales,
                   const int32_t* block_tables, const int32_t* context_lens, const int32_t* query_start, T* out, int64_t B,
                   int64_t M, int64_t block_size, int64_t heads, int64_t kv_heads, int64_t D, int64_t q_stride,
                   int64_t window, float scale) {
    constexpr bool SCALED = std::is_same<C, int8_t>();
    int64_t group = heads / kv_heads, max_queries = std::max<int64_t>(1, ROWS / group);  // of a task
    // A task with few rows takes all heads of its request, or as many as leave every thread something to do.
    int64_t together = std::clamp<int64_t>(B * kv_heads / (4 * omp_get_max_threads()), 1, kv_heads);
    auto scores = D == 64 ? scores_few<64, C> : D == 128 ? scores_few<128, C> : scores_few<0, C>;
    auto values = D == 64 ? values_few<64, C> : D == 128 ? values_few<128, C> : values_few<0, C>;
    struct Task { int64_t b, h0, h1, first, last; };  // queries first .. last-1 of request b, key/value heads h0 .. h1-1
    std::vector<Task> tasks;
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0, n = query_start[b + 1] - query_start[b]; i < n; i += max_queries) {
            int64_t last = std::min(i + max_queries, n), step = (last - i) * group < FEW ? together : 1;
            for (int64_t h = 0; h < kv_heads; h += step) tasks.push_back({b, h, std::min(h + step, kv_heads), i, last});
        }
    #pragma omp parallel if (tasks.size() > 1)
    {
        Rows t(D, std::max(max_queries * group, together * FEW));
        std::vector<float> scratch(KEYS * t.Dp), k_factors(SCALED * together * KEYS), v_factors(SCALED * together * KEYS);
        #pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); task++) {
            const Task& which = tasks[task];
            int64_t b = which.b, h0 = which.h0, h1 = which.h1, first = which.first, last = which.last;
            int64_t start = query_start[b], position0 = context_lens[b] - (query_start[b + 1] - start);
            int64_t rows = (last - first) * group, n_heads = h1 - h0;  // rows of one key/value head
            bool few = rows < FEW;
            t.rows = rows * n_heads;
            std::fill(t.acc.begin(), t.acc.end(), 0.f);
            std::fill(t.m.begin(), t.m.end(), -1e30f);
            std::fill(t.l.begin(), t.l.end(), 0.f);
            // Row r of head h: query first + r / group, query head h * group + r % group.
            auto place = [&](int64_t r) { return start + first + r % rows / group; };
            auto head = [&](int64_t r) { return (h0 + r / rows) * group + r % group; };
            for (int64_t r = 0; r < t.rows; r++) {
                const T* from = q + place(r) * q_stride + head(r) * D;
                for (int64_t d = 0; d < D; d++) t.q[r * t.Dp + d] = to_float(from[d]) * scale;
            }
            int64_t lo = window ? std::max<int64_t>(0, position0 + first - window + 1) : 0, hi = position0 + last;
            const C *k[KEYS], *v[KEYS], *next[KEYS];
            auto locate = [&](int64_t j0, const void* cache, const C** to) {  // past the end the last one again
                for (int64_t j = 0, n; j < KEYS; j += n) {  // n keys of one block
                    int64_t at = std::min(j0 + j, hi - 1), block = block_tables[b * M + at / block_size];
                    int64_t i0 = at % block_size;
                    n = std::min({block_size - i0, hi - at, KEYS - j});
                    const C* row = (const C*)cache + ((block * block_size + i0) * kv_heads + h0) * D;
                    for (int64_t i = 0; i < n; i++) to[j + i] = row + i * kv_heads * D;
                    for (int64_t h = 0; SCALED && cache == v_cache && h < n_heads; h++) {  // both scales, once
                        int64_t there = (block * kv_heads + h0 + h) * block_size + i0, here = h * KEYS + j;
                        for (int64_t i = 0; i < n; i++) k_factors[here + i] = to_float(k_scales[there + i]);
                        for (int64_t i = 0; i < n; i++) v_factors[here + i] = to_float(v_scales[there + i]);
                    }
                }
            };
            locate(lo, k_cache, next);
            for (int64_t j0 = lo; j0 < hi; j0 += KEYS) {
                std::copy(next, next + KEYS, k);
                locate(j0, v_cache, v);
                locate(j0 + KEYS, k_cache, next);
                // Blocks are scattered, so no hardware can guess what comes next: reading the keys prefetches the values,
                // and reading the values the next keys.
                if (few) scores(t, k, v, n_heads, rows); else scores_many(t, k, scratch.data());
                for (int64_t r = 0; r < t.rows; r++) {
                    int64_t position = position0 + first + r % rows / group;
                    int64_t from = window ? std::clamp<int64_t>(position - window + 1 - j0, 0, KEYS) : 0;
                    t.template softmax<SCALED>(r, from, std::clamp<int64_t>(position + 1 - j0, 0, KEYS),
                                               k_factors.data() + r / rows * KEYS, v_factors.data() + r / rows * KEYS);
                }
                if (few) values(t, v, next, n_heads, rows); else values_many(t, v, scratch.data());
            }
            for (int64_t r = 0; r < t.rows; r++)
                for (int64_t d = 0; d < D; d++)
                    put(&out[(place(r) * heads + head(r)) * D + d], t.acc[r * t.Dp + d] / t.l[r]);
        }
    }
}
extern "C" void paged_attention(const T* q, const void* k_cache, const void* v_cache, const bf16* k_scales,
                                const bf16* v_scales, const int32_t* block_tables, const int32_t* context_lens,
                                const int32_t* query_start, T* out, int64_t B, int64_t M, int64_t block_size,
                                int64_t heads, int64_t kv_heads, int64_t D, int64_t q_stride, int64_t window,
                                int64_t cache_bits, float scale) {
    auto run = cache_bits == 8 ? attend<int8_t> : cache_bits == 16 ? attend<bf16> : attend<T>;
    run(q, k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, query_start, out, B, M, block_size, heads,
        kv_heads, D, q_stride, window, scale);
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# CUDA C++: compiling and calling
# ---------------------------------------------------------------------------------------------------------------------

_CUDA_ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


class CudaKernels:
    """The CUDA bodies for one device and element type. Calling it launches a kernel, compiled when first asked for.

    Torch's own NVRTC compiles them, for the very device, and the machine code stays in the user's cache folder.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        from cuda.bindings import driver

        self.driver, self.element = driver, _CUDA_ELEMENTS[dtype]
        properties = torch.cuda.get_device_properties(device)
        # Torch's context for this device: the calling thread's current one may be another device's, or missing.
        self.context = _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device.index))))
        self.device, self.num_sms = device, properties.multi_processor_count
        self.arch = f"sm_{properties.major}{properties.minor}"
        self.loaded: dict[tuple, object] = {}

    def __call__(self, name: str, grid: tuple, block: int, *args, **constants) -> None:
        """Launch kernel `name` on the current stream, over grid (x, y, z) of blocks of `block` threads.

        A tensor is passed as a pointer, None as a null pointer, an int as int, a float as float; `constants` are the
        numbers that its source leaves open; one of them, SHARED, is how many bytes of shared memory DYNAMIC_SHARED has.
        """
        if not all(grid):  # no rows, no work; CUDA would call it an invalid value
            return
        key = name, *sorted(constants.items())
        pointers, _values = kernel_arguments(args)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        _check(self.driver.cuCtxPushCurrent(self.context))
        try:
            if key not in self.loaded:
                self.loaded[key] = self._load(name, constants)
            _check(self.driver.cuLaunchKernel(self.loaded[key], *grid, *(1,) * (3 - len(grid)), block, 1, 1,
                                              constants.get("SHARED", 0), stream, ctypes.addressof(pointers), 0))
        finally:
            _check(self.driver.cuCtxPopCurrent())

    def _load(self, name, constants):
        try:
            code = nvrtc_compile(cuda_source(name, self.element, **constants), self.arch)
        except (ImportError, RuntimeError, OSError) as error:
            raise CompileError(f"{name}: {error}") from error
        module = _check(self.driver.cuModuleLoadData(code))
        function = _check(self.driver.cuModuleGetFunction(module, name.encode()))
        if "SHARED" in constants:
            most = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(self.driver.cuFuncSetAttribute(function, most, constants["SHARED"]))
        return function


@functools.cache
def cuda_kernels(device: torch.device, dtype: torch.dtype) -> CudaKernels | None:
    """The CUDA bodies for a device and dtype; None before sm_80 and, with a warning, where nothing can compile them."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        return CudaKernels(device, dtype)
    except (ImportError, RuntimeError, OSError) as error:
        return _give_up_cuda(error)


def _check(result):
    """The value in a CUDA driver or NVRTC function's (error, value); RuntimeError if there was an error."""
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None


def cuda_source(name: str, element: str, **constants: int) -> str:
    """A kernel's complete source: the prelude, the type and constants that it leaves open, and the text that defines it."""
    source = next(text for key, text in CUDA.items() if re.search(rf"\b{name}\(", text) and key != "prelude")
    constants = "".join(f"constexpr int {key} = {value};\n" for key, value in constants.items())
    return f"{CUDA['prelude']}typedef {element} T;\n{constants}{source}"


def nvrtc_compile(source: str, arch: str) -> bytes:
    """Machine code for `arch` (such as sm_90), from the user's cache folder or newly compiled. RuntimeError has the log."""
    from cuda.bindings import nvrtc

    version = "{}.{}".format(*nvrtc.nvrtcVersion()[1:])
    target = cache_file(f"cuda-{arch}", ".cubin", source, arch, version)
    # The code, then its hash: a full disk or a crash may have cut it short. (Path.exists raises where it may not look.)
    if os.path.exists(target):
        code, end = (data := target.read_bytes())[:-32], data[-32:]
        if hashlib.sha256(code).digest() == end:
            return code
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    if nvrtc.nvrtcCompileProgram(program, len(options), options)[0]:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode(errors="replace").strip("\0 "))
    code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    _check(nvrtc.nvrtcDestroyProgram(program))
    # Without a writable folder it is compiled again at the next start, no more.
    with contextlib.suppress(OSError), new_file(target) as path:
        path.write_bytes(code + hashlib.sha256(code).digest())
    return code


def kernel_arguments(args) -> tuple[ctypes.Array, list]:
    """Arguments as a launch wants them: an array of pointers to them, and what has to stay alive with it."""
    values = [ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else
              ctypes.c_void_p(None) if arg is None else
              ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int(arg) for arg in args]
    return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)), values


def vector_width(cols: int, *tensors: torch.Tensor | None) -> int:
    """Neighbours that one instruction can load from rows of `cols`: at most 16 bytes, aligned in every tensor."""
    size = tensors[0].element_size()
    return math.gcd(cols, 16 // size, *(t.data_ptr() // size for t in tensors if t is not None))


def threads(most: int) -> int:
    """Threads of a block: whole warps, at most 1,024."""
    return min(1024, -(-most // 32) * 32)


# Each is compiled by itself, after the prelude and definitions of what its comment says is left open: `cuda_source`.
CUDA = {}

CUDA["prelude"] = r"""
#ifndef CUDA_ON_CPU  // tutorial/cuda_on_cpu.h says what these mean
#ifndef INFINITY  // NVRTC has no headers
#define INFINITY __int_as_float(0x7f800000)
#endif
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
__device__ float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ float to_float(fp16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
// What takes one instruction, for either 16-bit type E. A register holds a pair of them, the first in the lower half.
// The first argument of mma, fma2 and make_pair, T() in the calls, only selects the type: a pair does not tell its own.
//   mma: d [16, 8] += a [16, 16] b [16, 8] by one warp. Lane 4g + c holds rows g and g+8 of a and d, column g of b; see PTX
//     ISA, mma.m16n8k16: a = {(g; 2c, 2c+1), (g+8; 2c, 2c+1), (g; 2c+8, 2c+9), (g+8; 2c+8, 2c+9)}, b = {(2c, 2c+1; g),
//     (2c+8, 2c+9; g)}, d = {(g, 2c), (g, 2c+1), (g+8, 2c), (g+8, 2c+1)}.
//   fma2: a * b + c, for both halves.
#define INSTRUCTIONS(E, NAME)                                                                                         \
    __device__ void put(E* p, float x) { asm("cvt.rn." NAME ".f32 %0, %1;" : "=h"(p->bits) : "f"(x)); }               \
    __device__ unsigned make_pair(E, float x, float y) {                                                              \
        unsigned d; asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x)); return d;                    \
    }                                                                                                                 \
    __device__ unsigned fma2(E, unsigned a, unsigned b, unsigned c) {                                                 \
        unsigned d; asm("fma.rn." NAME "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d;            \
    }                                                                                                                 \
    __device__ void mma(E, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {                           \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "                 \
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                  \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
    }
INSTRUCTIONS(bf16, "bf16")
INSTRUCTIONS(fp16, "f16")
// (a & b) ^ c in one instruction; with constants for b and c the compiler would make two.
__device__ unsigned and_xor(unsigned a, unsigned b, unsigned c) {
    unsigned d; asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d;
}
// 2^x in one instruction, with 0 for subnormal results; exp2f takes four, to get these right.
__device__ float power_of_2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// 16 or 8 bytes from global to shared memory, while the thread goes on until `wait_for_copies`. 16 can bypass the L1 cache.
template <int BYTES = 16> __device__ void copy_async(void* to, const void* from) {
    unsigned shared = (unsigned)__cvta_generic_to_shared(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(shared), "l"(from) : "memory");
}
__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Four 8 x 8 matrices of 16-bit entries from shared memory: lane i says where row i % 8 of matrix i / 8 begins, and lane
// 4g + c gets (g; 2c, 2c+1) of each matrix; transposed: (2c, 2c+1; g).
#define LOAD_MATRICES(NAME, KIND)                                                                                     \
    __device__ void NAME(unsigned (&x)[4], const void* row) {                                                         \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0, %1, %2, %3}, [%4];"                       \
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])                                                 \
                     : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");                                      \
    }
LOAD_MATRICES(load_matrices, "")
LOAD_MATRICES(load_transposed, ".trans")
// SHARED bytes of shared memory, as the launch says: beyond 48 KB there is no other way.
#define DYNAMIC_SHARED(NAME) extern __shared__ __align__(16) char NAME[]
// An 8 x 8 matrix of 16-bit entries, of which lane 4g + c holds (g; 2c, 2c+1), transposed.
__device__ unsigned transpose(unsigned pair) {
    unsigned out; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair)); return out;
}
namespace cuda { template <class V> __device__ void check_access(const V*) {} }  // where there is a GPU: nothing
#endif

__device__ float to_float(float x) { return x; }
__device__ void put(float* p, float x) { *p = x; }

// N neighbours, loaded or stored by one instruction.
template <class T, int N> struct alignas(sizeof(T) * N) Vec { T at[N]; };
template <class T, int N> __device__ Vec<T, N> load(const T* p) {
    const Vec<T, N>* v = (const Vec<T, N>*)p;
    cuda::check_access(v);
    return *v;
}
template <class T, int N> __device__ void store(T* p, const Vec<T, N>& x) {
    Vec<T, N>* v = (Vec<T, N>*)p;
    cuda::check_access(v);
    *v = x;
}

constexpr unsigned ALL = 0xffffffff;  // lanes of a warp
__device__ float warp_sum(float x) {
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(ALL, x, i);
    return x;
}

// The request that a tile, or a row, of this number belongs to, if those of request b begin at first(b). By bisection.
template <class First> __device__ int owner(int number, int B, First first) {
    int low = 0, high = B - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (first(middle) <= number) low = middle; else high = middle - 1;
    }
    return low;
}

// Two int8, byte i of x and byte j of y, as a pair. Exact, and quicker than to convert: above a certain power of two,
// neighbouring floats are 1 apart. So a byte, put into the last bits of that power, adds its value; the power is subtracted.
__device__ unsigned widen_int8(bf16 kind, unsigned x, int i, unsigned y, int j) {
    // A bf16 of 128 .. 255 holds seven bits; the sign decides whether 128 or 256 (the next power) is taken off.
    unsigned codes = __byte_perm(x, y, (4 + j) << 8 | i);
    return fma2(kind, and_xor(codes, 0x007f007f, 0x43004300), 0x3f803f80, and_xor(codes, 0x00800080, 0xc300c300));
}
__device__ unsigned widen_int8(fp16 kind, unsigned x, int i, unsigned y, int j) {
    unsigned codes = __byte_perm(x, y, (4 + j) << 8 | i);  // 1024 + code + 128, less 1152
    return fma2(kind, and_xor(codes, 0x00ff00ff, 0x64806480), 0x3c003c00, 0xe480e480);
}
__device__ float2 widen_int8(float, unsigned x, int i, unsigned y, int j) {  // 2^23 + code + 128, less that
    return make_float2(__uint_as_float(__byte_perm(x ^ 0x80808080, 0x4b000000, 0x7540 + i)) - 8388736.f,
                       __uint_as_float(__byte_perm(y ^ 0x80808080, 0x4b000000, 0x7540 + j)) - 8388736.f);
}
"""

CUDA["add_norm"] = r"""
// total = x + delta; out = RMSNorm(total) * weight, or LayerNorm where there is a bias. All [rows, cols].
//
// Grid (row). A thread takes N neighbours at a time. Reads x and delta, writes total (x itself where there is no delta) and
// out; total is read again from the cache: 4 sizeof(T) bytes per entry, a few FLOPs. Left open: T, N (a divisor of cols).
__device__ float block_sum(float x) {
    __shared__ float of_warp[32];
    x = warp_sum(x);
    __syncthreads();  // another warp may still be reading the last sum
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0);
}

extern "C" __global__ void add_norm(const T* x, const T* delta, const T* weight, const T* bias, T* out, T* total, int cols,
                                    float eps) {
    long long row = (long long)blockIdx.x * cols;
    int step = blockDim.x * N;
    float sum = 0, squares = 0, mean = 0;
    for (int i = threadIdx.x * N; i < cols; i += step) {
        Vec<T, N> a = load<T, N>(x + row + i);
        if (delta) {
            Vec<T, N> d = load<T, N>(delta + row + i);
            // Rounded as it is stored: the norm must see what the next layer's residual will see.
            for (int j = 0; j < N; j++) put(&a.at[j], to_float(a.at[j]) + to_float(d.at[j]));
            store<T, N>(total + row + i, a);
        }
        for (int j = 0; j < N; j++) sum += to_float(a.at[j]), squares += to_float(a.at[j]) * to_float(a.at[j]);
    }
    if (bias) {  // not the mean of squares less the square of the mean: the difference of close numbers has few digits
        mean = block_sum(sum) / cols;
        squares = 0;
        for (int i = threadIdx.x * N; i < cols; i += step) {
            Vec<T, N> a = load<T, N>(total + row + i);
            for (int j = 0; j < N; j++) squares += (to_float(a.at[j]) - mean) * (to_float(a.at[j]) - mean);
        }
    }
    float scale = rsqrtf(block_sum(squares) / cols + eps);
    for (int i = threadIdx.x * N; i < cols; i += step) {
        Vec<T, N> a = load<T, N>(total + row + i), w = load<T, N>(weight + i), b = bias ? load<T, N>(bias + i) : w;
        for (int j = 0; j < N; j++)
            put(&a.at[j], (to_float(a.at[j]) - mean) * scale * to_float(w.at[j]) + (bias ? to_float(b.at[j]) : 0));
        store<T, N>(out + row + i, a);
    }
}
"""

CUDA["silu_mul"] = r"""
// out[row, i] = silu(gate_up[row, i]) * gate_up[row, cols + i]
//
// Grid (row, piece of it). A thread takes N neighbours. Reads 2, writes 1 sizeof(T) bytes per entry of out.
// Left open: T, N (a divisor of cols).
extern "C" __global__ void silu_mul(const T* gate_up, T* out, int cols) {
    int i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (i >= cols) return;
    const T* gates = gate_up + 2ll * blockIdx.x * cols + i;
    Vec<T, N> gate = load<T, N>(gates), up = load<T, N>(gates + cols);
    for (int j = 0; j < N; j++) {
        float x = to_float(gate.at[j]);
        put(&up.at[j], x / (1 + expf(-x)) * to_float(up.at[j]));
    }
    store<T, N>(out + (long long)blockIdx.x * cols + i, up);
}
"""

CUDA["rope_and_write_kv"] = r"""
// Per token: normalise each head of q and k, rotate it, leave q in place, store k and v into their slot.
//
// Grid (token, four heads). A warp takes one head of one token, a lane every 32nd pair (d, d + D/2) of it. Reads and writes
// each entry of qkv once, and D floats of cos and sin per head.
// Left open: T, D (even), INT8 (1: the cache holds int8, and a scale per token and head).
extern "C" __global__ void rope_and_write_kv(T* qkv, const long long* positions, const long long* slots, const float* table,
                                             const T* q_norm, const T* k_norm, void* k_cache, void* v_cache,
                                             bf16* k_scales, bf16* v_scales, int heads, int kv_heads, int block_size,
                                             float eps) {
    constexpr int HALF = D / 2, MINE = (HALF + 31) / 32;  // pairs of a lane
    int head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x;
    if (head >= heads + 2 * kv_heads) return;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;
    T* from = qkv + ((long long)token * (heads + 2 * kv_heads) + head) * D;
    const T* norm = is_v ? nullptr : is_q ? q_norm : k_norm;
    const float *cos = table + positions[token] * D, *sin = cos + HALF;
    float scale = 1, x[MINE][2] = {};
    if (norm) {
        float squares = 0;
        for (int d = lane; d < D; d += 32) squares += to_float(from[d]) * to_float(from[d]);
        scale = rsqrtf(warp_sum(squares) / D + eps);
    }
    #pragma unroll
    for (int i = 0; i < MINE; i++) if (int d = lane + 32 * i; d < HALF) {
        float a = to_float(from[d]), b = to_float(from[d + HALF]);
        if (norm) a *= scale * to_float(norm[d]), b *= scale * to_float(norm[d + HALF]);
        bool turn = table && !is_v;
        x[i][0] = turn ? a * cos[d] - b * sin[d] : a;
        x[i][1] = turn ? b * cos[d] + a * sin[d] : b;
    }
    const int slot = is_q ? 0 : (int)slots[token], kv_head = (head - heads) % kv_heads;
    const long long place = ((long long)slot * kv_heads + kv_head) * D;
    if (INT8 && !is_q) {
        unsigned largest = 0;  // without signs, floats sort like their bits, and NaN, which has to show, above all
        for (int i = 0; i < 2 * MINE; i++) largest = max(largest, __float_as_uint(x[i / 2][i % 2]) & 0x7fffffff);
        for (int i = 16; i; i /= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, i));
        float step = __uint_as_float(largest) / 127;
        bf16 rounded;
        put(&rounded, step < 1e-30f ? 1e-30f : step);
        step = to_float(rounded);
        if (lane == 0)
            (is_v ? v_scales : k_scales)[((long long)(slot / block_size) * kv_heads + kv_head) * block_size
                                         + slot % block_size] = rounded;
        signed char* to = (signed char*)(is_v ? v_cache : k_cache) + place;
        #pragma unroll
        for (int i = 0; i < MINE; i++) if (int d = lane + 32 * i; d < HALF)
            for (int h = 0; h < 2; h++) to[d + h * HALF] = (signed char)(int)rintf(x[i][h] / step);
    } else {
        T* to = is_q ? from : (T*)(is_v ? v_cache : k_cache) + place;
        #pragma unroll
        for (int i = 0; i < MINE; i++) if (int d = lane + 32 * i; d < HALF)
            for (int h = 0; h < 2; h++) put(&to[d + h * HALF], x[i][h]);
    }
}
"""

CUDA["paged_attention"] = r"""
// Attention over the paged cache, for any mix of query lengths: split-KV with matrix instructions (FlashDecoding's scheme).
// Requests with more than `max_queries` queries are left out, for `tiled_attention`.
//
// Grid (tile, kv head, split). A tile is up to R rows of one request; a row is a (query, head) pair, and all heads that
// share the kv head are rows of the same tile, so K and V are read once for all of them. The keys that a tile sees are
// cut into gridDim.z splits; the warps of a block take 16 keys of its split at a time, each for itself, straight from
// global memory into the registers that the matrix instruction reads. They share nothing until they add up at the end.
//
//     scores^T [16 keys, 8 rows]  = K [16 keys, D] q^T [D, 8 rows]              then p = 2^(score - largest so far)
//     out^T    [D, 8 rows]       += V^T [D, 16 keys] p^T [16 keys, 8 rows]
//
// The sum over D may be taken in any order, and the D rows of a matrix may be in any order. So a lane loads neighbouring
// entries, 16 bytes at a time, in place of the scattered ones that the instruction expects of it.
//
// Reads 2 D sizeof(T) bytes per visible key, kv head and tile, and little else; does 4 D FLOPs per visible key and row. In
// decoding that is a FLOP per byte and head of the group: memory is the limit. It takes long to answer, so a warp asks for
// 16 keys and values before it uses the first: 8 KB for D = 128 in 16 bits, and 12 warps fit on a multiprocessor. Writes
// out; with several splits it writes unnormalized sums, and (largest score, sum of p) per row, for `combine_splits`.
//
// An int8 cache stays int8 in registers too, until an instruction needs it; a key's score is multiplied by the key's scale,
// its p by the value's. That halves the bytes, and adds two for every scale.
//
// Left open: T, D (a multiple of 16), R (rows of a tile, 8 or 16), DECODE (1: one query, one tile per request), INT8 (1: so
// is the cache), BLOCKS (that shall fit on a multiprocessor).
constexpr int WARPS = 4, TILES = R / 8;

// Two entries, as the matrix instruction takes them: two 16-bit numbers in a register.
__device__ unsigned firsts(unsigned x, unsigned y) { return __byte_perm(x, y, 0x5410); }
__device__ unsigned seconds(unsigned x, unsigned y) { return __byte_perm(x, y, 0x7632); }

// The same for float, with shuffles: no matrix instruction keeps its 24 bits.
__device__ float2 make_pair(float, float x, float y) { return make_float2(x, y); }
__device__ float2 firsts(float2 x, float2 y) { return make_float2(x.x, y.x); }
__device__ float2 seconds(float2 x, float2 y) { return make_float2(x.y, y.y); }
__device__ float2 shuffle(float2 x, int lane) {
    return make_float2(__shfl_sync(ALL, x.x, lane), __shfl_sync(ALL, x.y, lane));
}
__device__ float2 transpose(float2 x) {
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    float2 upper = shuffle(x, 8 * c + g / 2), lower = shuffle(x, 8 * c + 4 + g / 2);
    return g % 2 ? seconds(upper, lower) : firsts(upper, lower);
}
__device__ void mma(float, float (&d)[4], const float2 (&a)[4], const float2 (&b)[2]) {
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 2; k++) {
            float2 row = shuffle(a[2 * k], 4 * g + i), row8 = shuffle(a[2 * k + 1], 4 * g + i);
            float2 left = shuffle(b[k], 8 * c + i), right = shuffle(b[k], 8 * c + 4 + i);
            d[0] += row.x * left.x + row.y * left.y;
            d[1] += row.x * right.x + row.y * right.y;
            d[2] += row8.x * left.x + row8.y * left.y;
            d[3] += row8.x * right.x + row8.y * right.y;
        }
}

typedef decltype(make_pair(T(), 0, 0)) Pair;

// A lane's share of a row of K or V: N pairs, loaded P neighbours at a time, and kept as they lie in memory: in words of one
// pair, or of ENTRIES int8.
template <int CODES> struct WordOf { typedef Pair type; };
template <> struct WordOf<4> { typedef unsigned type; };
template <> struct WordOf<2> { typedef unsigned short type; };
template <int N> struct Share {
    __device__ static constexpr int most(int pairs) { return N % pairs ? most(pairs / 2) : pairs; }
    static constexpr int P = most(16 / (INT8 ? 2 : sizeof(Pair)));  // the most that make up 16 bytes and divide N
    static constexpr int ENTRIES = INT8 && P > 1 ? 4 : 2, WORDS = P * 2 / ENTRIES;  // words of a load
    typedef typename WordOf<INT8 * ENTRIES>::type Word;
    Word words[2 * N / ENTRIES];
    __device__ void read(const void* row, int lane, int lanes) {  // `lanes` share the row
        for (int i = 0; i < N / P; i++) {
            Vec<Word, WORDS> x = load<Word, WORDS>((const Word*)row + (lanes * i + lane) * WORDS);
            for (int j = 0; j < WORDS; j++) words[i * WORDS + j] = x.at[j];
        }
    }
    __device__ Pair pair(int i) const {
        if constexpr (INT8) return both(2 * i, *this, 2 * i + 1);
        else return words[i];
    }
    __device__ Pair across(const Share& other, int d) const {  // entry d of this row, and that of the other
        if constexpr (INT8) return both(d, other, d);
        else return d % 2 ? seconds(words[d / 2], other.words[d / 2]) : firsts(words[d / 2], other.words[d / 2]);
    }
    __device__ Pair both(int d, const Share& other, int e) const {
        return widen_int8(T(), words[d / ENTRIES], d % ENTRIES, other.words[e / ENTRIES], e % ENTRIES);
    }
};
typedef Share<D / 8> KeyShare;
typedef Share<D / 16> ValueShare;
constexpr int KP = KeyShare::P, VP = ValueShare::P;

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
paged_attention(const T* q, const void* k_cache, const void* v_cache, const bf16* k_scales, const bf16* v_scales,
                const int* block_tables, const int* context_lens, const int* query_start, T* out, float* sums,
                float2* stats, int B, int M, int block_size, int max_queries, int sum_tokens, int heads, int kv_heads,
                int q_stride, int window, float scale) {
    constexpr int ENTRY = INT8 ? 1 : sizeof(T);  // bytes in the cache
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int group = heads / kv_heads, kv_head = blockIdx.y, split = blockIdx.z, splits = gridDim.z;

    // Request b's tiles are numbered from here. It is a bound on the tiles before them, so some numbers have no tile.
    auto first_tile = [&](int b) { return min(query_start[b] * group / R + b, b * ((max_queries * group + R - 1) / R)); };
    const int b = DECODE ? blockIdx.x : owner(blockIdx.x, B, first_tile);
    const int row0 = DECODE ? 0 : ((int)blockIdx.x - first_tile(b)) * R;
    const int start = DECODE ? b : query_start[b], n = DECODE ? 1 : query_start[b + 1] - start;
    const int rows = min(R, n * group - row0), context = context_lens[b];
    if (rows <= 0 || n > max_queries) return;
    auto query_of = [&](int row) { return DECODE ? 0 : (row0 + row) / group; };  // of a tile's row
    auto head_of = [&](int row) { return kv_head * group + (DECODE ? row : (row0 + row) % group); };
    auto output_row = [&](int row, int first_token) {
        return (long long)(first_token + query_of(row)) * heads + head_of(row);
    };
    auto sum_row = [&](int row) {  // of sums and stats
        return (long long)split * sum_tokens * heads + output_row(row, min(start, b * max_queries));
    };
    auto position_of = [&](int row) { return context - n + query_of(row); };
    const int first = window ? max(0, position_of(0) - window + 1) : 0, end = position_of(rows - 1) + 1;
    constexpr int STEP = 16 * WARPS;  // keys that the block takes at a time
    const int share = ((end - first - 1) / splits / STEP + 1) * STEP;
    const int from = first + split * share, to = min(end, from + share);
    if (from >= to) {
        if ((int)threadIdx.x < rows)
            stats[sum_row(threadIdx.x)] = make_float2(-INFINITY, 0);
        return;
    }

    Pair query[TILES][D / 8];  // row 8t + g
    int limit[TILES][2];       // the last position that row 8t + 2c + e sees; -1: there is no such row
    #pragma unroll  // or the arrays would not stay in registers
    for (int t = 0; t < TILES; t++) {
        int row = min(8 * t + g, rows - 1);
        const T* head = q + (long long)(start + query_of(row)) * q_stride + head_of(row) * D;
        constexpr int MOST = 16 / sizeof(Pair), QP = KP < MOST ? KP : MOST;  // in the order of the keys
        for (int i = 0; i < D / 8; i += QP) {
            Vec<Pair, QP> x = load<Pair, QP>((const Pair*)head + (i / KP * 4 + c) * KP + i % KP);
            for (int j = 0; j < QP; j++) query[t][i + j] = x.at[j];
        }
        for (int e = 0; e < 2; e++) {
            int row = 8 * t + 2 * c + e;
            limit[t][e] = row < rows ? position_of(row) : -1;
        }
    }
    scale *= 1.44269504f;  // log2(e): the hardware has 2^x, not e^x
    float acc[TILES][D / 16][4] = {}, total[TILES][2] = {}, top[TILES][2];
    for (int t = 0; t < TILES; t++) top[t][0] = top[t][1] = -INFINITY;

    // Where key j + lane % 16 lies, the last one if there are fewer, and factor: of lanes 0 .. 15 the scales of the 16 keys,
    // of 16 .. 31 those of their values.
    int slot = 0;
    float factor = 1;
    auto find = [&](int j) {
        int at = min(j + lane % 16, to - 1), block = block_tables[b * M + at / block_size];
        slot = block * block_size + at % block_size;
        if (INT8) {
            long long place = ((long long)block * kv_heads + kv_head) * block_size + at % block_size;
            factor = to_float((lane < 16 ? k_scales : v_scales)[place]);
        }
    };
    auto row = [&](const void* cache, int key) {
        return (const char*)cache + ((long long)__shfl_sync(ALL, slot, key) * kv_heads + kv_head) * D * ENTRY;
    };
    int j = from + 16 * warp;
    find(j);
    for (; j < to; j += STEP) {
        KeyShare k[2];    // of keys g and g + 8
        ValueShare v[4];  // of keys 2c, 2c + 1, 2c + 8, 2c + 9
        for (int h = 0; h < 2; h++) k[h].read(row(k_cache, g + 8 * h), c, 4);
        for (int h = 0; h < 4; h++) v[h].read(row(v_cache, 2 * c + h % 2 + h / 2 * 8), g, 8);
        const float factors = factor;  // of these keys and values
        find(j + STEP);                // while they come
        #pragma unroll  // or the arrays would not stay in registers
        for (int t = 0; t < TILES; t++) {
            float s[4] = {}, shrink[2];  // (key g; rows 2c, 2c + 1), (key g + 8; rows 2c, 2c + 1)
            #pragma unroll
            for (int i = 0; i < D / 8; i += 2) {
                Pair a[4] = {k[0].pair(i), k[1].pair(i), k[0].pair(i + 1), k[1].pair(i + 1)};
                Pair x[2] = {query[t][i], query[t][i + 1]};
                mma(T(), s, a, x);
            }
            float k_factor[2] = {1, 1}, v_factor[2] = {1, 1};  // of keys g and g + 8
            for (int h = 0; INT8 && h < 2; h++) {
                k_factor[h] = __shfl_sync(ALL, factors, g + 8 * h);
                v_factor[h] = __shfl_sync(ALL, factors, 16 + g + 8 * h);
            }
            for (int e = 0; e < 2; e++) {
                float largest = top[t][e];
                for (int h = 0; h < 2; h++) {
                    int key = j + g + 8 * h;
                    bool visible = key < to && key <= limit[t][e] && (!window || key > limit[t][e] - window);
                    s[2 * h + e] = visible ? s[2 * h + e] * scale * k_factor[h] : -INFINITY;
                    largest = fmaxf(largest, s[2 * h + e]);
                }
                for (int i = 4; i < 32; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, i));
                float base = largest == -INFINITY ? 0 : largest;  // a row that has seen nothing yet
                shrink[e] = power_of_2(top[t][e] - base);
                // p times a scale can be too small for an fp16, where p times a value is not: 64 p, and 64 in the total.
                if (INT8) base -= 6;
                for (int h = 0; h < 2; h++) s[2 * h + e] = power_of_2(s[2 * h + e] - base);
                total[t][e] = total[t][e] * shrink[e] + s[e] + s[2 + e];
                top[t][e] = largest;
                for (int h = 0; h < 2; h++) s[2 * h + e] *= v_factor[h];
            }
            Pair p[2] = {transpose(make_pair(T(), s[0], s[1])), transpose(make_pair(T(), s[2], s[3]))};
            #pragma unroll
            for (int i = 0; i < D / 16; i++) {  // two rows of V^T: the first and the second entry of the lane's pair i
                for (int e = 0; e < 4; e++) acc[t][i][e] *= shrink[e % 2];
                Pair a[4] = {v[0].across(v[1], 2 * i), v[0].across(v[1], 2 * i + 1),
                             v[2].across(v[3], 2 * i), v[2].across(v[3], 2 * i + 1)};
                mma(T(), acc[t][i], a, p);
            }
        }
    }

    // The warps add up. (D + 1: with D, lanes with different rows would want the same bank of shared memory.)
    __shared__ float row_top[WARPS][R], row_total[WARPS][R], row_out[WARPS][R][D + 1];
    #pragma unroll  // as above
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = 8 * t + 2 * c + e;
            for (int i = 4; i < 32; i *= 2) total[t][e] += __shfl_xor_sync(ALL, total[t][e], i);
            if (g == 0) row_top[warp][row] = top[t][e], row_total[warp][row] = total[t][e];
            for (int i = 0; i < D / 16; i++)
                for (int h = 0; h < 2; h++)
                    row_out[warp][row][((i / VP * 8 + g) * VP + i % VP) * 2 + h] = acc[t][i][2 * h + e];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * D; i += 32 * WARPS) {
        int row = i / D, d = i % D;
        float m = -INFINITY, l = 0, sum = 0;
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, row_top[w][row]);
        for (int w = 0; w < WARPS; w++) {  // sums without a largest score are 0, or NaN, which has to show
            float factor = row_top[w][row] == -INFINITY ? 1 : power_of_2(row_top[w][row] - m);
            l += row_total[w][row] * factor;
            sum += row_out[w][row][d] * factor;
        }
        if (splits == 1) {
            put(&out[output_row(row, start) * D + d], sum / l);
        } else {
            sums[sum_row(row) * D + d] = sum;
            if (d == 0) stats[sum_row(row)] = make_float2(m, l);
        }
    }
}

// Adds up the splits. Grid (row) of up to 16 warps, a row being a (token, head) of a request with at most `max_queries`
// queries. Of 16, each warp takes every 16th split, so that they wait at the same time. Reads D + 2 floats for each row and
// split, mostly from the L2 cache: waiting for them is the limit.
extern "C" __global__ void __launch_bounds__(512)
combine_splits(const float* sums, const float2* stats, const int* query_start, T* out, int B, int max_queries, int heads,
               int splits) {
    constexpr int MOST = 16, MINE = (D / 4 + 31) / 32;  // warps; pieces of four entries that a lane adds up
    __shared__ float warp_out[MOST][D], warp_total[MOST];
    const int row = blockIdx.x, rows = gridDim.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int to = row;
    if (!DECODE) {
        auto first_token = [&](int b) { return min(query_start[b], b * max_queries); };  // in sums
        const int b = owner(row / heads, B, first_token), n = query_start[b + 1] - query_start[b];
        if (n > max_queries || row / heads - first_token(b) >= n) return;
        to += (query_start[b] - first_token(b)) * heads;
    }
    float m = -INFINITY, l = 0, acc[MINE][4] = {};
    int used = 0;  // the last ones may have seen no key, and written no sums
    for (int s = lane; s < splits; s += 32) {
        float2 of_split = stats[(long long)s * rows + row];
        m = fmaxf(m, of_split.x);
        if (of_split.y != 0) used = s + 1;
    }
    for (int i = 16; i; i /= 2) {
        m = fmaxf(m, __shfl_xor_sync(ALL, m, i));
        used = max(used, __shfl_xor_sync(ALL, used, i));
    }
    for (int s = warp; s < used; s += warps) {
        float2 of_split = stats[(long long)s * rows + row];
        float factor = power_of_2(of_split.x - m);
        l += of_split.y * factor;
        for (int i = 0; i < MINE; i++) if (int d = (lane + 32 * i) * 4; d < D) {
            Vec<float, 4> sum = load<float, 4>(sums + ((long long)s * rows + row) * D + d);
            for (int e = 0; e < 4; e++) acc[i][e] += sum.at[e] * factor;
        }
    }
    for (int i = 0; i < MINE; i++) if (int d = (lane + 32 * i) * 4; d < D)
        for (int e = 0; e < 4; e++) warp_out[warp][d + e] = acc[i][e];
    if (lane == 0) warp_total[warp] = l;
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0, total = 0;
        for (int w = 0; w < warps; w++) sum += warp_out[w][d], total += warp_total[w];
        put(&out[(long long)to * D + d], sum / total);
    }
}
"""

CUDA["tiled_attention"] = r"""
// Attention over the paged cache for requests with many queries, more than `few`: FlashAttention-2's scheme
// (arXiv:2307.08691). The others are left to `paged_attention`, and so are floats: no matrix instruction keeps their bits.
//
// Grid (tile, kv head). A tile is up to ROWS rows of one request. As there a row is a (query, head) pair, and the heads that
// share a kv head are rows of the same tile: any group fills it, and it spans the fewest positions, so that little of what
// is computed is masked. It takes KEYS of its keys at a time; a warp keeps the sums of a quarter of the rows in registers:
//
//     scores [rows, KEYS]  = q [rows, D] K^T [D, KEYS]                          then p = 2^(score - largest so far)
//     out    [rows, D]    += p [rows, KEYS] V [KEYS, D]
//
// K and V are gathered through the block table into shared memory, past the registers. Each has one buffer: V comes while
// the scores are computed, the next K while V is multiplied. Rows lie an odd number of 16 bytes apart, so that the eight
// that make up a matrix are read from different banks.
//
// Reads 2 D sizeof(T) bytes per visible key, kv head and tile, nearly all of it from the L2 cache, and does 4 D FLOPs per
// visible key and row, so ROWS FLOPs a byte: the matrix units are the limit. Next come shared memory, from which a warp has
// each K and V once for up to 32 rows, and a power of two for each score. While one block computes these another multiplies:
// with D = 128 a thread needs all of its 255 registers, and two blocks, 8 warps, fit on a multiprocessor; they use 136 KB
// of its shared memory. Writes out.
//
// An int8 cache is copied as it is, eight codes to where their eight entries will be, and the lane that copied them widens
// them there; scores and p are multiplied by the scales, which lie in the padding behind the rows of K and V.
//
// Left open: T (16 bits), D (a multiple of 16, at most 256), ROWS (128, or 64 where D > 128), INT8 (1: so is the cache),
// SHARED (bytes of q, K and V).
constexpr int WARPS = 4, KEYS = 64, MINE = ROWS / WARPS / 16, PITCH = D + 8;
template <int> struct EntryOf { typedef T type; };
template <> struct EntryOf<1> { typedef signed char type; };
typedef EntryOf<INT8>::type Entry;  // of the cache
constexpr int CHUNKS = D / 8, CHUNK = 8 * sizeof(Entry);  // of a row, and the bytes of one in the cache
static_assert(SHARED == (ROWS + 2 * KEYS) * PITCH * sizeof(T), "as many bytes as the launch says");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
tiled_attention(const T* q, const Entry* k_cache, const Entry* v_cache, const bf16* k_scales, const bf16* v_scales,
                const int* block_tables, const int* context_lens, const int* query_start, T* out, int B, int M,
                int block_size, int few, int heads, int kv_heads, int q_stride, int window, float scale) {
    DYNAMIC_SHARED(memory);
    T *queries = (T*)memory, *keys = queries + ROWS * PITCH, *values = keys + KEYS * PITCH;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int group = heads / kv_heads, kv_head = blockIdx.y;

    // The tiles of request b are numbered from here: enough numbers for each, as at most every `few` queries beyond one per
    // request there is another request with many.
    auto first_tile = [&](int b) { return query_start[b] * group / ROWS + min(b, (query_start[b] - b) / few); };
    const int tile = gridDim.x - 1 - blockIdx.x;  // the last tiles of a prompt, which see the most keys, go first
    const int b = owner(tile, B, first_tile), row0 = (tile - first_tile(b)) * ROWS;
    const int start = query_start[b], n = query_start[b + 1] - start, rows = min(ROWS, n * group - row0);
    if (n <= few || rows <= 0) return;
    const int before = context_lens[b] - n, position0 = before + row0 / group, last = before + (row0 + rows - 1) / group;
    const int first = window ? max(0, position0 - window + 1) : 0;

    struct Row { int position, output; };  // where it stands, and where its output goes; -1: there is no such row
    auto row_info = [&](int row) { return (Row*)(queries + row * PITCH + D); };  // in the padding behind a row
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += 32 * WARPS) {
        int at = i / CHUNKS, row = row0 + min(at, rows - 1), query = row / group, head = kv_head * group + row % group;
        copy_async(queries + at * PITCH + i % CHUNKS * 8,
                   q + (long long)(start + query) * q_stride + head * D + i % CHUNKS * 8);
        if (i % CHUNKS == 0) *row_info(at) = {before + query, at < rows ? (start + query) * heads + head : -1};
    }
    // A warp copies EACH of the keys or values, SIDE lanes a row; one lane looks up where it lies, shuffles tell the others.
    constexpr int EACH = KEYS / WARPS, SIDE = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    float next_factor = 1;  // lanes 0 .. 15: the scales of the warp's keys, 16 .. 31: those of their values
    auto find = [&](int j) {
        int at = min(j + warp * EACH + lane % EACH, last);  // past the last key that one again: nobody sees it there
        int block = block_tables[b * M + at / block_size];
        if (INT8) {
            long long place = ((long long)block * kv_heads + kv_head) * block_size + at % block_size;
            next_factor = to_float((lane < EACH ? k_scales : v_scales)[place]);
        }
        return block * block_size + at % block_size;
    };
    auto factor_of = [&](T* rows, int key) { return (float*)(rows + key * PITCH + D); };
    const int stride = kv_heads * D * sizeof(Entry), share = kv_head * D + lane % SIDE * 8;
    auto mine = [&](T* rows) { return rows + (warp * EACH + lane / SIDE) * PITCH + lane % SIDE * 8; };
    auto start_copies = [&](T* rows, const Entry* cache, int slot) {
        T* to = mine(rows);
        #pragma unroll
        for (int i = 0; i < EACH; i += 32 / SIDE) {
            const char* row = (const char*)(cache + share) + (long long)__shfl_sync(ALL, slot, i + lane / SIDE) * stride;
            for (int j = 0; j < CHUNKS; j += SIDE) copy_async<CHUNK>(to + i * PITCH + j * 8, row + j * CHUNK);
        }
    };
    auto finish_copies = [&](T* rows) {
        wait_for_copies();
        #pragma unroll
        for (int i = 0; INT8 && i < EACH; i += 32 / SIDE)
            for (int j = 0; j < CHUNKS; j += SIDE) {
                T* chunk = mine(rows) + i * PITCH + j * 8;
                Vec<unsigned, 2> codes = *(Vec<unsigned, 2>*)chunk;
                Vec<unsigned, 4> wide;
                for (int w = 0; w < 4; w++)
                    wide.at[w] = widen_int8(T(), codes.at[w / 2], w % 2 * 2, codes.at[w / 2], w % 2 * 2 + 1);
                *(Vec<unsigned, 4>*)chunk = wide;
            }
        __syncthreads();
    };
    int slot = find(first);
    start_copies(keys, k_cache, slot);

    // The lane's rows are this one and 8, 16 and 24 further; of a row it has two neighbours in each eight entries.
    const int row = warp * 16 * MINE + g;
    float acc[MINE][D / 8][4] = {}, total[MINE][2] = {}, top[MINE][2];
    for (int m = 0; m < MINE; m++) top[m][0] = top[m][1] = -INFINITY;
    scale *= 1.44269504f;  // log2(e): the hardware has 2^x, not e^x
    // Where the row that the lane gives `load_matrices` begins, in 16 rows by 16 entries, four matrices. The second matrix
    // is the one below the first; of K, whose rows are the instruction's columns, the one beside it.
    const int below = lane % 16 * PITCH + lane / 16 * 8, beside = (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;

    for (int j = first; j <= last; j += KEYS) {
        finish_copies(keys);  // and all warps are done with the last values and scales
        start_copies(values, v_cache, slot);
        if (INT8) *factor_of(lane < EACH ? keys : values, warp * EACH + lane % EACH) = next_factor;
        slot = find(j + KEYS);
        float s[MINE][KEYS / 8][4] = {};
        auto multiply_by_scales = [&](T* rows) {  // of K or V
            for (int i = 0; i < KEYS / 4; i++) {
                float factor = *factor_of(rows, i / 2 * 8 + i % 2 + 2 * c);
                for (int m = 0; m < MINE; m++)
                    for (int h = 0; h < 2; h++) s[m][i / 2][2 * h + i % 2] *= factor;
            }
        };
        #pragma unroll
        for (int d = 0; d < D; d += 16) {
            unsigned a[MINE][4], k[4];
            for (int m = 0; m < MINE; m++) load_matrices(a[m], queries + (warp * MINE + m) * 16 * PITCH + d + below);
            #pragma unroll
            for (int key = 0; key < KEYS; key += 16) {
                load_matrices(k, keys + key * PITCH + d + beside);
                for (int h = 0; h < 2; h++) {
                    unsigned x[2] = {k[2 * h], k[2 * h + 1]};
                    for (int m = 0; m < MINE; m++) mma(T(), s[m][key / 8 + h], a[m], x);
                }
            }
        }
        finish_copies(values);  // and all warps are done with the keys
        if (j + KEYS <= last) start_copies(keys, k_cache, slot);
        if (INT8) multiply_by_scales(keys);
        bool all_visible = j + KEYS <= position0 + 1 && (!window || j > last - window);
        #pragma unroll
        for (int m = 0; m < MINE; m++)
            for (int h = 0; h < 2; h++) {
                float largest = top[m][h];
                if (!all_visible) {
                    int right = row_info(row + 16 * m + 8 * h)->position - j - 2 * c, left = window ? right - window : -1;
                    for (int i = 0; i < KEYS / 4; i++)
                        if (int at = i / 2 * 8 + i % 2; at > right || at <= left) s[m][i / 2][2 * h + i % 2] = -INFINITY;
                }
                for (int i = 0; i < KEYS / 4; i++) largest = fmaxf(largest, s[m][i / 2][2 * h + i % 2]);
                for (int i = 1; i < 4; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, i));
                float base = largest == -INFINITY ? 0 : largest * scale;  // 0: a row that has seen nothing yet
                float shrink = power_of_2(top[m][h] * scale - base);
                top[m][h] = largest;
                total[m][h] *= shrink;
                if (INT8) base -= 6;  // 64 p, for the reason that `paged_attention` gives
                for (int i = 0; i < KEYS / 4; i++) {
                    float& p = s[m][i / 2][2 * h + i % 2];
                    total[m][h] += p = power_of_2(p * scale - base);
                }
                for (int i = 0; i < D / 4; i++) acc[m][i / 2][2 * h + i % 2] *= shrink;
            }
        if (INT8) multiply_by_scales(values);
        #pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            unsigned p[MINE][4], v[4];
            for (int m = 0; m < MINE; m++)
                for (int i = 0; i < 4; i++) {
                    const float* pair = &s[m][key / 8 + i / 2][i % 2 * 2];
                    p[m][i] = make_pair(T(), pair[0], pair[1]);
                }
            #pragma unroll
            for (int d = 0; d < D; d += 16) {
                load_transposed(v, values + key * PITCH + d + below);
                for (int h = 0; h < 2; h++) {
                    unsigned x[2] = {v[2 * h], v[2 * h + 1]};
                    for (int m = 0; m < MINE; m++) mma(T(), acc[m][d / 8 + h], p[m], x);
                }
            }
        }
    }

    #pragma unroll
    for (int m = 0; m < MINE; m++)
        for (int h = 0; h < 2; h++) {
            for (int i = 1; i < 4; i *= 2) total[m][h] += __shfl_xor_sync(ALL, total[m][h], i);
            const int output = row_info(row + 16 * m + 8 * h)->output;
            if (output < 0) continue;
            unsigned* to = (unsigned*)(out + (long long)output * D) + c;
            const float factor = 1 / total[m][h];
            for (int i = 0; i < D / 8; i++) {
                const float* pair = &acc[m][i][2 * h];
                store<unsigned, 1>(to + 4 * i, {make_pair(T(), pair[0] * factor, pair[1] * factor)});
            }
        }
}
"""

CUDA["few_rows_linear"] = r"""
// out[row, o] = sum over k of x[row, k] * code[o, k] * scale[o, k / GROUP], for a few rows. With `ends` there are `experts`
// weights, and rows ends[e - 1] to ends[e] - 1 are multiplied by number e.
//
// Grid (ROWS rows, OUTPUTS outputs). The warps of a block share out k: of each output's codes the first 64 bytes go to one
// warp, the next 64 to the next. A lane reads 16 bytes of MINE outputs straight into registers, turns them into pairs of T,
// and multiplies: codes [16, k] times x^T [k, 8 rows]. The sum over k may be taken in any order, so a lane loads neighbours
// in place of the scattered ones that the instruction expects of it.
//
// Reads each code once for every ROWS rows, but once from memory: the blocks of the same outputs run side by side, and all
// but the first find it in the L2 cache, as they find x, read once for every OUTPUTS outputs. Does 2 FLOPs per code and row:
// memory is the limit. It takes long to answer, so a lane asks for codes AHEAD steps before it needs them: a block waits for
// 32 KB, and three may run on a multiprocessor, two with 16 rows.
// The next limit are instructions. An H200 issues about 100 in the time in which memory brings the 16 bytes for each lane of
// a warp; to widen and multiply them takes 76 with 4 bits, 41 with 8. With 16 rows it takes 80 and 42, for what is widened
// once is multiplied twice.
// The last is the L2 cache, 1.4 to 2 times as fast as memory (H200, A100). To every 16 rows it gives a code, and a byte of x
// for it: to 64 rows 8 bytes with 8 bits, 6 with 4. To widen the whole weight, by `dequantize`, and multiply by that, moves
// 5 or 4.6 bytes through memory, however many rows there are: beyond 64 that is less.
//
// With `ends`, all rows of a block have one weight, or each row has a block, `alone`. Else those of expert e begin with
// number ends[e - 1] / ROWS + e. That is room for all, and there may be blocks between that find no row.
//
// Left open: T (16 bits), BITS (8: one scale per output, applied to the sum; 4: one per group, applied to the pairs; 16:
// codes are Ts, without scales), GROUP (for 4 bits: inputs that share a scale), ROWS (8 or 16).
constexpr int OUTPUTS = 2 * ROWS, MINE = OUTPUTS / 8, AHEAD = 32 / ROWS;
constexpr int WARPS = 8, PER_LANE = 128 / BITS;  // codes in 16 bytes
constexpr int STEP = 4 * WARPS * PER_LANE;       // inputs that the block takes at a time
constexpr bool EVEN = STEP % GROUP == 0;         // so the next scale is always as far from the last

__device__ unsigned twice(float x) { return make_pair(T(), x, x); }
// The power of two above which neighbouring Ts are 1 apart, and its bits, twice: what is put into the last ones is added.
__device__ unsigned base_bits(bf16) { return 0x43004300; }
__device__ unsigned base_bits(fp16) { return 0x64006400; }
__device__ float base(bf16) { return 128; }
__device__ float base(fp16) { return 1024; }

// The i-th of the pairs that a lane's 16 bytes hold.
__device__ unsigned widen(const Vec<unsigned, 4>& codes, int i, float scale) {
    if (BITS == 16) return codes.at[i];
    if (BITS == 8) return widen_int8(T(), codes.at[i / 2], i % 2 * 2, codes.at[i / 2], i % 2 * 2 + 1);
    unsigned pair = and_xor(codes.at[i / 4] >> i % 4 * 4, 0x000f000f, base_bits(T()));
    return fma2(T(), fma2(T(), pair, twice(1), twice(-base(T()) - 8)), twice(scale), twice(-0.f));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, ROWS == 8 ? 3 : 2)
few_rows_linear(const T* x, const void* codes, const bf16* scales, T* out, int rows, int outputs, int inputs,
               const int* ends, int experts, int alone) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int o = blockIdx.y * OUTPUTS, mine = (4 * warp + c) * PER_LANE;  // the lane's first input
    int r = blockIdx.x * ROWS, expert = 0;
    if (ends) {
        auto start = [&](int e) { return e ? ends[e - 1] : 0; };
        auto block = [&](int e) { return alone ? start(e) : start(e) / ROWS + e; };
        expert = owner(blockIdx.x, experts, block);
        const int at_once = alone ? 1 : ROWS;
        r = start(expert) + ((int)blockIdx.x - block(expert)) * at_once;
        rows = min(r + at_once, ends[expert]);
        if (r >= rows) return;
    }
    // Where the lane's inputs begin, in x and in the weight; past the last row or output the last again, to be dropped.
    const T* row[ROWS / 8];
    for (int m = 0; m < ROWS / 8; m++) row[m] = x + (long long)min(r + g + 8 * m, rows - 1) * inputs + mine;
    const unsigned* code_row[MINE];
    const bf16* scale_row[MINE];
    for (int h = 0; h < MINE; h++) {
        long long output = (long long)expert * outputs + min(o + g + 8 * h, outputs - 1);
        code_row[h] = (const unsigned*)codes + (output * inputs + mine) * BITS / 32;
        scale_row[h] = scales + output * (inputs / GROUP) + (EVEN ? mine / GROUP : 0);
    }
    Vec<unsigned, 4> w[AHEAD][MINE];
    bf16 scale[AHEAD][MINE];
    auto fetch = [&](int i, int k, int step) {  // for inputs from k on, `step` steps from where the pointers are
        for (int h = 0; h < MINE; h++) {
            w[i][h] = load<unsigned, 4>(code_row[h] + step * (STEP * BITS / 32));
            if (BITS == 4) scale[i][h] = scale_row[h][EVEN ? step * (STEP / GROUP) : k / GROUP];
        }
    };
    #pragma unroll  // or the arrays would not stay in registers
    for (int i = 0; i < AHEAD; i++) if (mine + i * STEP < inputs) fetch(i, mine + i * STEP, i);

    float acc[MINE / 2][ROWS / 8][4] = {};  // each (output g; rows 2c, 2c + 1), (output g + 8; rows 2c, 2c + 1)
    for (int first = mine; first < inputs; first += AHEAD * STEP) {
        #pragma unroll  // likewise
        for (int i = 0; i < AHEAD; i++) {
            const int k = first + i * STEP;
            if (k >= inputs) break;
            for (int j = 0; j < PER_LANE / 2; j += 4) {
                Vec<unsigned, 4> v[ROWS / 8];  // the lane's next 8 inputs
                for (int m = 0; m < ROWS / 8; m++) v[m] = load<unsigned, 4>((const unsigned*)(row[m] + i * STEP) + j);
                for (int half = 0; half < 4; half += 2)
                    for (int n = 0; n < MINE / 2; n++) {
                        unsigned a[4];
                        for (int e = 0; e < 4; e++) {
                            const int h = 2 * n + e % 2;
                            a[e] = widen(w[i][h], j + half + e / 2, BITS == 4 ? to_float(scale[i][h]) : 1);
                        }
                        for (int m = 0; m < ROWS / 8; m++) mma(T(), acc[n][m], a, {v[m].at[half], v[m].at[half + 1]});
                    }
            }
            if (k + AHEAD * STEP < inputs) fetch(i, k + AHEAD * STEP, i + AHEAD);
        }
        for (int m = 0; m < ROWS / 8; m++) row[m] += AHEAD * STEP;
        for (int h = 0; h < MINE; h++) {
            code_row[h] += AHEAD * (STEP * BITS / 32);
            if (EVEN) scale_row[h] += AHEAD * (STEP / GROUP);
        }
    }
    __shared__ float sums[WARPS][ROWS][OUTPUTS];
    for (int n = 0; n < MINE / 2; n++)
        for (int m = 0; m < ROWS / 8; m++)
            for (int e = 0; e < 4; e++) sums[warp][8 * m + 2 * c + e % 2][16 * n + g + e / 2 * 8] = acc[n][m][e];
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * OUTPUTS; i += 32 * WARPS) {
        const int column = i / OUTPUTS, output = i % OUTPUTS;
        if (o + output >= outputs || r + column >= rows) continue;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[w][column][output];
        if (BITS == 8) sum *= to_float(scales[expert * outputs + o + output]);
        put(&out[(long long)(r + column) * outputs + o + output], sum);
    }
}
"""

CUDA["dequantize"] = r"""
// out[i] = code[i] * scale of i's group, for all entries of a weight, row after row.
//
// Grid (1,024 vectors of N entries). A thread takes four of them, and asks for the codes of all before it widens the first:
// it waits for 32 bytes with 8 bits, for 16 with 4. The vectors beside its own are its neighbours', so that what a warp
// stores at a time fills whole lines of the cache. Reads BITS / 8 bytes per entry and a scale per group, writes sizeof(T);
// does some ten instructions per entry, half of what an H200 could do meanwhile: memory is the limit.
// The product is taken in float, where it is exact, and rounded once: every bit is that of the definition in PyTorch.
//
// Left open: T, BITS (8 or 4), N (a divisor of the group; with 4 bits 8, a word).
constexpr int AT_ONCE = 4;

extern "C" __global__ void __launch_bounds__(256)
dequantize(const unsigned char* codes, const bf16* scales, T* out, int vectors, int group) {
    const long long first = (long long)blockIdx.x * AT_ONCE * blockDim.x + threadIdx.x;
    Vec<unsigned char, N * BITS / 8> bytes[AT_ONCE];
    float scale[AT_ONCE];
    #pragma unroll
    for (int v = 0; v < AT_ONCE; v++) if (long long at = first + v * blockDim.x; at < vectors) {
        bytes[v] = load<unsigned char, N * BITS / 8>(codes + at * (N * BITS / 8));
        scale[v] = to_float(scales[(unsigned)at / (unsigned)(group / N)]);
    }
    #pragma unroll
    for (int v = 0; v < AT_ONCE; v++) if (long long at = first + v * blockDim.x; at < vectors) {
        Vec<T, N> wide;
        for (int j = 0; j < N; j++) {
            const int i = j / 2 + j % 2 * 4;  // with 4 bits, which four of the word
            const int code = BITS == 8 ? (signed char)bytes[v].at[j] : (bytes[v].at[i / 2] >> i % 2 * 4 & 15) - 8;
            put(&wide.at[j], code * scale[v]);
        }
        store<T, N>(out + at * N, wide);
    }
}
"""

CUDA["sample"] = r"""
// One token per row of logits: temperature, top-k, top-p, min-p, then the token where the cumulative probability passes
// the row's noise; temperature 0: the most likely one.
//
// Grid (row), 1,024 threads. Nothing is sorted. All filters come down to a least logit that is kept, and `reach` finds it.
// Probabilities are integers, in units of 2^-40 of the largest: integer sums are the same in any order, so a row's token
// does not depend on which thread was faster.
//
// A row is read
//   * for its largest logit; if the request is greedy, that is all
//   * with top-k or top-p, to put the likeliest two thousand tokens aside, in shared memory, and for top-p to add up the
//     mass of all. If all that is kept is among these, which is the rule, the row is not needed again
//   * else three or four times for each of the two filters, and if both are on once for the mass that top-k leaves to top-p
//   * unless what is kept was put aside: for the mass of 32 stretches of the vocabulary; the one that is hit twice more
// To find the largest, a GPU waits for memory. To divide and exponentiate a logit as exactly as PyTorch does takes some 30
// instructions, and in that time memory brings more than 4 bytes: where masses are added up, instructions are the limit.
// Left open: T.
typedef unsigned long long u64;
constexpr int THREADS = 1024, WARPS = THREADS / 32, CANDIDATES = 4096;
constexpr int N = 16 / sizeof(T), AHEAD = 16 / N;  // logits of one load; loads that a thread has under way
constexpr unsigned NO_MASS = 0x41e00000;           // the depth 28: exp(-28) < 2^-40, so no token there can be drawn

// The sum of x over the lanes up to this one.
__device__ u64 warp_prefix_sum(u64 x) {
    for (int i = 1; i < 32; i *= 2) {
        u64 other = __shfl_up_sync(ALL, x, i);
        if (threadIdx.x % 32 >= i) x += other;
    }
    return x;
}

// The sum of x over the threads before this one; `all` gets that over all threads.
__device__ u64 prefix_sum(u64 x, u64* all) {
    __shared__ u64 of_warp[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = warp_prefix_sum(x);
    __syncthreads();  // another warp may still be reading the last sums
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    u64 warps = warp_prefix_sum(of_warp[lane]);
    *all = __shfl_sync(ALL, warps, 31);
    return __shfl_sync(ALL, warps - of_warp[lane], warp) + sum - x;
}

// A token that may be drawn. Depth: how far its logit lies below the largest, after temperature: as bits, for non-negative
// floats sort like their bits.
struct Token { unsigned depth; int id; };
__device__ u64 mass(unsigned depth) { return (u64)(expf(-__uint_as_float(depth)) * 1099511627776.f); }

struct Row {
    const T* logits;
    float largest, temperature;
    __device__ unsigned depth(float x) const { return __float_as_uint(fmaxf((largest - x) / temperature, 0.f)); }
    // How many logits lie between logits[0] and the multiple of 16 bytes before it, where vectors may be loaded.
    __device__ int skew() const { return (long long)logits % 16 / sizeof(T); }
    // Calls f(i, logit i) for all begin <= i < end, shared out among `lanes` threads; and for a few outside, as -inf.
    template <class F> __device__ void read(int begin, int end, int lane, int lanes, F f) const {
        for (int first = begin - (begin + skew()) % N + lane * N; first < end; first += AHEAD * lanes * N) {
            Vec<T, N> x[AHEAD];
            for (int a = 0; a < AHEAD; a++) {
                const int i = first + a * lanes * N;
                if (i >= begin && i + N <= end) x[a] = load<T, N>(logits + i);
                else for (int j = 0; j < N; j++)
                    if (i + j >= begin && i + j < end) x[a].at[j] = logits[i + j]; else put(&x[a].at[j], -INFINITY);
            }
            for (int a = 0; a < AHEAD; a++)
                for (int j = 0; j < N; j++) f(first + a * lanes * N + j, to_float(x[a].at[j]));
        }
    }
};

// The tokens from `begin` to `end` of a row or, where there is one, of a list; shared out among `lanes` threads.
struct Tokens {
    Row row;
    const Token* list;
    int begin, end, lane, lanes;
    template <class F> __device__ void each(F f) const {
        if (list) for (int i = begin + lane; i < end; i += lanes) f(list[i]);
        else row.read(begin, end, lane, lanes, [&](int i, float x) { f({row.depth(x), i}); });
    }
};

// The least key from low to high up to which tokens have a weight of `need` together. If all of them have less: high + 1,
// and `need` is what is still missing. It is found ten bits at a time: what lies from low to high is thrown into a bin for
// each thread, and the bin where the sum passes `need` is looked at more closely. No instruction adds 64 bits to shared
// memory: bins[0] are the lower halves of the sums, bins[1] the upper.
__shared__ unsigned bins[2][THREADS];
template <class Key, class Weight>
__device__ unsigned reach(Tokens from, u64& need, unsigned low, unsigned high, Key key, Weight weight) {
    __shared__ unsigned hit;
    __shared__ u64 before_hit;
    for (;;) {
        const int shift = max(22 - __clz(high - low), 0);
        bins[0][threadIdx.x] = bins[1][threadIdx.x] = 0;
        __syncthreads();
        from.each([&](Token token) {
            const unsigned i = key(token) - low;
            if (i > high - low) return;
            const u64 w = weight(token);
            const unsigned old = atomicAdd(&bins[0][i >> shift], (unsigned)w);
            const unsigned upper = (w >> 32) + (old + (unsigned)w < old);
            if (upper) atomicAdd(&bins[1][i >> shift], upper);
        });
        __syncthreads();
        u64 mine = (u64)bins[1][threadIdx.x] << 32 | bins[0][threadIdx.x], all, before = prefix_sum(mine, &all);
        if (all < need) {
            need -= all;
            return high + 1;
        }
        if (before < need && need <= before + mine) hit = threadIdx.x, before_hit = before;
        __syncthreads();
        need -= before_hit;
        low += hit << shift;
        if (shift == 0) return low;
        high = low + (1u << shift) - 1;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sample(const T* logits, const float* temperature, const long long* top_k, const float* top_p, const float* min_p,
       const double* noise, long long* out, int V, int stride) {
    __shared__ float warp_largest[WARPS], warp_worst[WARPS];
    __shared__ int warp_place[WARPS], all_sound, count;
    const int row = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    Row r = {logits + (long long)row * stride, -INFINITY, temperature[row]};

    int place = V;
    bool sound = true;
    r.read(0, V, thread, THREADS, [&](int i, float x) {
        if (x > r.largest) r.largest = x, place = i;
        sound = sound && x < INFINITY;  // false for NaN, too
    });
    if (thread == 0) all_sound = 1, count = 0;
    __syncthreads();
    if (!sound) all_sound = 0;
    float worst = r.largest;
    auto merge = [&](float other, int at) {  // of equal ones the first
        if (other > r.largest || (other == r.largest && at < place)) r.largest = other, place = at;
    };
    for (int i = 16; i; i /= 2) {
        worst = fminf(worst, __shfl_xor_sync(ALL, worst, i));
        float other = __shfl_xor_sync(ALL, r.largest, i);
        merge(other, __shfl_xor_sync(ALL, place, i));
    }
    if (lane == 0) warp_largest[warp] = r.largest, warp_place[warp] = place, warp_worst[warp] = worst;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) merge(warp_largest[w], warp_place[w]), worst = fmaxf(worst, warp_worst[w]);
    if (r.temperature == 0 || place == V || !all_sound) {
        if (thread == 0) out[row] = place == V || !all_sound ? -1 : place;
        return;
    }

    // Candidates for top-k and top-p: what is no deeper than the worst of 32 threads' best, in the warp where that is least
    // deep. As every thread has seen logits from all over the row, these are about 2.2 for each thread.
    __shared__ Token candidates[CANDIDATES];
    const unsigned deepest = min(r.depth(worst), NO_MASS);
    const u64 k = max(top_k[row], 0ll);
    unsigned limit = NO_MASS;  // the deepest that is kept
    bool listed = false;       // whether all that is kept is among the candidates
    u64 mine = 0, all;         // sums of masses
    auto kept = [&](Token token) { return token.depth <= limit ? mass(token.depth) : 0; };
    const Tokens everything = {r, nullptr, 0, V, thread, THREADS};
    Tokens list = {r, candidates, 0, 0, thread, THREADS}, from = everything;
    if (k > 0 || top_p[row] < 1) {
        everything.each([&](Token token) {
            if (k == 0) mine += mass(token.depth);
            if (token.depth > deepest) return;
            const int i = atomicAdd(&count, 1);
            if (i < CANDIDATES) candidates[i] = token;
        });
        prefix_sum(mine, &all);
        const bool fit = count <= CANDIDATES;
        list.end = count;
        auto filter = [&](u64 need, bool counted) {
            auto depth = [](Token token) { return token.depth; };
            auto weight = [&](Token token) { return counted ? 1 : kept(token); };
            unsigned found = 0;
            if (fit) found = reach(list, need, 0, deepest, depth, weight);
            if (!fit || (found > deepest && found <= limit))  // it lies deeper than the candidates
                found = reach(everything, need, found, limit, depth, weight);
            limit = min(found, limit);
            listed = fit && limit <= deepest;
        };
        if (k > 0) filter(k, true);
        if (top_p[row] < 1) {
            if (k > 0) {  // what is left of the mass
                from = listed ? list : everything;
                from.each([&](Token token) { mine += kept(token); });
                prefix_sum(mine, &all);
            }
            filter(max((u64)ceil((double)top_p[row] * (double)all), 1ull), false);
        }
    }
    if (min_p[row] > 0) limit = min(limit, __float_as_uint(fmaxf(-logf(min_p[row]), 0.f)));

    // Draw. Without a list each warp adds up a stretch of the vocabulary, and the one that is hit is searched.
    __shared__ int hit;
    __shared__ u64 before_hit;
    const int first = -r.skew(), length = ((V - first) / (THREADS * N) + 1) * 32 * N;
    auto stretch = [&](int w, int lane, int lanes) {
        return Tokens{r, nullptr, max(0, first + w * length), min(V, first + (w + 1) * length), lane, lanes};
    };
    from = listed ? list : stretch(warp, lane, 32);
    mine = 0;
    from.each([&](Token token) { mine += kept(token); });
    const u64 before = prefix_sum(mine, &all), before_warp = __shfl_sync(ALL, before, 0);
    const u64 target = min((u64)(noise[row] * (double)all), all - 1);
    if (before <= target && target < before + mine) hit = warp, before_hit = listed ? 0 : before_warp;  // in one thread
    __syncthreads();
    from = listed ? list : stretch(hit, thread, THREADS);
    u64 need = target + 1 - before_hit;
    const unsigned low = listed ? 0 : from.begin, high = (listed ? V : from.end) - 1;
    const unsigned token = reach(from, need, low, high, [](Token token) { return token.id; }, kept);
    if (thread == 0) out[row] = token;
}
"""
