"""What the ranks of a run tell each other, and what a run of one rank has no need to ask."""

from typing import Any

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, by rank; all ranks call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
