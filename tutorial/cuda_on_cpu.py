"""Runs the CUDA kernels of kernels.py on the CPU: the same source strings, compiled by the system's C++ compiler.

    import cuda_on_cpu, kernels
    with cuda_on_cpu.enabled():
        kernels.silu_mul(x)          # x on the CPU: the CUDA kernel's own code runs, one thread after the other

What CUDA's words mean here, and which mistakes are found, stands in cuda_on_cpu.h beside this file. To look into a
kernel, put a printf into its source in kernels.py and run it this way, or set a breakpoint: the libraries are built with
debugging information, and `gdb --args python ...` with `break paged_attention` stops inside.
"""

import ctypes
import functools
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels  # noqa: E402

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
compiler = kernels.cpp_compiler


class Launch(NamedTuple):
    """A kernel that ran. read, written: bytes of each argument by `load`, `store` and `copy_async` in the source;
    what it reaches number by number, such as block tables, is not counted. Of two arguments at one address the first has
    the bytes of both."""

    name: str
    grid: tuple
    block: int
    args: tuple
    read: list[int]
    written: list[int]


class CudaOnCpu:
    """Stands in for `kernels.CudaKernels`. `reverse`: the threads of a warp take turns in reverse order. `launches`: a list
    that gets every Launch. `num_sms`: for how many multiprocessors work is cut."""

    num_sms = 4  # few, but enough that attention is split

    def __init__(self, dtype: torch.dtype, reverse: bool = False, launches: list[Launch] | None = None,
                 num_sms: int | None = None):
        self.element, self.reverse, self.launches = kernels._CUDA_ELEMENTS[dtype], reverse, launches
        if num_sms is not None:
            self.num_sms = num_sms

    @_disable_current_modes()  # `Operations` are those of the program, not of the emulation
    def __call__(self, name: str, grid: tuple, block: int, *args, **constants) -> None:
        """Run kernel `name`. RuntimeError says what it did that it must not, and which thread of which block."""
        if not all(grid):  # as in `kernels.CudaKernels`
            return
        launch = library(kernels.cuda_source(name, self.element, **constants), name)
        guards = {arg.data_ptr(): Guarded(arg) for arg in args if isinstance(arg, torch.Tensor)}
        copies = [guards[arg.data_ptr()].copy if isinstance(arg, torch.Tensor) else arg for arg in args]
        pointers, _values = kernels.kernel_arguments(copies)
        sizes = (ctypes.c_uint * 4)(*grid, *(1,) * (3 - len(grid)), block)
        tensors = (ctypes.c_int64 * (4 * len(guards)))()  # of each: begin, end, bytes read, bytes written
        for i, guard in enumerate(guards.values()):
            tensors[4 * i : 4 * i + 2] = guard.copy.data_ptr(), guard.copy.data_ptr() + guard.size
        error = launch(sizes, pointers, tensors, len(guards), self.reverse)
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")
        for i, guard in enumerate(guards.values()):
            if not guard.put_back():
                raise RuntimeError(f"{name}: wrote outside of its tensor argument {i}")
        if self.launches is not None:
            traffic = dict(zip(guards, zip(tensors[2::4], tensors[3::4])))
            each = [traffic.pop(arg.data_ptr(), (0, 0)) if isinstance(arg, torch.Tensor) else (0, 0) for arg in args]
            self.launches.append(Launch(name, grid, block, args, *map(list, zip(*each))))


class Guarded:
    """A copy of a tensor between margins of NaN: who reads past its ends gets NaN, who writes there is found out.

    It begins as far from a multiple of 64 bytes as the tensor does, so that a view that is not aligned stays one.
    """

    MARGIN = 1024  # bytes

    def __init__(self, tensor: torch.Tensor):
        # Everything from the first to the last element, in the order of memory.
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        self.original = tensor.as_strided((span,), (1,)).view(torch.uint8)
        self.size = len(self.original)
        buffer = torch.full((self.size + 2 * self.MARGIN + 64,), 0xFF, dtype=torch.uint8)
        self.buffer = buffer[(tensor.data_ptr() - buffer.data_ptr()) % 64 :]
        self.copy = self.buffer[self.MARGIN : self.MARGIN + self.size]
        self.copy.copy_(self.original)

    def put_back(self) -> bool:
        """Take over what the kernel wrote; False if it wrote into the margins."""
        self.original.copy_(self.copy)
        return bool((self.buffer[: self.MARGIN] == 0xFF).all() and (self.buffer[self.MARGIN + self.size :] == 0xFF).all())


class Operations(TorchDispatchMode):
    """Counts what PyTorch itself computes within this: `launches`, operations that write something (views do not), and the
    bytes that they read and write. A CUDA kernel is none of them."""

    launches = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        results = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor)]
        if func.is_view or "empty" in name or name == "_unsafe_view" or not any(t.numel() for t in results):
            return out
        given = [t for t in args if isinstance(t, torch.Tensor)]
        # An index reads what it takes, not all that it could take; a copy does not read where it goes.
        given = results if name in ("index", "embedding") else given[name in ("copy_", "fill_") :]
        self.launches += 1
        self.bytes += sum(t.element_size() * math.prod(self.distinct(t)) for t in [*given, *results])
        return out

    @staticmethod
    def distinct(t):  # an expanded dimension is read once
        return [n for n, stride in zip(t.shape, t.stride()) if stride] if t.layout is torch.strided else t.shape


@functools.cache
def library(source: str, name: str):
    """Compile one kernel, and return the function that launches it: (sizes, arguments, reverse) -> error or None."""
    source = f"""#include "{HEADER.name}"
{source}
extern "C" const char* launch(const unsigned* n, void** args, void* tensors, size_t num_tensors, bool reverse) {{
    return cuda::launch([](void** a) {{ cuda::apply({name}, a); }}, {{n[0], n[1], n[2]}}, {{n[3], 1, 1}}, args, tensors,
                        num_tensors, reverse);
}}
"""
    # No fused multiply-add here: results should not depend on the machine that the tests run on.
    flags = ["-O2", "-g", "-std=c++17", "-ffp-contract=off", f"-I{HEADER.parent}"]
    if not (cxx := compiler()):
        raise RuntimeError(f"{name}: there is no C++ compiler to build it with (none in CXX, no c++, g++ or clang++)")
    try:
        target = kernels.build_library(f"cuda-on-cpu-{name}", cxx, flags, source, HEADER.read_text())
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{name}: {error.stderr}") from None
    launch = ctypes.CDLL(str(target)).launch
    launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool]
    launch.restype = ctypes.c_char_p
    return launch


@contextmanager
def enabled(reverse: bool = False, launches: list[Launch] | None = None, num_sms: int | None = None):
    """Within this, the CUDA bodies run, on tensors of the CPU. The options are those of CudaOnCpu. Gives `launches`."""
    before = kernels.cuda_on_cpu, kernels.use_cpp
    options = {"reverse": reverse, "launches": launches, "num_sms": num_sms}
    kernels.cuda_on_cpu, kernels.use_cpp = functools.partial(CudaOnCpu, **options), False
    try:
        yield launches
    finally:
        kernels.cuda_on_cpu, kernels.use_cpp = before
