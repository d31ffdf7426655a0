"""Exchanges values between all ranks of a run; a run of one rank needs no process group for it.

Only what every rank needs of every other is gathered: its cost grows with the number of ranks.
"""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(value: Any) -> list[Any]:
    """Returns the values of all ranks, by rank; all ranks call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_numbers(number: int) -> list[int]:
    """Returns the numbers of all ranks, which call it: of objects each would take its time."""
    if not dist.is_initialized():
        return [number]
    is_on_gpu = dist.get_backend() == "nccl"
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.long, device="cuda" if is_on_gpu else "cpu")
    numbers[dist.get_rank()] = number
    dist.all_reduce(numbers)
    return [int(each) for each in numbers.tolist()]


def together() -> None:
    """Waits until all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: Any) -> Any:
    """Returns the first rank's value; all ranks call it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def are_alike(value: bytes, device: torch.device) -> bool:
    """Tells on all ranks, which call it, whether all have the same, by a message as short for any number."""
    if not dist.is_initialized():
        return True
    digest = int.from_bytes(hashlib.blake2b(value, digest_size=7).digest(), "big")
    greatest = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    return int(greatest[0]) == -int(greatest[1])


def rows_on_first(row: Tensor, device: torch.device) -> Tensor | None:
    """Returns on the first rank the equally long rows of all, in host memory; None on the others."""
    row, is_first = row.to(device), dist.get_rank() == 0
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())] if is_first else None
    dist.gather(row, rows, dst=0)
    return torch.stack(rows).cpu() if rows is not None else None


def total(number: float, device: torch.device) -> float:
    """Returns the sum of all ranks' numbers; all ranks call it."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return float(numbers)
