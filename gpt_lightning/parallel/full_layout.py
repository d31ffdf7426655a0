"""Checkpoints as one ordinary file: parts are gathered to save it, and cut from it to load it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_lightning.checkpoint.atomic import set_aside
from gpt_lightning.checkpoint.files import OPTIMIZERS, WEIGHTS, is_sharded, verify
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import (
    Shard,
    is_shared,
    model_state,
    optimizer_state,
    parameters_of,
    sharded_parameters,
)
from gpt_lightning.parallel.sharded_replicas import rows_of, shared_like, sharing_group


class FullLayout:
    """Saves and loads the file that one process would write; all ranks call every method.

    State that is gathered is complete on the first rank and empty on the others.
    """

    def __init__(self, module: nn.Module, mesh: ParallelMesh, checkpoint_io: CheckpointIO) -> None:
        self.module, self.mesh, self.checkpoint_io = module, mesh, checkpoint_io

    def model_state(self) -> dict[str, Any]:
        """Returns the state dict of the whole model."""
        if self.mesh.copy != 0:  # other copies have nothing to add
            return {}
        whole = model_state(self.module, self._whole)
        return whole if dist.get_rank() == 0 else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state dict that the optimizer of the whole model would have."""
        if self.mesh.copy != 0:
            return {}
        whole = optimizer_state(optimizer, self.module, self._whole)
        return whole if dist.get_rank() == 0 else {}

    def _whole(self, part: Tensor, shard: Shard | None) -> Tensor | None:
        """Gathers a tensor, first from the replicas that share it and then from the peers, on rank 0."""
        whole: Tensor | None = part
        if is_shared(part):
            whole = gather(part.to_local(), rows_of(part), sharing_group(part))
        if whole is None or shard is None:
            return whole
        return gather_to_first(whole.to(self.mesh.device_type), shard, self.mesh)

    def save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> None:
        """Writes the file, in the first rank; a sharded checkpoint of that name makes way."""
        if dist.get_rank() != 0:
            return
        # A plugin that takes options may only begin to write, and makes way itself when it does.
        makes_way = storage_options is None and is_sharded(Path(path))
        with set_aside(Path(path)) if makes_way else nullcontext():
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def read(self, path: str | Path) -> dict[str, Any]:
        """Returns the checkpoint, mapped and not read: no rank ever has the whole in memory."""
        is_plain = type(self.checkpoint_io).load_checkpoint is TorchCheckpointIO.load_checkpoint
        if is_plain and Path(path).is_file():
            verify(Path(path))
            mapped: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return mapped
        return self.checkpoint_io.load_checkpoint(path, weights_only=True)

    def load_model(self, checkpoint: Mapping[str, Any], *, strict: bool) -> None:
        """Gives the module this rank's part of each tensor."""
        shards, own = sharded_parameters(self.module), self.module.state_dict(keep_vars=True)
        parts = {name: _cut(value, own.get(name), shards) for name, value in checkpoint[WEIGHTS].items()}
        self.module.load_state_dict(parts, strict=strict)

    def load_optimizers(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Gives the optimizers this rank's part of their state."""
        shards = sharded_parameters(self.module)
        for optimizer, whole in zip(optimizers, checkpoint[OPTIMIZERS]):
            parameters, state = parameters_of(optimizer), {}
            for index, entry in whole["state"].items():
                own = {key: _cut(value, parameters[index], shards) for key, value in entry.items()}
                # Copied, since the optimizer changes it and the whole may be mapped from a file.
                state[index] = {key: v.clone() if isinstance(v, Tensor) else v for key, v in own.items()}
            optimizer.load_state_dict({**whole, "state": state})


def gather_to_first(part: Tensor, shard: Shard, mesh: ParallelMesh) -> Tensor | None:
    """Returns the full tensor, in host memory, on the first tensor-parallel peer; None on the others."""
    return gather(part, shard, mesh.tp_group)


def gather(part: Tensor, shard: Shard, group: dist.ProcessGroup) -> Tensor | None:
    """Returns the full tensor, in host memory, on the first rank of the group; None on the others.

    Parts arrive one after the other, so that a device never holds more than its own part and one more.
    """
    if dist.get_rank(group) != 0:
        if part.numel():  # a tensor of few rows may have none for the last ranks
            dist.send(part.detach().contiguous(), group=group, group_dst=0)
        return None
    full = torch.empty(shard.full_shape(part), dtype=part.dtype)
    own, *others = full.split(shard.sizes, shard.dim)
    own.copy_(part.detach())
    for peer, target in enumerate(others, start=1):
        if target.numel():
            arrived = torch.empty(target.shape, dtype=part.dtype, device=part.device)
            dist.recv(arrived, group=group, group_src=peer)
            target.copy_(arrived)
    return full


def _cut(value: Any, own: Any, shards: Mapping[nn.Parameter, Shard]) -> Any:
    """Cuts this rank's part of a whole tensor; another shape stays, for `load_state_dict` to refuse."""
    if isinstance(value, Tensor) and own in shards and list(value.shape) == shards[own].full_shape(own):
        value = shards[own].cut(value)
    return shared_like(value, own)
