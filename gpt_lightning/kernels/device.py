"""Answers what a run asks of the device it is on, of whatever kind that is."""

import ctypes
import os
import platform
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def peak_memory_gib(device: torch.device) -> float | None:
    """Returns the most memory that this process has held: tensors on the device, or all of it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # kibibytes on Linux


def host_memory() -> int:
    """Returns the bytes of memory that this machine has, or that a container's limit leaves of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    with suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=2**63)


def available_host_memory() -> int | None:
    """Returns the bytes that programs can still have, or None where the system does not tell."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return min(host_memory(), int(line.split()[1]) * 1024)
    return None


def trains_on_cpu(x: Tensor) -> bool:
    """Tells where our kernels for training may replace PyTorch's: on a CPU, uncompiled, with gradients."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cache
def can_compile_for_cuda() -> bool:
    """Tells whether there is Triton, and the C compiler that it needs to start its kernels."""
    from torch.utils._triton import has_triton  # which brings the compiler along

    compilers = [os.environ.get("CC"), "gcc", "clang"]
    return any(compiler and shutil.which(compiler) for compiler in compilers) and has_triton()


def keep_freed_memory() -> None:
    """Lets this process keep, for the next step, what memory a step on a CPU frees; a no-op without glibc.

    glibc gives every large block back, and the system clears its pages when they are asked for again: a sixth
    of a step's time at 124M parameters. The peak of memory stays within a few percent.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)  # older ones allow no more
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


@cache
def processor() -> str:
    """Names the processor as far as its kernels differ."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        lines = [line.partition(":") for line in first.splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        parts = [facts.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
        if any(parts):
            return " ".join(parts)
    return platform.processor() or platform.machine()
