"""Writes a checkpoint as the folder that transformers, and what is built on it, opens without us."""

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.checkpoint.atomic import naming, written_folder
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.files import first_non_finite, write_error
from gpt_lightning.data.tokenizer import TextTokenizer, is_read_by_transformers
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.families import LLAMA, QWEN2, family_of
from gpt_lightning.huggingface.model_card import model_card
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized

_log = logging.getLogger("gpt_lightning")


def export_model(path: Path, folder: Path) -> None:
    """Writes configuration, weights, tokenizer and model card; the folder gets its name when it is whole."""
    exists = folder.exists()
    if exists and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"FOLDER={folder} exists already; name another, or remove it")
    checkpoint = Checkpoint.open(path).whole()
    check_finite(checkpoint)
    config, weights = _as_opened(checkpoint)  # before anything is written
    place = folder.resolve()  # of "." or a link, that which has a name
    card = model_card(checkpoint, place.name, family_of(config))
    target = place / place.name if exists else place
    try:
        with naming(f"FOLDER={folder}"), written_folder(target) as temporary:
            _write_model(config, weights, checkpoint.tokenizer, temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if exists:  # is filled, config.json last: somebody may stand in it
            for file in sorted(target.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, place / file.name)
            target.rmdir()
    except OSError as error:
        raise write_error(folder, error) from error


def check_finite(checkpoint: Checkpoint) -> None:
    """Raises UserError for weights with which no program computes anything."""
    if (name := first_non_finite(checkpoint.weights.items())) is not None:
        raise UserError(
            f"ckpt_path={checkpoint.path} holds NaN or infinity in {name}: its weights diverged; use an "
            "earlier checkpoint"
        )


def _as_opened(checkpoint: Checkpoint) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Returns the network as a model beside which transformers reads its tokenizer as it is.

    Beside a Qwen2 it reads any as Qwen's own, whatever the folder says; a Llama with zeros for the other
    biases computes the same.
    """
    config, weights = checkpoint.config, checkpoint.weights
    family = family_of(config)
    if family is not QWEN2 or is_read_by_transformers(checkpoint.tokenizer, family.model_type):
        return config, weights
    message = "its tokenizer is not Qwen's: it becomes a %s with zeros for the biases that it lacks"
    _log.warning(message, LLAMA.name)
    config = replace(config, bias=True)
    with torch.device("meta"), Uninitialized():
        shapes = {name: weight.shape for name, weight in GPTModel(config).state_dict().items()}
    return config, {name: weights.get(name, torch.zeros(shape)) for name, shape in shapes.items()}


def _write_model(
    config: GPTConfig, weights: dict[str, Tensor], tokenizer: TextTokenizer, folder: Path
) -> None:
    import transformers

    family = family_of(config)
    ends: dict[str, Any] = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    names: dict[str, Any] = {"architectures": [family.architecture], "dtype": "float32"}
    config_class: Any = getattr(transformers, family.config_class)
    config_class(**family.config_to(config), **ends, **names).save_pretrained(folder)
    if len(tokenizer.eos_token_ids) > 1:  # which `generate` of transformers reads there
        ends["eos_token_id"] = tokenizer.eos_token_ids
    transformers.GenerationConfig(**ends, pad_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.padded(config.vocab_size).save(folder, max_length=config.max_position_embeddings)
    ours = {name: tensor.float() for name, tensor in weights.items()}
    theirs = family.weights_to(ours, config)
    if config.tie_embeddings:  # transformers makes it of the token table
        del theirs["lm_head.weight"]
    _save(theirs, folder / "model.safetensors")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone reads it


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """Writes the file of weights; a full disk is the system's error, of which safetensors has only a text."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (code := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
