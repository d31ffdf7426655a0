"""Opens a checkpoint once: verifies its bytes, refuses what could act, and needs no run to read it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    DATA_KEY,
    MODEL_PREFIX,
    WEIGHTS_KEY,
    check_contents,
    check_own,
    read_checked,
)
from gpt_lightning.checkpoint.files import REST, fingerprint, is_sharded, write
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized


@dataclass(frozen=True)
class Checkpoint:
    """Holds a checkpoint's path and contents: tensors mapped from its file, or none if it is sharded."""

    path: Path
    contents: dict[str, Any]
    is_sharded: bool = False

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Raises UserError, in one line that names the file, for what cannot be used."""
        if is_sharded(path):
            from gpt_lightning.checkpoint.folder import check_whole  # slow to import

            checkpoint = cls(path, check_whole(path), is_sharded=True)
            check_contents(path, checkpoint.contents)
        else:
            check_is_file(path)
            checkpoint = cls(path, read_checked(path))
        check_own(path, checkpoint.contents)
        return checkpoint

    @property
    def step(self) -> int:
        """Returns how many optimizer steps were taken before it was saved."""
        return int(self.contents.get("global_step", 0))

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.contents[CONFIG_KEY])

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        if DATA_KEY not in self.contents:
            raise UserError(
                "the checkpoint holds no tokenizer: it was saved by a Trainer without a TextDataModule"
            )
        return TextTokenizer.from_dict(self.contents[DATA_KEY]["tokenizer"])

    @cached_property
    def digest(self) -> str:
        """Identifies the checkpoint by the checksums of all that it holds."""
        # A folder's rest.pt holds the digests of its other files.
        return fingerprint(self.path / REST if self.is_sharded else self.path)

    @property
    def weights(self) -> dict[str, Any]:
        """Returns the model's state dict, under GPTModel's own names."""
        return {
            name.removeprefix(MODEL_PREFIX): tensor
            for name, tensor in self.contents[WEIGHTS_KEY].items()
            if name.startswith(MODEL_PREFIX)
        }

    def whole(self) -> "Checkpoint":
        """Returns the checkpoint with its tensors; those of a sharded one are read now, by this process."""
        if not self.is_sharded:
            return self
        from gpt_lightning.checkpoint.folder import read_whole  # slow to import

        return Checkpoint(self.path, read_whole(self.path))


def check_is_file(path: Path) -> None:
    """Raises UserError unless the path is that of a file, as an ordinary checkpoint is."""
    if is_sharded(path):
        raise UserError(
            f"ckpt_path={path} is sharded, which only TensorParallelDDPStrategy reads; make a file of it: "
            f"gpt-lightning consolidate --ckpt_path {path} --output FILE"
        )
    if path.is_dir():
        raise UserError(f"ckpt_path={path} is a folder and no whole sharded checkpoint; name another")
    if not path.exists():
        others = sorted(other.name for other in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        listing = f"; {path.parent} holds {', '.join(others)}" if others else ""
        raise UserError(f"ckpt_path={path} is not a file; name a .ckpt file{listing}")


def load_model(path: Path) -> tuple[GPTModel, TextTokenizer]:
    """Returns a trained model, ready for inference, and its tokenizer: all that generation needs."""
    check_is_file(path)
    checkpoint = Checkpoint.open(path)
    with Uninitialized():
        model = GPTModel(checkpoint.config)
    model.load_state_dict(checkpoint.weights)
    return model.eval(), checkpoint.tokenizer


def consolidate(folder: Path, output: Path) -> None:
    """Writes the ordinary checkpoint that a sharded one stands for."""
    if not is_sharded(folder):
        raise UserError(
            f"ckpt_path={folder} is no sharded checkpoint; name a folder that `save_sharded` wrote"
        )
    if output.exists():
        raise UserError(f"output={output} exists already; name another file, or remove it")
    write(Checkpoint.open(folder).whole().contents, output)
