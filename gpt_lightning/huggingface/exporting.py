"""A checkpoint as the folder that transformers, and what is built on it, opens without this package."""

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt_lightning.checkpoint.checkpoint import (
    MODEL_PREFIX,
    checkpoint_config,
    checkpoint_tokenizer,
    read_checkpoint,
)
from gpt_lightning.checkpoint.files import sync_folder, write_error
from gpt_lightning.checkpoint.folder import is_sharded
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.gpt2 import config_to_gpt2, to_gpt2_state_dict
from gpt_lightning.huggingface.model_card import model_card
from gpt_lightning.model.config import GPTConfig


def export_gpt2(path: Path, folder: Path) -> None:
    """Write configuration, weights, tokenizer and model card; the folder gets its name when it is whole."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"FOLDER={folder} exists already; name another, or remove it")
    checkpoint = read_checkpoint(path)
    if is_sharded(path):
        from gpt_lightning.parallel.sharded_checkpoint import read_whole  # slow to import

        checkpoint = read_whole(path)
    config, tokenizer = checkpoint_config(checkpoint), checkpoint_tokenizer(checkpoint)
    try:
        place = folder.resolve()  # of "." or a link, that which has a name
        with _named_when_whole(place) as temporary:
            _write_model(checkpoint["state_dict"], config, tokenizer, temporary)
            card = model_card(checkpoint, place.name)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise write_error(folder, error) from error


@contextmanager
def _named_when_whole(folder: Path) -> Generator[Path, None, None]:
    """A folder beside it, which takes its place in the end, or is gone.

    One that exists is filled, config.json last: somebody may stand in it.
    """
    exists = folder.exists()
    temporary = (folder if exists else folder.parent) / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if exists:
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, folder / file.name)
            sync_folder(folder)
        else:
            os.replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(
    state_dict: dict[str, Tensor], config: GPTConfig, tokenizer: TextTokenizer, folder: Path
) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config

    ends: dict[str, Any] = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    names: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    GPT2Config(**config_to_gpt2(config), **ends, **names).save_pretrained(folder)
    GenerationConfig(**ends, pad_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.padded(config.vocab_size).save(folder, max_length=config.max_position_embeddings)
    ours = {
        name.removeprefix(MODEL_PREFIX): tensor.float()
        for name, tensor in state_dict.items()
        if name.startswith(MODEL_PREFIX)
    }
    theirs = to_gpt2_state_dict(ours, config)
    if config.tie_embeddings:  # transformers makes it of the token table
        del theirs["lm_head.weight"]
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone reads it
