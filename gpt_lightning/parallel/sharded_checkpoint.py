"""Checkpoints as a folder to which every rank adds its part, to be read again at any topology."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    REST,
    CheckpointWriteError,
    digest_of,
    first_non_finite,
    refuse_non_finite,
    write,
    write_error,
)
from gpt_lightning.checkpoint.folder import (
    CONTENTS,
    DIGESTS_KEY,
    OPTIMIZERS,
    TIED_KEY,
    WEIGHTS,
    Reader,
    check_files,
    complaining,
    missing_parts,
    read_rest,
    tensors_in,
    with_tensors,
)
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, sharded_parameters
from gpt_lightning.parallel.state_dict import map_optimizer_parts, parameters_by_index

# ---- writing


def sharded_state_dict(module: nn.Module, mesh: ParallelMesh) -> dict[str, Any]:
    """The state dict with each part as a DTensor, which knows where it belongs; without communication."""
    shards = sharded_parameters(module)
    return {
        name: _as_dtensor(value, shards[value], mesh) if value in shards else value.detach()
        for name, value in module.state_dict(keep_vars=True).items()
    }


def sharded_optimizer_state(
    optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard], mesh: ParallelMesh
) -> dict[str, Any]:
    return map_optimizer_parts(optimizer, shards, lambda part, shard: _as_dtensor(part, shard, mesh))


def _as_dtensor(part: Tensor, shard: Shard, mesh: ParallelMesh) -> DTensor:
    placements: list[Placement] = [Replicate(), DTensorShard(shard.dim)]
    shape = torch.Size(shard.full_shape(part))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.detach(), mesh.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def _local(value: Tensor) -> Tensor:
    """This rank's part, on which nothing is communicated."""
    return value.to_local() if isinstance(value, DTensor) else value


