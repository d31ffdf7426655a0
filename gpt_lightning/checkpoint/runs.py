"""Finds a run's folder, <trainer.default_root_dir>/checkpoints/<run_name>/, and which checkpoint is meant."""

import difflib
import errno
import glob
import itertools
import os
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from gpt_lightning.checkpoint.atomic import naming, release, take_lock, tidy
from gpt_lightning.checkpoint.contents import load_plain
from gpt_lightning.checkpoint.files import is_sharded, no_file, verify
from gpt_lightning.exit_codes import UserError

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
LOCK = ".lock"  # held by the process that writes into a folder
NUMBERED = ".numbered"  # in a folder such as NAME-2: holds NAME, the run_name that was asked for
Warn = Callable[[str], None]  # is told, in one line, of each checkpoint that had to be skipped


def checkpoints_folder(default_root_dir: str | None) -> Path:
    # As Lightning and TensorBoard read it: a run is to lie in one place.
    return Path(os.path.expandvars(os.path.expanduser(default_root_dir or "."))) / CHECKPOINTS


def run_folder(root: Path, run_name: str) -> Path:
    """Returns the folder of the run of this name, which must be a plain one."""
    if Path(run_name).name != run_name or run_name in ("", ".."):
        raise UserError(f"run_name={run_name!r} is not a plain folder name; give one without slashes")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in run_name):
        raise UserError(f"run_name={run_name!r} has characters that no file name should; leave them out")
    # A shell's, TensorBoard's and fsspec's own words.
    if run_name.startswith("~") or os.path.expandvars(run_name) != run_name or "::" in run_name:
        problem = "reads as somebody's home, a variable or an address"
        raise UserError(f"run_name={run_name!r} {problem}; leave out ~, $ and ::")
    return root / run_name


# ---- which checkpoint


def find_checkpoint(given: str | None, folder: Path, warn: Warn = lambda line: None) -> Path:
    """Returns the checkpoint named; without a name, or for `last`, the newest whole one below `folder`.

    A run below `folder` may be named as its folder there.
    """
    if given is not None and given != "last":
        return named_checkpoint(_named_run(Path(given), folder), warn)
    newest = newest_checkpoint(folder, warn)
    if newest is None:
        raise UserError(
            f"{'' if given is None else f'ckpt_path={given}: '}{folder} holds no checkpoint; "
            "run `gpt-lightning fit` first, or give --ckpt_path FILE"
        )
    return newest


def _named_run(path: Path, folder: Path) -> Path:
    """Returns the folder of the run of this name, where nothing is by just that; suggests one like it."""
    if path.exists() or (folder / path).is_dir():
        return path if path.exists() else folder / path
    runs = [run for run in sorted(folder.glob("*")) if run.is_dir()]
    known = [name for run in runs for name in (run.name, str(run), str(run / LAST))]
    if close := difflib.get_close_matches(str(path), known, n=1, cutoff=0.75):
        raise UserError(f"{no_file(path)}; did you mean {close[0]}?")
    return path


def named_checkpoint(path: Path, warn: Warn = lambda line: None) -> Path:
    """Returns a file or a sharded checkpoint as it is; of any other folder the newest whole one."""
    if not path.is_dir() or is_sharded(path):
        return path
    if (newest := newest_checkpoint(path, warn)) is None:
        raise no_file(path)
    return newest


def newest_checkpoint(folder: Path, warn: Warn = lambda line: None) -> Path | None:
    """Returns the last written checkpoint below `folder` that is as it was written; None if there is none."""
    return _newest_of(_checkpoints_below(folder), warn)


def newest_of_run(folder: Path, warn: Warn = lambda line: None) -> Path | None:
    """Returns the newest whole checkpoint of the runs of this name: in `folder`, folder-2, folder-3, ..."""
    # Not those that only look like it: somebody may have named a run so.
    numbered = [marker.parent for marker in folder.parent.glob(f"{glob.escape(folder.name)}-*/{NUMBERED}")]
    numbered = [other for other in numbered if (other / NUMBERED).read_text() == folder.name]
    return _newest_of([path for run in (folder, *numbered) for path in _checkpoints_below(run)], warn)


def step_of(path: Path) -> int | None:
    """Reads the optimizer step at which a checkpoint was saved, and nothing else; None if unreadable."""
    try:
        return int(load_plain(path)["global_step"])
    except Exception:  # what a changed byte in a pickle leads to may be anything
        return None


def _newest_of(paths: list[Path], warn: Warn) -> Path | None:
    """Returns the whole checkpoint of the latest step in the folder that was last written to.

    The youngest file may be a copy of an earlier step; where no step can be read, the time of writing counts.
    """
    times: dict[Path, int] = {}
    for path in paths:
        with suppress(FileNotFoundError):  # a running fit has just replaced it by a better one
            times[path] = path.stat().st_mtime_ns
    complaints: list[str] = []
    newest_first = sorted(times, key=lambda path: times[path], reverse=True)
    for folder in dict.fromkeys(path.parent for path in newest_first):
        among = [path for path in newest_first if path.parent == folder]
        steps = {path: step_of(path) for path in among}
        ranks = {path: (steps[path] or 0, times[path], path.name == LAST) for path in among}
        for path in sorted(among, key=lambda path: ranks[path], reverse=True):
            if not _is_whole(path, complaints.append):
                continue
            for other in among:
                if steps[other] is None and ranks[other] < ranks[path] and times[other] > times[path]:
                    _is_whole(other, complaints.append)
            for complaint in complaints:
                warn(f"skipped: {complaint.removesuffix('; name another')}")
            return path
    if complaints:
        first, *others = complaints
        more = f" (nor are {len(others)} others)" if len(others) > 1 else " (nor is another)" * len(others)
        raise UserError(f"no checkpoint is whole: {first}{more}")
    return None


