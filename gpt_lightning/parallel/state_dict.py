"""Between the parts that this rank holds and the ordinary state dicts that a single process would have."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_lightning.checkpoint.files import verify
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, sharded_parameters


def gather_to_first(part: Tensor, shard: Shard, mesh: ParallelMesh) -> Tensor | None:
    """The full tensor, in host memory of the first tensor-parallel peer; None on the others.

    Parts arrive one after the other, so that a device never holds more than its own part and one more.
    """
    if mesh.tp_rank != 0:
        dist.send(part.detach().contiguous(), dst=mesh.tp_peer(0), group=mesh.tp_group)
        return None
    full = torch.empty(shard.full_shape(part), dtype=part.dtype)
    for peer in range(mesh.tp_size):
        start, stop = shard.bounds(peer)
        target = full.narrow(shard.dim, start, stop - start)
        arrived = part.detach()
        if peer != 0:
            arrived = torch.empty(target.shape, dtype=part.dtype, device=part.device)
            dist.recv(arrived, src=mesh.tp_peer(peer), group=mesh.tp_group)
        target.copy_(arrived)
    return full


def full_state_dict(module: nn.Module, mesh: ParallelMesh) -> dict[str, Any]:
    """The state dict of the whole model on the first peer; empty on the others, which must call it too."""
    shards = sharded_parameters(module)
    gathered: dict[nn.Parameter, Tensor | None] = {}
    full: dict[str, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter) and value in shards:
            if value not in gathered:  # tied parameters are one tensor in the file too
                gathered[value] = gather_to_first(value, shards[value], mesh)
            full[name] = gathered[value]
        else:
            full[name] = value.detach() if isinstance(value, Tensor) else value
    return full if mesh.tp_rank == 0 else {}


def full_optimizer_state(
    optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard], mesh: ParallelMesh
) -> dict[str, Any]:
    """The optimizer's state dict for the whole model on the first peer; empty on the others."""
    full = map_optimizer_parts(optimizer, shards, lambda part, shard: gather_to_first(part, shard, mesh))
    return full if mesh.tp_rank == 0 else {}


def map_optimizer_parts(
    optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard], change: Callable[[Tensor, Shard], Any]
) -> dict[str, Any]:
    """The optimizer's state dict with `change` in place of every tensor that is cut like its parameter."""

    def changed(value: Any, parameter: nn.Parameter) -> Any:
        return change(value, shards[parameter]) if is_cut(value, parameter, shards) else value

    state_dict, parameters = optimizer.state_dict(), parameters_by_index(optimizer)
    state = {
        index: {key: changed(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def parameters_by_index(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters in the order by which a state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_cut(value: Any, parameter: nn.Parameter, shards: Mapping[nn.Parameter, Shard]) -> bool:
    """Whether an entry of a parameter's optimizer state is cut like it: moments are, counters are not."""
    if parameter not in shards or not isinstance(value, Tensor) or value.dim() == 0:
        return False
    if value.shape != parameter.shape:
        raise UserError(
            f"the optimizer keeps {list(value.shape)} numbers for a part {list(parameter.shape)} of a "
            "parameter, and nothing tells how to join them; choose an optimizer that works element by element"
        )
    return True


def read_mapped(path: Path) -> dict[str, Any]:
    """A checkpoint file, mapped and not read: a rank that takes its parts never has the whole in memory."""
    verify(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


def cut_state_dict(full: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """This rank's part of a whole model's state dict, as views."""
    shards = sharded_parameters(module)
    own = module.state_dict(keep_vars=True)
    result = dict(full)
    for name, value in full.items():
        parameter = own.get(name)
        if isinstance(parameter, nn.Parameter) and parameter in shards:
            result[name] = _cut_if_whole(value, parameter, shards[parameter])
    return result


def cut_optimizer_state(
    full: Mapping[str, Any], optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard]
) -> dict[str, Any]:
    """This rank's part of a whole model's optimizer state, copied: the whole may be mapped from a file."""
    parameters = parameters_by_index(optimizer)
    state = {}
    for index, entry in full["state"].items():
        parameter = parameters[index]
        if parameter in shards:
            shard = shards[parameter]
            entry = {key: _cut_if_whole(value, parameter, shard) for key, value in entry.items()}
        state[index] = {key: v.clone() if isinstance(v, Tensor) else v for key, v in entry.items()}
    return {**full, "state": state}


def _cut_if_whole(value: Any, parameter: nn.Parameter, shard: Shard) -> Any:
    """A tensor of any other shape stays, for `load_state_dict` to complain about in its own words."""
    whole = isinstance(value, Tensor) and list(value.shape) == shard.full_shape(parameter)
    return shard.cut(value) if whole else value
