"""Writes files and folders whole or not at all, and keeps others from writing them meanwhile."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from filelock import FileLock, Timeout

from gpt_lightning.exit_codes import UserError

# What a killed process leaves of a checkpoint, or formerly left of a try whether a folder can be written.
LEFT_FILE = re.compile(r"\.(.+\.ckpt|probe|config\.yaml|report\.html)\.[0-9a-f]{8}\.tmp")
LEFT_FOLDER = re.compile(r"\..+\.ckpt\.tmp")

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def user_cache() -> Path:
    """Returns the user's folder for what can be made anew, which may not exist yet."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "gpt_lightning"
    except RuntimeError as error:  # a user without a name and without HOME, as containers have them
        raise FileNotFoundError(errno.ENOENT, str(error)) from error


class NameNotSyncedError(OSError):
    """Says that what was written has its name, but that the name may not outlive a power failure."""


@contextmanager
def written_file(path: Path) -> Generator[BinaryIO, None, None]:
    """Yields a file beside `path`, which takes that name when all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_name(path)


@contextmanager
def written_folder(folder: Path) -> Generator[Path, None, None]:
    """Yields an empty folder beside `folder`, which takes that name when all of it is on the disk."""
    temporary = unfinished_folder(folder)
    remove(temporary)  # what a kill has left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        put_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(option: str, remedy: str = "name another place") -> Generator[None, None, None]:
    """Surrounds what is written where an option says, and refuses the place by its name.

    A full disk is no mistake of the option's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno in NO_SPACE:
            raise
        in_the_way = f": {cause.filename}" if cause.errno in (errno.EEXIST, errno.ENOTDIR) else ""
        raise UserError(f"{option} cannot be written ({cause.strerror}{in_the_way}); {remedy}") from error


def unfinished_folder(folder: Path) -> Path:
    """Names the folder while it is being filled, alike for all processes that fill it together."""
    return folder.with_name(f".{folder.name}.tmp")


def put_folder(temporary: Path, folder: Path) -> None:
    """Names a folder once all of it is on the disk; what had the name goes, or stays if this fails."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    with set_aside(folder):
        temporary.rename(folder)
    _sync_name(folder)


@contextmanager
def set_aside(path: Path) -> Generator[None, None, None]:
    """Frees a name; what had it gets it back if the block fails, and is removed if not."""
    old = path.with_name(f".{path.name}.old")
    remove(old)
    if path.exists():
        path.rename(old)
    try:
        yield
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Removes what killed saves left in a folder, into which nobody else may be writing.

    Checkpoints below it that a crash left between two names get back their own.
    """
    for path in folder.glob(".*.tmp"):
        if (LEFT_FOLDER if path.is_dir() else LEFT_FILE).fullmatch(path.name) and not path.is_symlink():
            remove(path)
    for old in folder.glob("**/.*.ckpt.old"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not path.exists():
            with suppress(FileNotFoundError):  # another rank was faster
                old.rename(path)


def sync(path: Path) -> None:
    """Makes a file's contents, or the names in a folder, outlive a power failure."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


def _sync_name(path: Path) -> None:
    try:
        sync(path.parent)
    except OSError as error:
        raise NameNotSyncedError(error.errno, error.strerror, str(path)) from error


def take_lock(path: Path) -> FileLock | None:
    """Keeps others out, until `release` or the process's end; None says that another process does."""
    with TemporaryFile(dir=path.parent):
        pass  # where nothing can be written, an OSError says so
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def release(lock: FileLock) -> None:
    """Lets others in, and leaves no file behind."""
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
