"""Reads a sharded checkpoint's table of contents as values, and makes PyTorch's objects of what it holds.

This module is slow to import, as checkpoint.folder is.
"""

import itertools
import pickle
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from typing_extensions import override

from gpt_lightning.checkpoint.pickles import check_pickle
from gpt_lightning.checkpoint.values import is_count
from gpt_lightning.exit_codes import UserError

CONTENTS = ".metadata"
MOST_OPERATIONS = 10_000_000  # some seventy for each part of a tensor
_FILE = re.compile(r"__\d+_\d+\.distcp")
_NAME = re.compile(r"state_dict/.+|optimizer_states/\d{1,4}/\d{1,9}/\w+")
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
}
_IGNORED = {
    *(("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


def read_table(folder: Path) -> Metadata:
    """Raises UserError for a table that cannot be of this folder, by its names, its sizes or its places."""
    path = folder / CONTENTS
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{CONTENTS} is not there, or no file")
    content = path.read_bytes()
    check_pickle(content, MOST_OPERATIONS)
    try:
        read = _Values(BytesIO(content)).load()
        tensors = {name: _tensor(name, entry) for name, entry in read.state_dict_metadata.items()}
        places = {_index(index): _place(folder, entry) for index, entry in read.storage_data.items()}
    except UserError:
        raise
    except Exception as error:  # what a changed byte leads to may be anything
        raise UserError(f"{CONTENTS}: {' '.join(str(error).split())}") from error
    _check_that_all_is_there(folder, tensors, places)
    return Metadata(dict(tensors), storage_data=places, storage_meta=StorageMeta())


class _Values(pickle.Unpickler):
    """Builds records of its own, made for this one table, where the table names classes of PyTorch's."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._records: dict[str, type] = {}

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _RECORDS:
            return self._records.setdefault(global_name, type(global_name, (_Record,), {}))
        if (module_name, global_name) in _IGNORED:
            return lambda *arguments: None
        if (module_name, global_name) == ("torch", "Size"):
            return tuple
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        name = f"{module_name}.{global_name}"
        raise UserError(f"{CONTENTS} asks for {name[:80]}, which has no place in a checkpoint")


class _Record:
    """Holds the fields of what was a dataclass, or the tuple that stood for them."""

    fields: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.fields = state


def _problem(what: str, value: Any) -> UserError:
    return UserError(f"{CONTENTS} holds {str(value)[:60]!r} as {what}")


def _sizes(value: Any, what: str) -> torch.Size:
    if type(value) is not tuple or not all(is_count(size) for size in value):
        raise _problem(what, value)
    return torch.Size(value)


def _tensor(name: Any, entry: Any) -> TensorStorageMetadata:
    if type(name) is not str or not _NAME.fullmatch(name):
        raise _problem("a name", name)
    size, (dtype, *_) = _sizes(entry.size, f"the size of {name}"), entry.properties.fields
    if not isinstance(dtype, torch.dtype):
        raise _problem(f"the type of {name}", dtype)
    chunks = [
        ChunkStorageMetadata(_sizes(chunk.offsets, "a part's place"), _sizes(chunk.sizes, "a part's size"))
        for chunk in entry.chunks
    ]
    if not _fill(chunks, size):
        raise UserError(f"{CONTENTS} holds parts of {name} that do not make the whole of {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _fill(chunks: list[ChunkStorageMetadata], size: torch.Size) -> bool:
    """Tells whether the parts lie inside a tensor, beside each other, and leave nothing out."""
    spans = [[range(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes)] for chunk in chunks]
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(size)
        and all(part.stop <= whole for part, whole in zip(span, size))
        for chunk, span in zip(chunks, spans)
    )
    apart = all(
        any(a.stop <= b.start or b.stop <= a.start for a, b in zip(one, other))
        for one, other in itertools.combinations(spans, 2)
    )
    return inside and apart and sum(prod(chunk.sizes) for chunk in chunks) == prod(size)


def _index(index: Any) -> MetadataIndex:
    hint = index.index if is_count(index.index) else None
    return MetadataIndex(str(index.fqn), _sizes(index.offset, "a part's place"), hint)


def _place(folder: Path, entry: Any) -> _StorageInfo:
    name, offset, length = entry.relative_path, entry.offset, entry.length
    if type(name) is not str or not _FILE.fullmatch(name):
        raise _problem("a file's name", name)
    if not (folder / name).is_file():
        raise UserError(f"{name} missing")
    if not (is_count(offset) and is_count(length) and offset + length <= (folder / name).stat().st_size):
        raise _problem(f"a place in {name}", (offset, length))
    return _StorageInfo(name, offset, length)


def _check_that_all_is_there(
    folder: Path, tensors: Mapping[str, TensorStorageMetadata], places: Mapping[MetadataIndex, _StorageInfo]
) -> None:
    """Raises unless each part has a place in a file that is long enough, and no two parts have the same."""
    for index, size in _parts(tensors):
        place = places.get(index)
        if place is None or place.length < size:
            raise UserError(f"{CONTENTS} holds no place for {index.fqn} that is large enough")
    if len(places) != sum(len(tensor.chunks) for tensor in tensors.values()):
        raise UserError(f"{CONTENTS} holds places of no tensor")
    end, before = 0, ""
    for place in sorted(places.values(), key=lambda place: (place.relative_path, place.offset)):
        if place.relative_path == before and place.offset < end:
            raise UserError(f"{CONTENTS} holds places that overlap in {before}")
        end, before = place.offset + place.length, place.relative_path


def _parts(tensors: Mapping[str, TensorStorageMetadata]) -> Iterator[tuple[MetadataIndex, int]]:
    """Yields each part's index and how many bytes it has at least."""
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            yield MetadataIndex(name, chunk.offsets), prod(chunk.sizes) * tensor.properties.dtype.itemsize
