"""Checkpoints as a folder to which every rank adds its part, by torch.distributed.checkpoint.

The folder holds tensors, to be read again at any topology, and `rest.pt`: all else that a checkpoint has.
"""

import os
import pickle
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as DTensorShard
from torch.optim import Optimizer
from typing_extensions import override

from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, sharded_parameters
from gpt_lightning.parallel.state_dict import map_optimizer_parts, parameters_by_index

REST = "rest.pt"
FOLDER_KEY = "sharded_folder"
TIED_KEY = "tied_parameters"
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"


def is_sharded(path: Path) -> bool:
    return (path / REST).is_file()


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


def save(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint of `sharded_*` parts, on all ranks; the folder gets its name when it is whole."""
    tied = _tied_names(checkpoint[WEIGHTS])
    tensors = {f"{WEIGHTS}/{name}": value for name, value in checkpoint[WEIGHTS].items() if name not in tied}
    tensors.update(_flat_optimizer_states(checkpoint.get(OPTIMIZERS, [])))
    temporary = folder.with_name(f".{folder.name}.tmp")
    if dist.get_rank() == 0:
        remove(temporary)  # parts of a save that was interrupted
    dist.barrier()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
    missing = [missing_parts(temporary) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(missing)
    if missing[0]:
        raise RuntimeError(
            f"{temporary} lacks {', '.join(missing[0])}: trainer.strategy.save_sharded needs a folder that "
            "all nodes share"
        )
    if dist.get_rank() == 0:
        _write_rest(checkpoint, tied, temporary)
        with _set_aside(folder):
            temporary.rename(folder)
    dist.barrier()


def _write_rest(checkpoint: dict[str, Any], tied: dict[str, str], folder: Path) -> None:
    rest = {**checkpoint, WEIGHTS: {}, TIED_KEY: tied}
    if OPTIMIZERS in rest:
        rest[OPTIMIZERS] = [
            {**state, "state": _without_tensors(state["state"])} for state in rest[OPTIMIZERS]
        ]
    with (folder / REST).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced_by_a_file(path: Path) -> Generator[None, None, None]:
    """Make way for a file under the name of a sharded checkpoint, which comes back if none is written."""
    with _set_aside(path) if is_sharded(path) else nullcontext():
        yield


@contextmanager
def _set_aside(path: Path) -> Generator[None, None, None]:
    old = path.with_name(f".{path.name}.old")
    remove(old)
    if path.exists():
        path.rename(old)
    try:
        yield
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    remove(old)


def restore_set_aside(folder: Path) -> None:
    """Give back their names to checkpoints below `folder` that a crash left between two names."""
    for old in folder.glob("**/.*.ckpt.old"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not path.exists():
            with suppress(FileNotFoundError):  # another rank was faster
                old.rename(path)


def remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _tied_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Name -> earlier name of the same tensor."""
    first: dict[int, str] = {}
    tied = {}
    for name, value in state_dict.items():
        local = value.to_local() if isinstance(value, DTensor) else value
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


class _Reader(dcp.FileSystemReader):
    """Reads the folder's table of contents without running what a stranger may have put into it."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        # What FileSystemReader does beside unpickling.
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in HARMLESS:
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in a checkpoint")


METADATA = "torch.distributed.checkpoint.metadata"
HARMLESS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
}


UNREADABLE = (
    CheckpointException,
    OSError,
    EOFError,
    RuntimeError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
)


@contextmanager
def _complaining(folder: Path) -> Generator[None, None, None]:
    """One line for whatever a torn folder leads to."""
    try:
        yield
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[-1][:120]
        raise ValueError(f"ckpt_path={folder} cannot be read ({reason}); name another") from error


def missing_parts(folder: Path) -> list[str]:
    """The files that the folder's table of contents names and that are not there."""
    storage = _Reader(folder).read_metadata().storage_data or {}
    names = {place.relative_path for place in storage.values()}
    return sorted(name for name in names if not (folder / name).is_file())


def check_whole(folder: Path) -> None:
    with _complaining(folder):
        if missing := missing_parts(folder):
            raise ValueError(f"{', '.join(missing)} missing")


def read_rest(folder: Path) -> dict[str, Any]:
    """All of the checkpoint but its tensors."""
    with _complaining(folder):
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return {**rest, FOLDER_KEY: str(folder)}


def load_weights(folder: Path, module: nn.Module, mesh: ParallelMesh, *, strict: bool = True) -> None:
    """Read this rank's part of every tensor into the module; all ranks call it."""
    tied = read_rest(folder)[TIED_KEY]
    saved = {key.partition("/")[2] for key, _ in _tensors_in(folder, f"{WEIGHTS}/")}
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
    with _complaining(folder):
        dcp.load(wanted, storage_reader=_Reader(folder))
    for name, original in source.items():
        read = wanted[f"{WEIGHTS}/{original}"]
        read = read.to_local() if isinstance(read, DTensor) else read
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
    for key, meta in _tensors_in(folder, f"{OPTIMIZERS}/{number}/"):
        parameter = parameters[int(key.split("/")[2])]
        if parameter in shards and list(meta.size) == shards[parameter].full_shape(parameter):
            part = torch.empty_like(parameter, dtype=meta.properties.dtype)
            wanted[key] = _as_dtensor(part, shards[parameter], mesh)
        else:
            wanted[key] = torch.empty(meta.size, dtype=meta.properties.dtype)
    with _complaining(folder):
        dcp.load(wanted, storage_reader=_Reader(folder))
    return _with_tensors(saved, wanted)


def _with_tensors(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state dict of its two halves."""
    state = {index: dict(entry) for index, entry in saved["state"].items()}
    for key, value in tensors.items():
        _, _, index, name = key.split("/")
        local = value.to_local() if isinstance(value, DTensor) else value
        state.setdefault(int(index), {})[name] = local
    return {**saved, "state": state}


def _tensors_in(folder: Path, prefix: str) -> list[tuple[str, TensorStorageMetadata]]:
    with _complaining(folder):
        contents = _Reader(folder).read_metadata().state_dict_metadata
    return [
        (key, meta)
        for key, meta in contents.items()
        if key.startswith(prefix) and isinstance(meta, TensorStorageMetadata)
    ]


def read_whole(folder: Path) -> dict[str, Any]:
    """The ordinary checkpoint that the folder stands for, read by one process."""
    whole = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in _tensors_in(folder, "")
    }
    with _complaining(folder):
        dcp.load(whole, storage_reader=_Reader(folder), no_dist=True)
    checkpoint = read_rest(folder)
    del checkpoint[FOLDER_KEY]
    weights = {key.partition("/")[2]: value for key, value in whole.items() if key.startswith(f"{WEIGHTS}/")}
    for name, original in checkpoint.pop(TIED_KEY).items():
        weights[name] = weights[original]
    for number, state in enumerate(checkpoint.get(OPTIMIZERS, [])):
        own = {key: value for key, value in whole.items() if key.startswith(f"{OPTIMIZERS}/{number}/")}
        checkpoint[OPTIMIZERS][number] = _with_tensors(state, own)
    return {**checkpoint, WEIGHTS: weights}
