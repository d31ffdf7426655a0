"""Where a run lives, <trainer.default_root_dir>/checkpoints/<run_name>/, and which checkpoint is meant."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gpt_lightning.checkpoint.checkpoint import (
    LOCK,
    checkpoints_below,
    is_whole,
    newest_checkpoint,
    newest_of,
    step_of,
)
from gpt_lightning.checkpoint.files import sweep, temporary_beside
from gpt_lightning.checkpoint.folder import restore_set_aside
from gpt_lightning.exit_codes import UserError

CHECKPOINTS = "checkpoints"
NUMBERED = ".numbered"  # holds the name that was asked for, in a folder that got a number to it


def checkpoints_folder(default_root_dir: str | None) -> Path:
    return Path(default_root_dir or ".") / CHECKPOINTS


# ---- which checkpoint


def newest_of_run(folder: Path, warn: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest whole checkpoint of the runs of this name: in `folder`, folder-2, folder-3, ..."""
    # Not those that only look like it: somebody may have named a run so.
    numbered = [marker.parent for marker in folder.parent.glob(f"{folder.name}-*/{NUMBERED}")]
    numbered = [other for other in numbered if (other / NUMBERED).read_text() == folder.name]
    return newest_of([path for run in (folder, *numbered) for path in checkpoints_below(run)], warn)


def find_checkpoint(
    given: str | None, folder: Path, warn: Callable[[str], None] = lambda line: None
) -> Path:
    """The checkpoint named; without a name, or for `last`, the newest whole one below `folder`."""
    if given is not None and given != "last":
        return Path(given)
    newest = newest_checkpoint(folder, warn)
    if newest is None:
        raise UserError(
            f"ckpt_path={given or ''} names no checkpoint and {folder} holds none; "
            "run `gpt-lightning fit` first, or give --ckpt_path FILE"
        )
    return newest


# ---- which folder


@dataclass(frozen=True)
class OpenRun:
    """The folder of a run, into which no other process writes until it is closed or this one ends."""

    folder: Path
    _lock: FileLock
    _made: tuple[Path, ...]

    def close(self) -> None:
        """Let others in; of the folders that were made for the run, those in which nothing is go again."""
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
        with suppress(OSError):  # it is gone already
            if _is_empty(self.folder):
                (self.folder / NUMBERED).unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def open_run_folder(folder: Path, resumed_from: Path | None, *, begins_again: bool = False) -> OpenRun:
    """Choose the run's folder, make it, and keep others out; raise if it cannot be written.

    What killed saves left in it is removed. A run that `begins_again` was killed before its first checkpoint.
    """
    if _lies_in(folder, resumed_from):
        run = _opened(folder)
        if run is None:
            raise _is_open(folder, f"run_name={folder.name}", "another --run_name")
        if goes_on_in(folder, resumed_from):  # asked now, when nobody else adds checkpoints
            return run
        run.close()
    for candidate in _free_folders(folder, begins_again):
        run = _opened(candidate)
        if run is not None and _is_free(candidate, begins_again):
            if candidate != folder:
                (candidate / NUMBERED).write_text(folder.name)
            return run
        if run is not None:
            run.close()
    raise AssertionError("there are always more numbers")


def open_named_folder(folder: Path, resumed_from: Path | None, option: str) -> OpenRun:
    """Open just this folder; raise if another process has it open, or another run's checkpoints lie there."""
    run = _opened(folder)
    if run is None:
        raise _is_open(folder, option, "another folder")
    if checkpoints_below(folder) and not goes_on_in(folder, resumed_from):
        run.close()
        raise UserError(f"{option} holds checkpoints that this run would overwrite; give another folder")
    return run


def _is_open(folder: Path, option: str, other: str) -> UserError:
    return UserError(f"{option}: another process is writing into {folder}; wait for it, or give {other}")


def choose_run_folder(folder: Path, resumed_from: Path | None, *, begins_again: bool = False) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that holds no other run.

    A run that goes on from the newest checkpoint of `folder` goes on in it.
    """
    return folder if goes_on_in(folder, resumed_from) else next(_free_folders(folder, begins_again))


def goes_on_in(folder: Path, resumed_from: Path | None) -> bool:
    """Whether a run from this checkpoint continues what is in the folder, and overwrites no later step."""
    if not _lies_in(folder, resumed_from):
        return False
    assert resumed_from is not None
    own = step_of(resumed_from)
    return own is not None and not any(
        (step_of(path) or 0) > own and is_whole(path) for path in checkpoints_below(folder)
    )


def _lies_in(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and folder.resolve() in checkpoint.resolve().parents


def _free_folders(folder: Path, begins_again: bool) -> Iterator[Path]:
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return (path for path in itertools.chain([folder], numbered) if _is_free(path, begins_again))


def _is_free(folder: Path, begins_again: bool) -> bool:
    """Whether nothing is in it, or, for a run that begins again, no checkpoint."""
    if not folder.is_dir() or _is_empty(folder):
        return True
    return begins_again and not checkpoints_below(folder)


def _is_empty(folder: Path) -> bool:
    return all(path.name in (LOCK, NUMBERED) for path in folder.iterdir())


def _opened(folder: Path) -> OpenRun | None:
    """None if another process has it open."""
    made = tuple(path for path in (folder, *folder.parents) if not path.exists())
    folder.mkdir(parents=True, exist_ok=True)
    run = OpenRun(folder, FileLock(folder / LOCK, thread_local=False), made)
    try:
        run._lock.acquire(blocking=False)
    except Timeout:
        return None
    try:
        with temporary_beside(folder / "probe") as probe:
            probe.touch()
        sweep(folder)
        restore_set_aside(folder)
    except BaseException:
        run.close()
        raise
    return run
