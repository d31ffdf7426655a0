"""Checks cheaply that the ranks which should hold the same parameters do."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import is_shared, sharded_parameters
from gpt_lightning.parallel.sharded_replicas import local

DIFFERS = (
    "is not the same on all ranks that hold it, and what follows would be wrong. Seed all ranks alike "
    "(seed_everything) before the model is built, and let whatever changes parameters do so on all ranks"
)
USED_APART = (
    "has a gradient on some ranks and none on others, and what follows would be wrong. With trainer.strategy."
    "shard_replicas let all ranks use the same layers in a step, or leave it out, with "
    "find_unused_parameters=true"
)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(module: nn.Module, mesh: ParallelMesh, when: str) -> None:
    """Raises RuntimeError, on all ranks, if a parameter is not bit for bit the same wherever it should be.

    Parts are compared over the ranks that hold the same part, all else over all ranks, by the sums of their
    bits; of what replicas share, the rows. These must also have had a gradient on all ranks or on none: it is
    summed in the order in which a rank has used its layers, so that other layers' gradients would be added.
    """
    shards = sharded_parameters(module)
    named = list(module.named_parameters())
    if not named:
        return
    are_shared = is_shared(named[0][1])
    cut = torch.tensor([parameter in shards for _, parameter in named])
    sums = torch.stack([_bit_sum(local(parameter.detach())) for _, parameter in named]).to(mesh.device_type)
    differs = _differs(sums, mesh.copy_group if are_shared else mesh.dp_group)
    differs |= _differs(sums, mesh.tp_group) & ~cut.to(differs.device)
    used = torch.tensor([parameter.grad is not None for _, parameter in named]).to(sums)
    used_apart = _differs(used, mesh.dp_group) if are_shared else torch.zeros_like(differs)
    # A rank that sees a difference tells all others, so that all stop together.
    verdict = torch.stack([used_apart, differs]).to(torch.int32)
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
    for found, complaint in zip(verdict, (USED_APART, DIFFERS)):
        if len(different := found.nonzero()):
            raise RuntimeError(f"{when}, {named[int(different[0])][0]} {complaint}")


def _bit_sum(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGERS[x.element_size()]).sum(dtype=torch.int64)


def _differs(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tells, per entry, whether the least and the greatest value in a group differ."""
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return extremes[0] != -extremes[1]
