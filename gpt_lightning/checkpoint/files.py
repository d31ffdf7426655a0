"""Writes a checkpoint file whole or not at all, and verifies it by the CRCs that its zip archive keeps."""

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from typing_extensions import override

from gpt_lightning.checkpoint.atomic import NameNotSyncedError, remove, set_aside, written_file
from gpt_lightning.exit_codes import NON_FINITE, WRITE_FAILED, UserError

END, END_BYTES = b"PK\x05\x06", 22  # the record that ends every zip archive, and then its comment
JUST_NOW_SECONDS = 2
REST = "rest.pt"  # the file by which a folder is a sharded checkpoint
FOLDER_KEY = "sharded_folder"  # where it lies, among the contents of one that is opened
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"  # the parts that hold tensors
# Where a callback that averages the weights puts those that were trained, and what else it goes on from.
TRAINED_KEY, AVERAGING_KEY = "current_model_state", "averaging_state"
ELSEWHERE = "choose another folder (checkpoint.dirpath)"
REMEDIES = {
    errno.ENOSPC: f"make room, or {ELSEWHERE}",
    errno.EDQUOT: f"make room, or {ELSEWHERE}",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}

_SHARDED_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata|rest\.pt")

_verified: set[tuple[int, ...]] = set()
_log = logging.getLogger("gpt_lightning")


class CheckpointWriteError(OSError):
    """Tells why a checkpoint could not be written, or not safely, and what stands under its name."""

    exit_code = WRITE_FAILED


class NonFiniteCheckpointError(ValueError):
    """Names what holds NaN or infinity among weights or optimizer states, from which no run could go on."""

    exit_code = NON_FINITE

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} holds NaN or infinity: no checkpoint is written of it, and the former ones are as they "
            "were; go on from one of them with a lower learning rate"
        )


# ---- writing


def write(checkpoint: Any, path: Path) -> None:
    """Writes beside the target, flushes to disk, renames; a sharded checkpoint of that name makes way."""
    stream = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with set_aside(path) if is_sharded(path) else nullcontext(), written_file(path) as file:
            stream = _Stream(file)
            torch.save(checkpoint, stream)  # type: ignore[arg-type]
            if stream.error is not None:
                raise stream.error
    except OSError as error:
        raise write_error(path, error, stream.size if stream else 0) from error


@dataclass(eq=False)
class _Stream(io.RawIOBase):
    """Passes on what torch.save writes, and counts it, to say how much room was needed.

    An error waits in `error`: inside PyTorch's zip writer it could end the process.
    """

    file: BinaryIO
    error: BaseException | None = None
    size: int = 0

    @override
    def write(self, data: Any) -> int:
        self.size += len(data)
        if self.error is None:
            try:
                self.file.write(data)
            except BaseException as error:
                self.error = error
        return len(data)


def write_error(path: Path, error: OSError, size: int = 0) -> CheckpointWriteError:
    """Says in one line what failed and why, how much room there is, what is left, and what to do."""
    reason = error.strerror or str(error).strip().split("\n")[-1][:120]
    if isinstance(error, NameNotSyncedError):
        return CheckpointWriteError(
            f"{path} is written, but may not outlive a power failure ({reason}); {ELSEWHERE}"
        )
    reason += f": {error.filename}" if error.filename is not None else ""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path("/"))
    free = _in_units(shutil.disk_usage(folder).free)
    room = f"it needs {_in_units(size)} and {free} are free; " if size else ""
    left = "the former file is as it was" if os.path.lexists(path) else "no file was left behind"
    remedy = REMEDIES.get(error.errno or 0, ELSEWHERE)
    return CheckpointWriteError(f"{path} cannot be written ({reason}): {room}{left}; {remedy}")


