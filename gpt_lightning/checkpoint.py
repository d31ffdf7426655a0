"""Checkpoint files: written whole or not at all, found again, and opened without the run that made them."""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from gpt_lightning.config import GPTConfig
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.model import GPTModel
from gpt_lightning.parallel.sharded_checkpoint import (
    check_whole,
    is_sharded,
    read_rest,
    read_whole,
    restore_set_aside,
)
from gpt_lightning.training.module import CONFIG_KEY

DATA_KEY = "TextDataModule"
MODEL_PREFIX = "model."


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames.

    Lightning stages in TMPDIR: on another file system the final move is a plain copy, and a crash inside it
    leaves a torn file under the final name.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def newest_checkpoint(folder: Path) -> Path | None:
    """The last written checkpoint below `folder`."""
    restore_set_aside(folder)
    files = [path for path in folder.glob("**/*.ckpt") if path.is_file() or is_sharded(path)]
    return max(files, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), default=None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's contents, tensors mapped from the file, not read; a sharded one's without tensors."""
    if is_sharded(path):
        check_whole(path)
    elif path.is_dir():
        raise ValueError(f"ckpt_path={path} is a folder and no whole sharded checkpoint; name another")
    elif not path.is_file():
        raise ValueError(f"ckpt_path={path} is not a file; name a .ckpt file{_names_of_others(path)}")
    try:
        if is_sharded(path):
            checkpoint = read_rest(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(
            f"ckpt_path={path} cannot be read as a checkpoint ({reason}); name another"
        ) from error
    if not isinstance(checkpoint, Mapping) or CONFIG_KEY not in checkpoint:
        raise ValueError(
            f"ckpt_path={path} was not written by gpt_lightning (it has no {CONFIG_KEY!r}); name another"
        )
    return dict(checkpoint)


def check_not_sharded(path: Path) -> None:
    if is_sharded(path):
        raise ValueError(
            f"ckpt_path={path} is sharded, which only TensorParallelDDPStrategy reads; make a file of it: "
            f"gpt-lightning consolidate --ckpt_path {path} --output FILE"
        )


def consolidate(folder: Path, output: Path) -> None:
    """Write the ordinary checkpoint that a sharded one stands for."""
    if not is_sharded(folder):
        raise ValueError(
            f"ckpt_path={folder} is no sharded checkpoint; name a folder that `save_sharded` wrote"
        )
    if output.exists():
        raise ValueError(f"output={output} exists already; name another file, or remove it")
    read_checkpoint(folder)
    DurableCheckpointIO().save_checkpoint(read_whole(folder), output)


def _names_of_others(path: Path) -> str:
    others = sorted(other.name for other in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    return f"; {path.parent} holds {', '.join(others)}" if others else ""


def checkpoint_config(checkpoint: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**checkpoint[CONFIG_KEY])


def checkpoint_tokenizer(checkpoint: dict[str, Any]) -> TextTokenizer:
    if DATA_KEY not in checkpoint:
        raise ValueError(
            "the checkpoint holds no tokenizer: it was saved by a Trainer without a TextDataModule"
        )
    return TextTokenizer.from_dict(checkpoint[DATA_KEY]["tokenizer"])


def load_model(path: Path) -> tuple[GPTModel, TextTokenizer]:
    """A trained model, ready for inference, and its tokenizer: all that generation needs."""
    check_not_sharded(path)
    checkpoint = read_checkpoint(path)
    model = GPTModel(checkpoint_config(checkpoint))
    weights = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(MODEL_PREFIX)
    }
    model.load_state_dict(weights)
    return model.eval(), checkpoint_tokenizer(checkpoint)