def save(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint of `sharded_*` parts, on all ranks; the folder gets its name when it is whole."""
    tied = _tied_names(checkpoint[WEIGHTS])
    tensors = {f"{WEIGHTS}/{name}": value for name, value in checkpoint[WEIGHTS].items() if name not in tied}
    tensors.update(_flat_optimizer_states(checkpoint.get(OPTIMIZERS, [])))
    own = ((name, _local(value)) for name, value in tensors.items())
    refuse_non_finite(_first(first_non_finite(own)))
    temporary = unfinished_folder(folder)
    with _for_all(folder):
        if dist.get_rank() == 0:
            remove(temporary)  # parts of a save that was interrupted
    with _for_all(folder):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
    digests = _gathered(_digests_of_own(temporary))
    with _for_all(folder):
        if dist.get_rank() == 0:
            _check_all_arrived(temporary)
            _write_rest(checkpoint, tied, {k: v for own in digests for k, v in own.items()}, temporary)
            put_folder(temporary, folder)


@contextmanager
def _for_all(folder: Path) -> Generator[None, None, None]:
    """What fails on one rank fails on all, in one line, and leaves nothing behind."""
    complaint = None
    try:
        yield
    except (OSError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, OSError):
            raise
        complaint = str(cause) if isinstance(cause, CheckpointWriteError) else str(write_error(folder, cause))
    complaint = _first(complaint)
    if complaint is not None:
        if dist.get_rank() == 0:
            remove(unfinished_folder(folder))
        raise CheckpointWriteError(complaint)


def _gathered(value: Any) -> list[Any]:
    """Everybody's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _first(complaint: str | None) -> str | None:
    """The first rank's complaint that has one."""
    return next((text for text in _gathered(complaint) if text is not None), None)


def _digests_of_own(folder: Path) -> dict[str, str]:
    """Of the files that this rank wrote."""
    own = [*folder.glob(f"__{dist.get_rank()}_*"), *([folder / CONTENTS] if dist.get_rank() == 0 else [])]
    return {path.name: digest_of(path) for path in own}


def _check_all_arrived(folder: Path) -> None:
    if missing := missing_parts(folder):
        raise CheckpointWriteError(
            f"{folder} lacks {', '.join(missing)}: trainer.strategy.save_sharded needs a folder that "
            "all nodes share"
        )


def _write_rest(
    checkpoint: dict[str, Any], tied: dict[str, str], digests: dict[str, str], folder: Path
) -> None:
    rest = {**checkpoint, WEIGHTS: {}, TIED_KEY: tied, DIGESTS_KEY: digests}
    if OPTIMIZERS in rest:
        rest[OPTIMIZERS] = [
            {**state, "state": _without_tensors(state["state"])} for state in rest[OPTIMIZERS]
        ]
    write(rest, folder / REST)


def _tied_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Name -> earlier name of the same tensor."""
    first: dict[int, str] = {}
    tied = {}
    for name, value in state_dict.items():
        local = _local(value)
        if local.numel() and first.setdefault(local.data_ptr(), name) != name:
            tied[name] = first[local.data_ptr()]
    return tied


def _flat_optimizer_states(states: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for number, state in enumerate(states):
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    yield f"{OPTIMIZERS}/{number}/{index}/{key}", value


def _without_tensors(state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    return {
        index: {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        for index, entry in state.items()
    }


# ---- reading


def read_rest_together(folder: Path) -> dict[str, Any]:
    """All of the checkpoint but its tensors, on all ranks, which share the work of verifying the files."""
    complaint = None
    try:
        rest = read_rest(folder)
        with complaining(folder):
            check_files(folder, rest, share=dist.get_rank(), shares=dist.get_world_size())
    except UserError as error:
        complaint = str(error)
    if (complaint := _first(complaint)) is not None:
        raise UserError(complaint)
    return rest


def load_weights(folder: Path, module: nn.Module, mesh: ParallelMesh, *, strict: bool = True) -> None:
    """Read this rank's part of every tensor into the module; all ranks call it."""
    tied = read_rest(folder)[TIED_KEY]
    saved = {key.partition("/")[2] for key, _ in tensors_in(folder, f"{WEIGHTS}/")}
    own = module.state_dict(keep_vars=True)
    missing, unexpected = own.keys() - saved - tied.keys(), saved.union(tied) - own.keys()
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"{folder} does not fit {type(module).__name__}: missing {sorted(missing)}, unexpected "
            f"{sorted(unexpected)}"
        )
    shards = sharded_parameters(module)
    source = {name: name if name in saved else tied[name] for name in own if name not in missing}
    wanted: dict[str, Tensor] = {}
    for name, original in source.items():
        value = own[name]
        part = _as_dtensor(value, shards[value], mesh) if value in shards else value.detach()
        wanted.setdefault(f"{WEIGHTS}/{original}", part)
    with complaining(folder):
        dcp.load(wanted, storage_reader=Reader(folder))
    for name, original in source.items():
        read = _local(wanted[f"{WEIGHTS}/{original}"])
        if read.data_ptr() != own[name].data_ptr():  # tied in the file alone, or on the mesh's device
            own[name].detach().copy_(read)


def load_optimizer_state(
    folder: Path,
    number: int,
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    shards: Mapping[nn.Parameter, Shard],
    mesh: ParallelMesh,
) -> dict[str, Any]:
    """This rank's part of an optimizer's state dict, whose other half is `saved`; all ranks call it."""
    parameters = parameters_by_index(optimizer)
    wanted: dict[str, Tensor] = {}
    for key, meta in tensors_in(folder, f"{OPTIMIZERS}/{number}/"):
        parameter = parameters[int(key.split("/")[2])]
        if parameter in shards and list(meta.size) == shards[parameter].full_shape(parameter):
            part = torch.empty_like(parameter, dtype=meta.properties.dtype)
            wanted[key] = _as_dtensor(part, shards[parameter], mesh)
        else:
            wanted[key] = torch.empty(meta.size, dtype=meta.properties.dtype)
    with complaining(folder):
        dcp.load(wanted, storage_reader=Reader(folder))
    return with_tensors(saved, {key: _local(value) for key, value in wanted.items()})
