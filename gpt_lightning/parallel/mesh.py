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

    Where replicas share out what they hold, so many adjacent ones as `shard_size` says have one copy of it
    between them, and there are `dp_size / shard_size` copies: an axis between the other two.

    `cuts_sequence` says whether, at the moment, the peers cut activations along the sequence. A layer's
    training mode could not tell: a frozen block in evaluation mode would take a part for the whole.
    """

    cuts_sequence = False

    def __init__(
        self,
        device_type: str,
        world_size: int,
        tp_size: int,
        timeout: timedelta | None = None,
        shard_size: int = 1,
    ) -> None:
        self.device_type, self.shard_size = device_type, shard_size
        self.dp_size, self.tp_size = world_size // tp_size, tp_size
        self.dp_rank, self.tp_rank = divmod(dist.get_rank(), self.tp_size)
        self.copy, shard_rank = divmod(self.dp_rank, shard_size)
        grid = torch.arange(world_size).view(-1, shard_size, tp_size)
        of_copies, of_shards = grid[:, shard_rank, self.tp_rank], grid[self.copy, :, self.tp_rank]

        def group(ranks: torch.Tensor) -> Any:
            # Made here, since the groups that a DeviceMesh makes know no timeout; other ranks take no part.
            return dist.new_group(ranks.tolist(), timeout, use_local_synchronization=True)

        self.dp_group = group(grid[:, :, self.tp_rank].flatten())
        self.tp_group = group(grid[self.copy, shard_rank])
        self.copy_group = self.dp_group  # of the ranks that hold the same
        groups, axes = [self.tp_group], ["tensor_parallel"]
        if shard_size > 1:
            shard_group = self.dp_group if shard_size == self.dp_size else group(of_shards)
            self.copy_group = group(of_copies)
            groups, axes = [*groups, shard_group], [*axes, "shard"]
            # What fully_shard takes: (copies,) shards.
            pair, ranks = [self.copy_group, shard_group], grid[:, :, self.tp_rank]
            self.replica_mesh = (
                _device_mesh(pair, device_type, ranks, ["copies", "shard"])
                if len(grid) > 1
                else _device_mesh(pair[1:], device_type, ranks[0], ["shard"])
            )
        # One copy of the model, in the order in which it is cut: first over the peers, then over the shards.
        own_copy = grid[self.copy].t() if shard_size > 1 else grid[self.copy, 0]
        self.parts_mesh = _device_mesh(groups, device_type, own_copy, axes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParallelMesh":
        return self  # process groups cannot be copied, and a copied module talks to the same peers

    def tp_peer(self, tp_rank: int) -> int:
        """Returns the global rank of a tensor-parallel peer of this rank."""
        return dist.get_global_rank(self.tp_group, tp_rank)

    def from_first_peer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites a tensor, such as sampled tokens, by that of the first tensor-parallel peer."""
        dist.broadcast(tensor, src=self.tp_peer(0), group=self.tp_group)
        return tensor


def _device_mesh(groups: list[Any], device_type: str, ranks: torch.Tensor, axes: list[str]) -> DeviceMesh:
    of_one_axis = groups[0] if len(groups) == 1 else groups
    return DeviceMesh.from_group(of_one_axis, device_type, mesh=ranks, mesh_dim_names=tuple(axes))
