"""Verifies and reads the folder of a sharded checkpoint.

It holds tensors in the files of torch.distributed.checkpoint, `.metadata`, their table of contents, and
`rest.pt`, all else that a checkpoint has, with the digests of the other files. This module is slow to import:
it is imported when the first such folder is met.
"""

import pickle
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from typing_extensions import override

from gpt_lightning.checkpoint.files import FOLDER_KEY, OPTIMIZERS, REST, WEIGHTS, check_bytes
from gpt_lightning.exit_codes import UserError

CONTENTS = ".metadata"
TIED_KEY = "tied_parameters"
DIGESTS_KEY = "digests"
# What a torn folder leads to.
UNREADABLE = (
    *(CheckpointException, OSError, EOFError, RuntimeError, KeyError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


@contextmanager
def complaining(folder: Path) -> Generator[None, None, None]:
    """Raises UserError, in one line, for whatever a torn folder leads to."""
    try:
        yield
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[-1][:120]
        raise UserError(f"ckpt_path={folder} cannot be read ({reason}); name another") from error


def check_whole(folder: Path, *, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Returns all but the tensors; raises UserError if a file is missing or not as it was written.

    It reads only a share of the files: as many ranks can divide the work.
    """
    rest = read_rest(folder)
    with complaining(folder):
        parts = (Reader(folder).read_metadata().storage_data or {}).values()
        if missing := {part.relative_path for part in parts if not (folder / part.relative_path).is_file()}:
            raise UserError(f"{', '.join(sorted(missing))} missing")
        for name, digest in sorted(rest.get(DIGESTS_KEY, {}).items())[share::shares]:
            try:
                check_bytes(folder / name, digest)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    return rest


def read_rest(folder: Path) -> dict[str, Any]:
    """Returns all of the checkpoint but its tensors."""
    with complaining(folder):
        check_bytes(folder / REST)
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return {**rest, FOLDER_KEY: str(folder)}


def read_whole(folder: Path) -> dict[str, Any]:
    """Returns the ordinary checkpoint that the folder stands for, read by one process."""
    whole = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in tensors_in(folder, "")
    }
    with complaining(folder):
        dcp.load(whole, storage_reader=Reader(folder), no_dist=True)
    checkpoint = read_rest(folder)
    del checkpoint[FOLDER_KEY]
    checkpoint.pop(DIGESTS_KEY, None)  # old folders have none
    weights = {key.partition("/")[2]: value for key, value in whole.items() if key.startswith(f"{WEIGHTS}/")}
    for name, original in checkpoint.pop(TIED_KEY).items():
        weights[name] = weights[original]
    put_back(checkpoint.get(OPTIMIZERS, []), whole)
    return {**checkpoint, WEIGHTS: weights}


def tensors_in(folder: Path, prefix: str) -> list[tuple[str, TensorStorageMetadata]]:
    """Lists the folder's tensors whose names begin with `prefix`, with what is known of each."""
    with complaining(folder):
        contents = Reader(folder).read_metadata().state_dict_metadata
    return [
        (key, meta)
        for key, meta in contents.items()
        if key.startswith(prefix) and isinstance(meta, TensorStorageMetadata)
    ]


def put_back(optimizers: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Puts the folder's tensors back into the state dicts of the optimizers."""
    for key, value in tensors.items():
        if key.startswith(f"{OPTIMIZERS}/"):
            _, number, index, name = key.split("/")
            optimizers[int(number)]["state"].setdefault(int(index), {})[name] = value


class Reader(dcp.FileSystemReader):
    """Reads the table of contents without running what a stranger may have put there."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / CONTENTS).open("rb") as file:
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
