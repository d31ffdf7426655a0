"""Opens a checkpoint once: verifies its bytes, refuses what could act, and needs no run to read it."""

import hashlib
import logging
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    DATA_KEY,
    MODULE_KEY,
    TOKENIZER_KEY,
    check_contents,
    layers_of_child_class,
    read_checked,
    with_config_of_child_class,
)
from gpt_lightning.checkpoint.files import REST, WEIGHTS, is_sharded, write
from gpt_lightning.checkpoint.runs import named_checkpoint
from gpt_lightning.checkpoint.weights import MODEL_PREFIX
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized

_log = logging.getLogger("gpt_lightning")


@dataclass(frozen=True)
class Checkpoint:
    """Holds a checkpoint's path and contents: tensors mapped from its file, or none if it is sharded."""

    path: Path
    contents: dict[str, Any]
    is_sharded: bool = False

    @classmethod
    def open(cls, path: Path, *, may_be_sharded: bool = True) -> "Checkpoint":
        """Raises UserError, in one line that names the file, for what cannot be used."""
        sharded = may_be_sharded and is_sharded(path)
        contents = read_checked(path, sharded=sharded)
        if CONFIG_KEY not in contents and with_config_of_child_class(contents):
            check_contents(path, contents)
        if CONFIG_KEY not in contents:
            raise UserError(
                f"ckpt_path={path} was not written by gpt_lightning (it has no {CONFIG_KEY!r}); name another"
            )
        return cls(path, contents, sharded)

    @property
    def step(self) -> int:
        """Returns how many optimizer steps were taken before it was saved."""
        return int(self.contents.get("global_step", 0))

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.contents[CONFIG_KEY])

    @property
    def data(self) -> dict[str, Any]:
        """Returns the state of the TextDataModule that the model was trained with."""
        if DATA_KEY not in self.contents:
            raise UserError(
                f"ckpt_path={self.path} was trained without a TextDataModule; go on with it from Python"
            )
        state: dict[str, Any] = self.contents[DATA_KEY]
        return state

    @property
    def has_tokenizer(self) -> bool:
        return DATA_KEY in self.contents or TOKENIZER_KEY in self.contents

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        if not self.has_tokenizer:
            raise UserError(
                f"ckpt_path={self.path}: the checkpoint holds no tokenizer, as its Trainer had no "
                "TextDataModule; set module.tokenizer before it is saved"
            )
        try:
            found = TextTokenizer.from_dict(self.contents.get(TOKENIZER_KEY) or self.data["tokenizer"])
        except UserError as error:
            raise UserError(f"ckpt_path={self.path}: {error}; name another") from None
        largest, size = max(found.vocab_size - 1, *found.eos_token_ids), self.config.vocab_size
        if largest >= size:
            problem = f"its tokenizer has ids up to {largest}, its model 0 to {size - 1}"
            raise UserError(f"ckpt_path={self.path} does not fit itself: {problem}; name another")
        return found

    @cached_property
    def digest(self) -> str:
        """Differs between any two checkpoints: it is made of the names and checksums of a file's records."""
        # A folder's has the digests of its other files in it.
        with zipfile.ZipFile(self.path / REST if self.is_sharded else self.path) as archive:
            records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
        return hashlib.sha256(repr(records).encode()).hexdigest()

    @property
    def weights(self) -> dict[str, Any]:
        """Returns the model's state dict, under GPTModel's own names; refuses the GPT of a child class."""
        if (problem := layers_of_child_class(self.contents)) is not None:
            name = self.contents[MODULE_KEY]
            raise UserError(
                f"ckpt_path={self.path} is of {name!r}; use that class, by its load_from_checkpoint or with "
                f"--model {name} --allow_import {name.partition('.')[0]}: the file {problem}"
            )
        weights = self.contents[WEIGHTS]
        if beside := [name for name in weights if not name.startswith(MODEL_PREFIX)]:
            names = f"{', '.join(beside[:3])}{', ...' if len(beside) > 3 else ''}"
            _log.warning(f"{self.path}: {len(beside)} weights beside the GPT are left out ({names})")
        return {
            name.removeprefix(MODEL_PREFIX): tensor for name, tensor in weights.items() if name not in beside
        }

    def whole(self) -> "Checkpoint":
        """Returns the checkpoint with its tensors; those of a sharded one are read now, by this process."""
        if not self.is_sharded:
            return self
        from gpt_lightning.checkpoint.folder import read_whole  # slow to import

        return Checkpoint(self.path, read_whole(self.path))


def load_model(path: Path | str) -> tuple[GPTModel, TextTokenizer]:
    """Returns a trained model, ready for inference, and its tokenizer: all that generation needs.

    Of a folder it takes the newest checkpoint.
    """
    checkpoint = Checkpoint.open(named_checkpoint(Path(path)), may_be_sharded=False)
    with Uninitialized():
        model = GPTModel(checkpoint.config)
    model.load_state_dict(checkpoint.weights)
    return model.eval(), checkpoint.tokenizer


def consolidate(folder: Path, output: Path) -> None:
    """Writes the ordinary checkpoint that a sharded one stands for."""
    if not is_sharded(folder):
        raise UserError(f"ckpt_path={folder} is no sharded checkpoint; name what `save_sharded` wrote")
    if output.exists():
        raise UserError(f"output={output} exists already; name another file, or remove it")
    write(Checkpoint.open(folder).whole().contents, output)
