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
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels  # noqa: E402

HEADER = Path(__file__).with_name("cuda_on_cpu.h")


def compiler() -> str | None:
    """The system's C++ compiler, if there is one."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class CudaOnCpu:
    """Stands in for `kernels.CudaKernels`. `reverse`: the threads of a warp take turns in reverse order."""

    num_sms = 4  # few, but enough that attention is split

    def __init__(self, dtype: torch.dtype, reverse: bool = False):
        self.element, self.reverse = kernels._CUDA_ELEMENTS[dtype], reverse

    def __call__(self, name: str, grid: tuple, block: int, *args, **constants) -> None:
        """Run kernel `name`. RuntimeError says what it did that it must not, and which thread of which block."""
        if not all(grid):  # as in `kernels.CudaKernels`
            return
        launch = library(kernels.cuda_source(name, self.element, **constants), name)
        guards = {arg.data_ptr(): Guarded(arg) for arg in args if isinstance(arg, torch.Tensor)}
        args = [guards[arg.data_ptr()].copy if isinstance(arg, torch.Tensor) else arg for arg in args]
        pointers, _values = kernels.kernel_arguments(args)
        sizes = (ctypes.c_uint * 4)(*grid, *(1,) * (3 - len(grid)), block)
        ends = [end for guard in guards.values() for end in (guard.copy.data_ptr(), guard.copy.data_ptr() + guard.size)]
        error = launch(sizes, pointers, (ctypes.c_void_p * len(ends))(*ends), len(guards), self.reverse)
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")
        for i, guard in enumerate(guards.values()):
            if not guard.put_back():
                raise RuntimeError(f"{name}: wrote outside of its tensor argument {i}")


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


@functools.cache
def library(source: str, name: str):
    """Compile one kernel, and return the function that launches it: (sizes, arguments, reverse) -> error or None."""
    source = f"""#include "{HEADER.name}"
{source}
extern "C" const char* launch(const unsigned* n, void** args, const void* tensors, size_t num_tensors, bool reverse) {{
    return cuda::launch([](void** a) {{ cuda::apply({name}, a); }}, {{n[0], n[1], n[2]}}, {{n[3], 1, 1}}, args, tensors,
                        num_tensors, reverse);
}}
"""
    # No fused multiply-add here: results should not depend on the machine that the tests run on.
    flags = ["-O2", "-g", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", f"-I{HEADER.parent}"]
    key = hashlib.sha256("\0".join([source, HEADER.read_text(), compiler(), *flags]).encode()).hexdigest()[:16]
    target = kernels.cache_folder() / f"cuda-on-cpu-{name}-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            (path := Path(scratch) / "kernel.cpp").write_text(source)
            built = Path(scratch) / "kernel.so"
            done = subprocess.run([compiler(), *flags, str(path), "-o", str(built)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr}")
            built.replace(target)
    launch = ctypes.CDLL(str(target)).launch
    launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool]
    launch.restype = ctypes.c_char_p
    return launch


@contextmanager
def enabled(reverse: bool = False):
    """Within this, the CUDA bodies run, on tensors of the CPU."""
    before = kernels.cuda_on_cpu, kernels.use_cpp
    kernels.cuda_on_cpu, kernels.use_cpp = functools.partial(CudaOnCpu, reverse=reverse), False
    try:
        yield
    finally:
        kernels.cuda_on_cpu, kernels.use_cpp = before
