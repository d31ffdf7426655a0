"""Exchanges objects between all ranks of a run; a run of one rank needs no process group for it."""

from typing import Any

import torch.distributed as dist


def gathered(value: Any) -> list[Any]:
    """Returns the values of all ranks, by rank; all ranks call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
