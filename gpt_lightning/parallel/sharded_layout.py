"""Checkpoints as a folder to which every rank adds its part, to be read again at any topology.

This module is slow to import, as checkpoint.folder is: it is imported when the first such folder is met.
"""

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as DTensorShard
from torch.optim import Optimizer

from gpt_lightning.checkpoint.atomic import put_folder, remove, unfinished_folder
from gpt_lightning.checkpoint.files import (
    FOLDER_KEY,
    OPTIMIZERS,
    REST,
    WEIGHTS,
    CheckpointWriteError,
    NonFiniteCheckpointError,
    digest_of,
    first_non_finite,
    write,
    write_error,
)
from gpt_lightning.checkpoint.folder import (
    CONTENTS,
    DIGESTS_KEY,
    TIED_KEY,
    Reader,
    check_rest,
    check_whole,
    complaining,
    put_back,
    tensors_in,
)
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.ranks import from_first, gathered
from gpt_lightning.parallel.shard import (
    Shard,
    is_shared,
    model_state,
    optimizer_state,
    parameters_of,
    sharded_parameters,
)
from gpt_lightning.parallel.sharded_replicas import local, with_rows

T = TypeVar("T")


class ShardedLayout:
    """Saves and loads such a folder; all ranks call every method."""

    def __init__(self, module: nn.Module, mesh: ParallelMesh) -> None:
        self.module, self.mesh = module, mesh

    def model_state(self) -> dict[str, Any]:
        """Returns the state dict with each part as a DTensor, which knows its place in the whole."""
        return model_state(self.module, self._as_dtensor)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state dict with each part as a DTensor."""
        return optimizer_state(optimizer, self.module, self._as_dtensor)

    def save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> None:
        """Writes the folder, which gets its name when it is whole; the options are for files."""
        folder = Path(from_first(str(path)))
        tied = _tied_names(checkpoint[WEIGHTS])
        tensors, scalars = _split(checkpoint, tied)
        check_rest(scalars)
        parts = ((name, _part_of(value)) for name, value in tensors.items())
        if (name := _first_of(first_non_finite(parts))) is not None:
            raise NonFiniteCheckpointError(name)
        temporary = unfinished_folder(folder)
        with _failing_together(folder):
            if dist.get_rank() == 0:
                remove(temporary)  # parts of a save that was interrupted
        with _failing_together(folder):
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
        digests = gathered(_digests_of_own(temporary))
        with _failing_together(folder):
            if dist.get_rank() == 0:
                of_files = {name: digest for own in digests for name, digest in own.items()}
                if missing := sorted(name for name in of_files if not (temporary / name).is_file()):
                    needed = "trainer.strategy.save_sharded needs a folder that all nodes share"
                    raise CheckpointWriteError(f"{temporary} lacks {', '.join(missing)}: {needed}")
                write({**scalars, TIED_KEY: tied, DIGESTS_KEY: of_files}, temporary / REST)
                put_folder(temporary, folder)

    def read(self, path: str | Path) -> dict[str, Any]:
        """Returns all of the checkpoint but its tensors; the ranks share the work of verifying the files."""
        rest, complaint = {}, None
        try:
            rest = check_whole(Path(path), share=dist.get_rank(), shares=dist.get_world_size())
        except UserError as error:
            complaint = error
        if (complaint := _first_of(complaint)) is not None:
            raise complaint
        return rest

    def load_model(self, checkpoint: Mapping[str, Any], *, strict: bool) -> None:
        """Reads this rank's part of every tensor into the module."""
        folder, tied, own = Path(checkpoint[FOLDER_KEY]), checkpoint[TIED_KEY], self.model_state()
        saved = {key.partition("/")[2] for key, _ in tensors_in(folder, f"{WEIGHTS}/")}
        first_names = {name: tied.get(name, name) for name in saved.union(tied)}
        wanted = {f"{WEIGHTS}/{first_names[name]}": own[name] for name in own if name in first_names}
        with complaining(folder):
            dcp.load(wanted, storage_reader=Reader(folder))
        # What the module lacks was not read; the module refuses it by its name.
        nothing = torch.empty(0)
        read = {name: wanted.get(f"{WEIGHTS}/{first}", nothing) for name, first in first_names.items()}
        kept = self.module.state_dict(keep_vars=True)
        parts = {name: _like(value, kept.get(name)) for name, value in read.items()}
        self.module.load_state_dict(parts, strict=strict)

    def load_optimizers(self, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Reads this rank's part of the optimizers' state."""
        folder, shards = Path(checkpoint[FOLDER_KEY]), sharded_parameters(self.module)
        parameters = [parameters_of(optimizer) for optimizer in optimizers]
        parts: dict[str, Tensor] = {}
        for key, meta in tensors_in(folder, f"{OPTIMIZERS}/"):
            _, number, index, _ = key.split("/")
            parameter, dtype = parameters[int(number)][int(index)], meta.properties.dtype
            shard = shards.get(parameter)
            full_shape = list(parameter.shape) if shard is None else shard.full_shape(parameter)
            is_part = shard is not None or is_shared(parameter)
            if is_part and list(meta.size) == full_shape:
                parts[key] = self._as_dtensor(torch.empty_like(parameter, dtype=dtype), shard)
            else:
                parts[key] = torch.empty(meta.size, dtype=dtype)
        with complaining(folder):
            dcp.load(parts, storage_reader=Reader(folder))
        states = copy.deepcopy(checkpoint[OPTIMIZERS])
        own = {key: parameters[int(key.split("/")[1])][int(key.split("/")[2])] for key in parts}
        put_back(states, {key: _like(part, own[key]) for key, part in parts.items()})
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)

    def _as_dtensor(self, part: Tensor, shard: Shard | None) -> DTensor:
        """Says where in the whole a part lies that is cut over the peers and then shared by replicas."""
        mesh, shape = self.mesh.parts_mesh, list(part.shape) if shard is None else shard.full_shape(part)
        placements: list[Placement] = [Replicate() if shard is None else DTensorShard(shard.dim)]
        if mesh.ndim == 2:
            placements.append(DTensorShard(0) if is_shared(part) else Replicate())
        stride = torch.empty(shape, device="meta").stride()
        rows = local(part).detach()
        return DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def _part_of(value: Tensor) -> Tensor:
    """Returns what this rank has of a tensor of a checkpoint, over peers, replicas or both."""
    return value.to_local() if isinstance(value, DTensor) else value


def _like(value: Tensor, own: Any) -> Tensor:
    """Returns this rank's part, as the module or the optimizer has it."""
    part = _part_of(value)
    return with_rows(part, own) if is_shared(own) and isinstance(value, DTensor) else part


# ---- what the ranks tell each other


@contextmanager
def _failing_together(folder: Path) -> Generator[None, None, None]:
    """Makes what fails on one rank fail on all, in one line, with nothing left behind."""
    failure = None
    try:
        yield
    except (OSError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, OSError):
            raise
        failure = cause if isinstance(cause, CheckpointWriteError) else write_error(folder, cause)
    if (failure := _first_of(failure)) is not None:
        if dist.get_rank() == 0:
            remove(unfinished_folder(folder))
        raise failure


def _first_of(value: T | None) -> T | None:
    """Returns the value of the first rank that has one."""
    return next((value for value in gathered(value) if value is not None), None)


def _digests_of_own(folder: Path) -> dict[str, str]:
    """Returns the digests of the files that this rank has written."""
    own = [*folder.glob(f"__{dist.get_rank()}_*"), *([folder / CONTENTS] if dist.get_rank() == 0 else [])]
    return {path.name: digest_of(path) for path in own}


# ---- the two halves of a checkpoint: its tensors, and the rest


def _tied_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Maps the second name of each tensor that has two to its first."""
    first: dict[int, str] = {}
    tied = {}
    for name, value in state_dict.items():
        # Of a shared tensor a rank may have no rows, but it is one object under both names.
        place = id(value) if isinstance(value, DTensor) else value.data_ptr()
        if value.numel() and (original := first.setdefault(place, name)) != name:
            tied[name] = original
    return tied


def _split(checkpoint: Mapping[str, Any], tied: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of the model and its optimizers, each under a name of its own, and all else."""
    weights, optimizers = checkpoint[WEIGHTS].items(), checkpoint.get(OPTIMIZERS, [])
    tensors = {f"{WEIGHTS}/{name}": value for name, value in weights if name not in tied}
    scalars = [{**saved, "state": {index: {} for index in saved["state"]}} for saved in optimizers]
    for number, saved in enumerate(optimizers):
        for index, entry in saved["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZERS}/{number}/{index}/{key}"] = value
                else:
                    scalars[number]["state"][index][key] = value
    rest = {**checkpoint, WEIGHTS: {}}
    return tensors, {**rest, OPTIMIZERS: scalars} if OPTIMIZERS in checkpoint else rest
