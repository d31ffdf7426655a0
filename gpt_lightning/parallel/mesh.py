"""Who works with whom: a grid of processes, data-parallel replicas by tensor-parallel peers."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("data_parallel", "tensor_parallel")


def check_devices(devices_per_node: int, tensor_parallel_size: int) -> None:
    if tensor_parallel_size < 1:
        raise ValueError(
            f"trainer.strategy.tensor_parallel_size={tensor_parallel_size} is below 1; choose 1 for plain DDP"
        )
    if devices_per_node % tensor_parallel_size:
        raise ValueError(
            f"trainer.devices={devices_per_node} a node is not divisible by trainer.strategy."
            f"tensor_parallel_size={tensor_parallel_size} (tensor-parallel peers share a node); choose a "
            f"multiple of {tensor_parallel_size}"
        )


class ParallelMesh:
    """The process groups of this rank. Tensor-parallel peers, which talk the most, have adjacent ranks."""

    def __init__(self, device_type: str, world_size: int, tensor_parallel_size: int) -> None:
        shape = (world_size // tensor_parallel_size, tensor_parallel_size)
        self.device_mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        self.dp_size, self.tp_size = shape
        self.dp_rank, self.tp_rank = map(self.device_mesh.get_local_rank, AXES)
        self.dp_group, self.tp_group = map(self.device_mesh.get_group, AXES)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParallelMesh":
        return self  # process groups cannot be copied, and a copied module talks to the same peers

    def tp_peer(self, tp_rank: int) -> int:
        """Global rank of a tensor-parallel peer of this rank."""
        return dist.get_global_rank(self.tp_group, tp_rank)

    def from_first_peer(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first tensor-parallel peer's tensor, in place."""
        dist.broadcast(tensor, src=self.tp_peer(0), group=self.tp_group)
        return tensor