def _is_whole(path: Path, complain: Warn = lambda line: None) -> bool:
    """Tells whether it is as it was written; `complain` hears what is wrong, unless the file is just gone."""
    try:
        if is_sharded(path):
            from gpt_lightning.checkpoint.folder import check_whole  # slow to import

            check_whole(path)
        else:
            verify(path)
    except UserError as error:
        if path.exists():
            complain(str(error))
        return False
    return True


def _checkpoints_below(folder: Path) -> list[Path]:
    for parent in {old.parent for old in folder.glob("**/.*.ckpt.old")}:
        with suppress(OSError):
            # A run that is writing there sets aside and gives back itself.
            if (lock := take_lock(parent / LOCK)) is not None:
                tidy(parent)
                release(lock)
    return [path for path in folder.glob("**/*.ckpt") if path.is_file() or is_sharded(path)]


# ---- which folder


@dataclass(frozen=True)
class OpenRun:
    """Keeps other processes from writing into a run's folder, until `close` or the end of this process."""

    folder: Path
    _lock: FileLock
    _made: tuple[Path, ...]

    def close(self) -> None:
        """Lets others in, and removes the folders that were made for the run and in which nothing is."""
        release(self._lock)
        with suppress(OSError):  # it is gone already
            if _is_empty(self.folder):
                (self.folder / NUMBERED).unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def open_run_folder(folder: Path, resumed_from: Path | None, *, begins_again: bool = False) -> OpenRun:
    """Makes `folder`, or the first of folder-2, folder-3, ... that holds no other run, and keeps others out.

    A run goes on from the newest checkpoint of `folder` in `folder`. What killed saves left in it is removed.
    A run that `begins_again` was killed before its first checkpoint.
    """
    with naming(_place_of(folder)):
        return _first_open(folder, resumed_from, begins_again)


def check_place(folder: Path) -> None:
    """Refuses a place in which `open_run_folder` would fail, and for which another process calls that.

    Else this one would go on meanwhile, and might tell of the next folder that cannot be written.
    """
    if folder.is_dir() and os.access(folder, os.W_OK):  # as a run's that goes on
        return
    there = next(place for place in folder.absolute().parents if place.exists())
    if not os.access(there, os.W_OK):
        number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        with naming(_place_of(folder)):
            raise OSError(number, os.strerror(number))


def _place_of(folder: Path) -> str:
    return f"trainer.default_root_dir: {folder.parent}"


def _first_open(folder: Path, resumed_from: Path | None, begins_again: bool) -> OpenRun:
    if _lies_in(folder, resumed_from):
        run = _opened_or_refused(folder, f"run_name={folder.name}", "another --run_name")
        if _goes_on_in(folder, resumed_from):  # asked now, when nobody else adds checkpoints
            return run
        run.close()
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for candidate in itertools.chain([folder], numbered):
        if not _is_free(candidate, begins_again) or (opened := _opened(candidate)) is None:
            continue
        if _is_free(candidate, begins_again):
            if candidate != folder:
                (candidate / NUMBERED).write_text(folder.name)
            return opened
        opened.close()
    raise AssertionError("there are always more numbers")


def open_named_folder(folder: Path, resumed_from: Path | None, option: str) -> OpenRun:
    """Opens just this folder; raises if another process has it open, or it has another run's checkpoints."""
    with naming(option):
        run = _opened_or_refused(folder, option, "another folder")
    if _checkpoints_below(folder) and not _goes_on_in(folder, resumed_from):
        run.close()
        raise UserError(f"{option} holds checkpoints that this run would overwrite; give another folder")
    return run


def _opened_or_refused(folder: Path, option: str, other: str) -> OpenRun:
    if (run := _opened(folder)) is not None:
        return run
    raise UserError(f"{option}: another process is writing into {folder}; wait for it, or give {other}")


def _goes_on_in(folder: Path, resumed_from: Path | None) -> bool:
    """Tells whether a run from this checkpoint continues what is there, and overwrites no later step."""
    if not _lies_in(folder, resumed_from):
        return False
    assert resumed_from is not None
    own = step_of(resumed_from)
    return own is not None and not any(
        (step_of(path) or 0) > own and _is_whole(path) for path in _checkpoints_below(folder)
    )


def _lies_in(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and folder.resolve() in checkpoint.resolve().parents


def _is_free(folder: Path, begins_again: bool) -> bool:
    """Tells whether nothing is in it, or, for a run that begins again, no checkpoint."""
    is_empty = not folder.is_dir() or _is_empty(folder)
    return is_empty or begins_again and not _checkpoints_below(folder)


def _is_empty(folder: Path) -> bool:
    return all(path.name in (LOCK, NUMBERED) for path in folder.iterdir())


def _opened(folder: Path) -> OpenRun | None:
    """Opens a folder; None says that another process has it open."""
    made = tuple(path for path in (folder, *folder.parents) if not path.exists())
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := take_lock(folder / LOCK)) is None:
        return None
    run = OpenRun(folder, lock, made)
    try:
        tidy(folder)
    except BaseException:
        run.close()
        raise
    return run