def _in_units(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


# ---- removing


def lies_in(folder: Path, path: Path) -> bool:
    """Tells whether a path names a checkpoint right in this folder, and leads nowhere else."""
    return path.suffix == ".ckpt" and not path.is_symlink() and path.resolve().parent == folder.resolve()


def is_own(folder: Path, path: Path) -> bool:
    """Tells whether a file, or a folder in which only a sharded checkpoint's files are, lies there so."""
    is_checkpoint = path.is_file() or is_sharded(path) and all(map(_is_part, path.iterdir()))
    return is_checkpoint and lies_in(folder, path)


def remove_checkpoint(path: Path, folders: Iterable[Path]) -> None:
    """Removes a checkpoint of ours that lies right in one of the folders, and nothing else, whoever asks."""
    if any(is_own(folder, path) for folder in folders):
        remove(path)
    elif os.path.lexists(path):
        _log.warning(f"{path} is not removed: it is no checkpoint in the folder of this run")


def _is_part(path: Path) -> bool:
    return path.is_file() and _SHARDED_FILE.fullmatch(path.name) is not None


# ---- reading


def is_sharded(path: Path) -> bool:
    """Tells a sharded checkpoint by the file that each has; `checkpoint.folder`, slow to import, reads it."""
    return (path / REST).is_file()


def verify(path: Path) -> None:
    """Raises UserError, in one line that names the file, if it is none, or not as it was written."""
    if not path.is_file():
        raise no_file(path)
    try:
        check_bytes(path)
    except (UserError, OSError) as error:
        raise unreadable(path, error) from error


NOT_UTF8 = "has a name that is not UTF-8; rename it, or call the program from inside that folder"


def no_file(path: Path) -> UserError:
    if is_sharded(path):
        return UserError(
            f"ckpt_path={path} is sharded, which only TensorParallelDDPStrategy reads; make a file of it: "
            f"gpt-lightning consolidate --ckpt_path {path} --output FILE"
        )
    if path.is_dir():
        return UserError(f"ckpt_path={path} is a folder without a whole checkpoint; name another")
    others = ", ".join(sorted(other.name for other in path.parent.glob("*.ckpt")))
    listing = f"; {path.parent} holds {others}" if others else ""
    return UserError(f"ckpt_path={path} is not a file; name a .ckpt file{listing}")


def unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UnicodeEncodeError):  # torch opens a file by a name in UTF-8
        return UserError(f"ckpt_path={path} {NOT_UTF8}")
    reason = str(getattr(error, "strerror", None) or error).strip().split("\n")[0][:120]
    return UserError(f"ckpt_path={path} cannot be read as a checkpoint ({reason}); name another")


def check_bytes(path: Path, digest: str | None = None) -> None:
    """Raises what is wrong with a file, by the SHA-256 of its bytes or, without one, by its records' CRCs.

    A process reads a file for this once, as long as it does not change.
    """
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        identity = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if identity in _verified:
            return
        if digest is None:
            _check_records(file)
        elif digest != digest_of(path):
            raise UserError("its bytes are not those that were written")
    # Clocks of file systems tick slowly: what changed just now may change again unseen.
    if stat.st_ctime < time.time() - JUST_NOW_SECONDS:
        _verified.add(identity)


def _check_records(file: BinaryIO) -> None:
    if os.fstat(file.fileno()).st_size == 0:
        raise UserError("it is empty")
    try:
        if not zipfile.is_zipfile(file):
            raise UserError("it is cut short, or no checkpoint")
        with zipfile.ZipFile(file) as archive:
            _check_table(archive, os.fstat(file.fileno()).st_size)
            broken, comment = archive.testzip(), archive.comment
    except Exception as error:  # what a changed byte in a zip archive leads to may be anything
        raise UserError(str(error) or type(error).__name__) from error
    if broken is not None:
        raise UserError(f"the checksum of its record {broken} is wrong")
    # Zip readers accept an archive that other bytes follow.
    file.seek(-END_BYTES - len(comment), os.SEEK_END)
    end = file.read(END_BYTES)
    if not end.startswith(END) or int.from_bytes(end[-2:], "little") != len(comment):
        raise UserError("it is cut short, or no checkpoint")


def _check_table(archive: zipfile.ZipFile, size: int) -> None:
    """Raises where records are not plain bytes beside each other: they could be endless, or two at once."""
    names = set()
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise UserError(f"its record {record.filename} is compressed")
        if record.filename.lower() in names:  # PyTorch does not tell capitals
            raise UserError(f"it has two records {record.filename.lower()}")
        names.add(record.filename.lower())
        size -= record.file_size
    if size < 0:
        raise UserError("its records overlap")


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- numbers


def check_finite(checkpoint: Mapping[str, Any]) -> None:
    """Raises if the weights or the optimizers' state hold NaN or infinity; all else may be anything."""
    parts = {part: checkpoint.get(part, {}) for part in (WEIGHTS, OPTIMIZERS)}
    if (name := first_non_finite(named_tensors(parts))) is not None:
        raise NonFiniteCheckpointError(name)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested containers, under the path that leads to each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from named_tensors(entry, f"{name}.{key}" if name else str(key))


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Returns the name of the first that holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        numbers = tensor.detach()
        if numbers.itemsize == 1:  # has no arithmetic of its own
            numbers = numbers.float()
        # A finite sum has finite terms, and needs no memory; an infinite one may be an overflow.
        if not torch.isfinite(numbers.sum()) and not torch.isfinite(numbers).all():
            return name
    return None
