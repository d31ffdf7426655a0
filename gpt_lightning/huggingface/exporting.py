"""Writes a checkpoint as the folder that transformers, and what is built on it, opens without us."""

import os
import shutil
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint.atomic import written_folder
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.files import write_error
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.families import family_of
from gpt_lightning.huggingface.model_card import model_card


def export_model(path: Path, folder: Path) -> None:
    """Writes configuration, weights, tokenizer and model card; the folder gets its name when it is whole."""
    exists = folder.exists()
    if exists and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"FOLDER={folder} exists already; name another, or remove it")
    checkpoint = Checkpoint.open(path).whole()
    family_of(checkpoint.config)  # before anything is written
    place = folder.resolve()  # of "." or a link, that which has a name
    card = model_card(checkpoint, place.name)
    target = place / place.name if exists else place
    try:
        with written_folder(target) as temporary:
            _write_model(checkpoint, temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if exists:  # is filled, config.json last: somebody may stand in it
            for file in sorted(target.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, place / file.name)
            target.rmdir()
    except OSError as error:
        raise write_error(folder, error) from error


def _write_model(checkpoint: Checkpoint, folder: Path) -> None:
    import transformers
    from safetensors.torch import save_file

    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    family = family_of(config)
    ends: dict[str, Any] = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    names: dict[str, Any] = {"architectures": [family.architecture], "dtype": "float32"}
    config_class: Any = getattr(transformers, family.config_class)
    config_class(**family.config_to(config), **ends, **names).save_pretrained(folder)
    if len(tokenizer.eos_token_ids) > 1:  # which `generate` of transformers reads there
        ends["eos_token_id"] = tokenizer.eos_token_ids
    transformers.GenerationConfig(**ends, pad_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.padded(config.vocab_size).save(folder, max_length=config.max_position_embeddings)
    ours = {name: tensor.float() for name, tensor in checkpoint.weights.items()}
    theirs = family.weights_to(ours, config)
    if config.tie_embeddings:  # transformers makes it of the token table
        del theirs["lm_head.weight"]
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone reads it
