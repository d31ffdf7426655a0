"""The bytes of a checkpoint file: written whole or not at all, and one flipped byte is noticed.

A file is what torch.save writes, a zip archive, with the SHA-256 of all that stands before it as its comment.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import struct
import time
import zipfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gpt_lightning.exit_codes import WRITE_FAILED, UserError

END = b"PK\x05\x06"  # begins the record that ends every zip archive, and that ends in the comment's length
END_BYTES = 22
LABEL = b"sha256:"
COMMENT_BYTES = len(LABEL) + 2 * hashlib.sha256().digest_size
CHUNK_BYTES = 1 << 22
JUST_NOW_SECONDS = 2
# What a killed save leaves: a file of `temporary_beside`, whose probe is an attempt to write into a folder at
# all, or the folder of a sharded save.
LEFT_FILE = re.compile(r"\.(.+\.ckpt|probe)\.[0-9a-f]{8}\.tmp")
LEFT_FOLDER = re.compile(r"\..+\.ckpt\.tmp")
CHANGED = "its bytes are not those that were written"
ELSEWHERE = "choose another folder (checkpoint.dirpath)"
REMEDIES = {
    errno.ENOSPC: "make room, or choose another folder (checkpoint.dirpath)",
    errno.EDQUOT: "make room, or choose another folder (checkpoint.dirpath)",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}

_verified: set[tuple[int, ...]] = set()


class CheckpointWriteError(OSError):
    """A checkpoint could not be written, or not safely: its text says what stands under its name."""

    exit_code = WRITE_FAILED


# ---- writing


def write(checkpoint: Any, path: Path) -> None:
    """Write beside the target, flush to disk, rename."""
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            with temporary.open("xb") as file:
                stream = _HashingStream(file)
                try:
                    torch.save(checkpoint, stream)  # type: ignore[arg-type]
                finally:
                    size = stream.size
                stream.finish()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error, size) from error
    sync_name(path)


@contextmanager
def temporary_beside(path: Path) -> Generator[Path, None, None]:
    """A name in the same folder, and nothing of that name afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError, size: int = 0) -> CheckpointWriteError:
    """One line: what, why, how much room there is, what is left, what to do."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path("/"))
    free = _in_units(shutil.disk_usage(folder).free)
    room = f"it needs {_in_units(size)} and {free} are free; " if size else ""
    left = "the former file is as it was" if os.path.lexists(path) else "no file was left behind"
    remedy = REMEDIES.get(error.errno or 0, ELSEWHERE)
    return CheckpointWriteError(f"{path} cannot be written ({_reason(error)}): {room}{left}; {remedy}")


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error).strip().split("\n")[-1][:120]
    return reason if error.filename is None else f"{reason}: {error.filename}"


def _in_units(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


class _HashingStream:
    """What torch.save writes to, front to back.

    An error waits for `finish`: inside PyTorch's zip writer it could end the process. Bytes that come after
    it are only counted, so that the size that was needed is known.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._held = b""  # the last two bytes: in the end those of the comment's length
        self._error: BaseException | None = None
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        if self._error is None:
            try:
                self._hold_back(data)
            except BaseException as error:
                self._error = error
        return len(data)

    def _hold_back(self, data: Any) -> None:
        """Pass on all but the last two bytes."""
        if len(data) < 2:
            data = self._held + bytes(data)
        else:
            self._pass_on(self._held)
        self._pass_on(data[:-2])
        self._held = bytes(data[-2:])

    def flush(self) -> None:
        """torch.save asks for it; `finish` does it."""

    def finish(self) -> None:
        if self._error is None:
            assert self._held == b"\0\0", "torch.save has written a comment of its own"
            self._pass_on(struct.pack("<H", COMMENT_BYTES))
            self._file.write(LABEL + self._digest.hexdigest().encode())
            self._file.flush()
        else:
            raise self._error

    def _pass_on(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def sync_name(path: Path) -> None:
    """Make the name that a checkpoint has just got outlive a power failure."""
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointWriteError(
            f"{path} is written, but may not outlive a power failure ({_reason(error)}); {ELSEWHERE}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in the folder outlive a power failure."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Remove what killed saves left in the folder, into which nobody else may be writing."""
    stale = [path for path in folder.glob(".*.tmp") if _is_left_over(path)]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return stale


def _is_left_over(path: Path) -> bool:
    pattern = LEFT_FOLDER if path.is_dir() else LEFT_FILE
    return pattern.fullmatch(path.name) is not None and not path.is_symlink()


# ---- reading


def verify(path: Path) -> None:
    """Raise UserError, in one line that names the file, if it is not as it was written."""
    try:
        check_bytes(path)
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UserError:
    reason = str(getattr(error, "strerror", None) or error).strip().split("\n")[0][:120]
    return UserError(f"ckpt_path={path} cannot be read as a checkpoint ({reason}); name another")


def check_bytes(path: Path, digest: str | None = None) -> None:
    """Raise what is wrong with a file, by the digest of all its bytes or, without one, by that at its end.

    Where another program wrote it, its records' checksums have to do. A process reads a file for this once,
    as long as it does not change.
    """
    with path.open("rb") as file:
        key = _identity(file)
        if key in _verified:
            return
        size = os.fstat(file.fileno()).st_size
        if digest is None:
            digest, size = _written_digest(file), size - COMMENT_BYTES
        if digest is None:
            _check_records(file)
        elif digest != _digest(file, size):
            raise UserError(CHANGED)
        _remember(key, file)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file, os.fstat(file.fileno()).st_size)


def known_digest(path: Path) -> str:
    """What the file says of itself, or else what its bytes say."""
    with path.open("rb") as file:
        return _written_digest(file) or _digest(file, os.fstat(file.fileno()).st_size)


def _written_digest(file: BinaryIO) -> str | None:
    """What the comment says; None without a comment."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise UserError("it is empty")
    file.seek(max(0, size - END_BYTES - COMMENT_BYTES))
    tail = file.read()
    if tail[-END_BYTES:].startswith(END) and tail.endswith(b"\0\0"):
        return None
    record, comment = tail[:END_BYTES], tail[END_BYTES:]
    if not record.startswith(END) or record[-2:] != struct.pack("<H", COMMENT_BYTES):
        raise UserError("it is cut short, or no checkpoint")
    if not comment.startswith(LABEL):
        raise UserError(CHANGED)
    return comment.removeprefix(LABEL).decode("ascii", errors="replace")


def _digest(file: BinaryIO, size: int) -> str:
    """Of the first `size` bytes."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
    file.seek(0)
    while size > 0:
        read = file.readinto(buffer[: min(size, CHUNK_BYTES)])  # type: ignore[attr-defined]
        if not read:
            raise UserError("it became shorter while it was read")
        digest.update(buffer[:read])
        size -= read
    return digest.hexdigest()


def _check_records(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise UserError(f"the checksum of its record {broken} is wrong")


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """Changes with whatever is done to a file."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _remember(key: tuple[int, ...], file: BinaryIO) -> None:
    # Clocks of file systems tick slowly: what changed just now may change again unseen.
    just_now = time.time() - JUST_NOW_SECONDS
    if key == _identity(file) and os.fstat(file.fileno()).st_ctime < just_now:
        _verified.add(key)
