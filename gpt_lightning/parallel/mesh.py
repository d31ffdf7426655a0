"""The grid of processes, data-parallel replicas by tensor-parallel peers, and its process groups."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gpt_lightning.exit_codes import UserError


def check_devices(devices_per_node: int, tensor_parallel_size: int) -> None:
    if tensor_parallel_size < 1:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size={tensor_parallel_size} is below 1; choose 1 for plain DDP"
        )
    if devices_per_node % tensor_parallel_size:
        size = f"trainer.strategy.tensor_parallel_size={tensor_parallel_size}"
        raise UserError(
            f"trainer.devices={devices_per_node} a node is not divisible by {size} (tensor-parallel peers "
            f"share a node); choose a multiple of {tensor_parallel_size}"
        )


class ParallelMesh:
    """Holds the process groups of this rank; tensor-parallel peers, which talk the most, are adjacent.

    `cuts_sequence` says whether, at the moment, the peers cut activations along the sequence. A layer's
    training mode could not tell: a frozen block in evaluation mode would take a part for the whole.
    """

    cuts_sequence = False

    def __init__(
        self, device_type: str, world_size: int, tp_size: int, timeout: timedelta | None = None
    ) -> None:
        self.dp_size, self.tp_size = world_size // tp_size, tp_size
        grid = torch.arange(world_size).view(self.dp_size, self.tp_size)
        dp_rank, tp_rank = divmod(dist.get_rank(), self.tp_size)
        # Made here, since the groups that a DeviceMesh makes know no timeout; ranks outside take no part.
        groups: Any = [
            dist.new_group(ranks.tolist(), timeout, use_local_synchronization=True)
            for ranks in (grid[:, tp_rank], grid[dp_rank])
        ]
        self.dp_group, self.tp_group = groups
        axes = ("data_parallel", "tensor_parallel")
        self.device_mesh = DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=axes)
        self.dp_rank, self.tp_rank = dp_rank, tp_rank

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParallelMesh":
        return self  # process groups cannot be copied, and a copied module talks to the same peers

    def tp_peer(self, tp_rank: int) -> int:
        """Returns the global rank of a tensor-parallel peer of this rank."""
        return dist.get_global_rank(self.tp_group, tp_rank)

    def from_first_peer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites a tensor, such as sampled tokens, by that of the first tensor-parallel peer."""
        dist.broadcast(tensor, src=self.tp_peer(0), group=self.tp_group)
        return tensor
