"""Where a run lives, <trainer.default_root_dir>/checkpoints/<run_name>/, and which checkpoint is meant."""

from pathlib import Path

from gpt_lightning.checkpoint import newest_checkpoint

CHECKPOINTS = "checkpoints"


def checkpoints_folder(default_root_dir: str | None) -> Path:
    return Path(default_root_dir or ".") / CHECKPOINTS


def choose_run_folder(folder: Path, resumed_from: Path | None) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that holds no other run.

    A run that continues a checkpoint of `folder` continues in it.
    """
    if resumed_from is not None and resumed_from.resolve().parent == folder.resolve():
        return folder
    candidate, number = folder, 1
    while candidate.is_dir() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def newest_of_run(folder: Path) -> Path | None:
    """The newest checkpoint of the runs of this name: in `folder`, folder-2, folder-3, ..."""
    folders = [folder, *folder.parent.glob(f"{folder.name}-[0-9]*")]
    found = [path for path in map(newest_checkpoint, folders) if path is not None]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def find_checkpoint(given: str | None, folder: Path) -> Path:
    """The checkpoint named; without a name, or for `last`, the newest below `folder`."""
    if given is not None and given != "last":
        return Path(given)
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(
            f"ckpt_path={given or ''} names no checkpoint and {folder} holds none; "
            "run `gpt-lightning fit` first, or give --ckpt_path FILE"
        )
    return newest
