"""Checkpoints: found again, and opened without their run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    DATA_KEY,
    MODEL_PREFIX,
    check_contents,
    check_own,
    load_plain,
    read_checked,
)
from gpt_lightning.checkpoint.files import known_digest, verify, write
from gpt_lightning.checkpoint.folder import (
    REST,
    check_whole,
    is_sharded,
    read_rest,
    restore_set_aside,
)
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized

LAST = "last.ckpt"
LOCK = ".lock"  # held by the process that writes into a folder


# ---- finding


def newest_checkpoint(folder: Path, warn: Callable[[str], None] = lambda line: None) -> Path | None:
    """The last written checkpoint below `folder` that is as it was written; None if there is none at all.

    `warn` is told of each newer one that had to be skipped.
    """
    return newest_of(checkpoints_below(folder), warn)


def checkpoints_below(folder: Path) -> list[Path]:
    _restore_set_aside(folder)
    return [path for path in folder.glob("**/*.ckpt") if path.is_file() or is_sharded(path)]


def newest_of(paths: list[Path], warn: Callable[[str], None]) -> Path | None:
    """In the folder that was last written to, that of the latest step: copies of earlier ones may be younger.

    Where no step can be read, the time it was written counts.
    """
    times = {path: stat.st_mtime_ns for path in paths if (stat := _stat(path))}
    complaints: list[str] = []
    for among in _by_folder(times):
        steps = {path: step_of(path) for path in among}
        ranks = {path: (steps[path] or 0, times[path], path.name == LAST) for path in among}
        for path in sorted(among, key=lambda path: ranks[path], reverse=True):
            if not is_whole(path, complaints.append):
                continue
            for other in among:
                if steps[other] is None and ranks[other] < ranks[path] and times[other] > times[path]:
                    is_whole(other, complaints.append)
            for complaint in complaints:
                warn(f"skipped: {complaint.removesuffix('; name another')}")
            return path
    if complaints:
        raise UserError(f"no checkpoint is whole: {complaints[0]}" + _and_others(complaints))
    return None


def _by_folder(times: dict[Path, int]) -> list[list[Path]]:
    """The folder that was last written to first."""
    newest_first = sorted(times, key=lambda path: times[path], reverse=True)
    folders = dict.fromkeys(path.parent for path in newest_first)
    return [[path for path in newest_first if path.parent == folder] for folder in folders]


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that a running fit has just replaced by a better one."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _and_others(complaints: list[str]) -> str:
    return f" (nor are {len(complaints) - 1} others)" if len(complaints) > 1 else ""


def _restore_set_aside(folder: Path) -> None:
    """Unless a run is writing there, which sets aside and gives back itself."""
    for parent in {old.parent for old in folder.glob("**/.*.ckpt.old")}:
        try:
            with FileLock(parent / LOCK, blocking=False):
                restore_set_aside(parent)
        except (Timeout, OSError):
            continue


# ---- reading


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's contents, tensors mapped from the file, not read; a sharded one's without tensors."""
    check_exists(path)
    if is_sharded(path):
        check_whole(path)
        checkpoint = read_rest(path)
        check_contents(path, checkpoint)
    else:
        checkpoint = read_checked(path)
    check_own(path, checkpoint)
    return checkpoint


def check_exists(path: Path) -> None:
    if path.is_dir() and not is_sharded(path):
        raise UserError(f"ckpt_path={path} is a folder and no whole sharded checkpoint; name another")
    if not path.exists():
        raise UserError(f"ckpt_path={path} is not a file; name a .ckpt file{_names_of_others(path)}")


def step_of(path: Path) -> int | None:
    """The optimizer step at which a checkpoint was saved, without a look at the rest; None if unreadable."""
    try:
        checkpoint = read_rest(path) if is_sharded(path) else load_plain(path)
        return int(checkpoint["global_step"])
    except Exception:  # what a changed byte in a pickle leads to may be anything
        return None


def is_whole(path: Path, complain: Callable[[str], None] = lambda line: None) -> bool:
    """Tells `complain` what is wrong, unless the file is just gone."""
    try:
        check_bytes_of(path)
    except UserError as error:
        if path.exists():
            complain(str(error))
        return False
    return True


def check_bytes_of(path: Path) -> None:
    """Raise UserError, in one line, if a checkpoint, file or folder, is not as it was written."""
    if is_sharded(path):
        check_whole(path)
    else:
        verify(path)


def checkpoint_digest(path: Path) -> str:
    """Another checkpoint has another."""
    # It holds the digests of the others in its folder.
    return known_digest(path / REST if is_sharded(path) else path)


def check_not_sharded(path: Path) -> None:
    if is_sharded(path):
        raise UserError(
            f"ckpt_path={path} is sharded, which only TensorParallelDDPStrategy reads; make a file of it: "
            f"gpt-lightning consolidate --ckpt_path {path} --output FILE"
        )


def consolidate(folder: Path, output: Path) -> None:
    """Write the ordinary checkpoint that a sharded one stands for."""
    if not is_sharded(folder):
        raise UserError(
            f"ckpt_path={folder} is no sharded checkpoint; name a folder that `save_sharded` wrote"
        )
    if output.exists():
        raise UserError(f"output={output} exists already; name another file, or remove it")
    from gpt_lightning.parallel.sharded_checkpoint import read_whole  # slow to import

    read_checkpoint(folder)
    write(read_whole(folder), output)


def _names_of_others(path: Path) -> str:
    others = sorted(other.name for other in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    return f"; {path.parent} holds {', '.join(others)}" if others else ""


def checkpoint_config(checkpoint: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**checkpoint[CONFIG_KEY])


def checkpoint_tokenizer(checkpoint: dict[str, Any]) -> TextTokenizer:
    if DATA_KEY not in checkpoint:
        raise UserError(
            "the checkpoint holds no tokenizer: it was saved by a Trainer without a TextDataModule"
        )
    return TextTokenizer.from_dict(checkpoint[DATA_KEY]["tokenizer"])


def load_model(path: Path) -> tuple[GPTModel, TextTokenizer]:
    """A trained model, ready for inference, and its tokenizer: all that generation needs."""
    check_not_sharded(path)
    checkpoint = read_checkpoint(path)
    with Uninitialized():
        model = GPTModel(checkpoint_config(checkpoint))
    weights = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(MODEL_PREFIX)
    }
    model.load_state_dict(weights)
    return model.eval(), checkpoint_tokenizer(checkpoint)
