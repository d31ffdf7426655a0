"""What a run asks of the device it is on, of whatever kind that is."""

import os
import shutil
import sys
from functools import cache

import torch

GIB = 2**30


def runs_ahead(device: torch.device) -> bool:
    """Whether the host only queues work for the device, and waits when it reads a result."""
    return device.type != "cpu"


def finish_queue(device: torch.device) -> None:
    """Wait for the work that is queued."""
    if runs_ahead(device):
        torch.get_device_module(device).synchronize()


def peak_memory_gib(device: torch.device) -> float | None:
    """The most that this process has held: tensors on the device, on the CPU all that the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # kibibytes on Linux


@cache
def can_compile_for_cuda() -> bool:
    """Triton, and the C compiler that it needs to start its kernels."""
    from torch.utils._triton import has_triton  # which brings the compiler along

    compilers = [os.environ.get("CC"), "gcc", "clang"]
    return any(compiler and shutil.which(compiler) for compiler in compilers) and has_triton()
