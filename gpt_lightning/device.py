"""What a run asks of the device it is on, of whatever kind that is."""

import sys

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
