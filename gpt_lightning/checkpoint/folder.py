"""The folder of a sharded checkpoint: what it is made of, whether it is whole, and how it gets its name.

It holds tensors in the files of torch.distributed.checkpoint, `.metadata`, their table of contents, and
`rest.pt`, all else that a checkpoint has, with the digests of the other files. Whether a checkpoint is such a
folder is asked of every one: torch.distributed.checkpoint, slow to import, waits for the first that is.
"""

import pickle
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from gpt_lightning.checkpoint.files import check_bytes
from gpt_lightning.exit_codes import UserError

REST = "rest.pt"
FOLDER_KEY = "sharded_folder"
TIED_KEY = "tied_parameters"
DIGESTS_KEY = "digests"


def is_sharded(path: Path) -> bool:
    return (path / REST).is_file()


# ---- names


@contextmanager
def replaced_by_a_file(path: Path) -> Generator[None, None, None]:
    """Make way for a file under the name of a sharded checkpoint, which comes back if none is written."""
    with set_aside(path) if is_sharded(path) else nullcontext():
        yield


@contextmanager
def set_aside(path: Path) -> Generator[None, None, None]:
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


# ---- contents


def _unreadable() -> tuple[type[BaseException], ...]:
    """What a torn folder leads to."""
    from torch.distributed.checkpoint import CheckpointException

    return (
        CheckpointException,
        OSError,
        EOFError,
        RuntimeError,
        KeyError,
        ValueError,
        pickle.UnpicklingError,
    )


@contextmanager
def complaining(folder: Path) -> Generator[None, None, None]:
    """One line for whatever a torn folder leads to."""
    try:
        yield
    except _unreadable() as error:
        reason = str(error).strip().split("\n")[-1][:120]
        raise UserError(f"ckpt_path={folder} cannot be read ({reason}); name another") from error


def missing_parts(folder: Path) -> list[str]:
    """The files that the folder's table of contents names and that are not there."""
    from gpt_lightning.checkpoint.folder_reader import Reader

    storage = Reader(folder).read_metadata().storage_data or {}
    names = {place.relative_path for place in storage.values()}
    return sorted(name for name in names if not (folder / name).is_file())


def check_whole(folder: Path) -> None:
    """Raise UserError, in one line, if a file of the folder is missing or not as it was written."""
    rest = read_rest(folder)
    with complaining(folder):
        check_files(folder, rest)


def check_files(folder: Path, rest: Mapping[str, Any], *, share: int = 0, shares: int = 1) -> None:
    """Look at every file, but read only a share of them: `shares` ranks can divide the work."""
    if missing := missing_parts(folder):
        raise UserError(f"{', '.join(missing)} missing")
    for name, digest in sorted(rest.get(DIGESTS_KEY, {}).items())[share::shares]:
        try:
            check_bytes(folder / name, digest)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def read_rest(folder: Path) -> dict[str, Any]:
    """All of the checkpoint but its tensors."""
    with complaining(folder):
        check_bytes(folder / REST)
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return {**rest, FOLDER_KEY: str(folder)}
