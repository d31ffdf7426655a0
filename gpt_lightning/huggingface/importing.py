"""Reads a GPT-2, Llama or Qwen of Hugging Face's, by hub name or folder, as the contents of a checkpoint.

Everything is read as data: a .bin file with `weights_only`, and no code that a folder carries.
"""

import json
import logging
import os
import re
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    DATA_KEY,
    ORIGIN_KEY,
    VERSION,
    VERSION_KEY,
)
from gpt_lightning.checkpoint.files import first_non_finite
from gpt_lightning.checkpoint.weights import MODEL_PREFIX
from gpt_lightning.data.chat_template import TEMPLATE_FILE
from gpt_lightning.data.hub import first_line, hub_is_reachable, is_hub_name
from gpt_lightning.data.tokenizer import (
    TextTokenizer,
    as_transformers_reads,
    is_trained_here,
    load_tokenizer_folder,
)
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.families import FAMILIES, Family
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized

_log = logging.getLogger("gpt_lightning")

CONFIG, SAFETENSORS, BIN, INDEX = "config.json", "model.safetensors", "pytorch_model.bin", ".index.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt"),
    *(TEMPLATE_FILE, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model"),
)
FORMS = (SAFETENSORS, BIN)  # of the weights, in one file or in parts that an index lists
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # each a float32 without rounding


def import_model(name: str, option: str) -> dict[str, Any]:
    """Returns the checkpoint of a run of no steps: architecture, weights, tokenizer; errors name `option`."""
    folder = _find(name, option)
    try:
        family, theirs, config = _read_config(folder)
        weights = family.plain(_convert(_read_weights(folder), family, config), theirs)
        tokenizer = _read_tokenizer(folder, config)
    except UserError as error:
        raise UserError(f"{option}={name}: {error}") from None
    origin = name if is_hub_name(name) else folder.resolve().name
    # As data.tokenizer, the bare name would mean one of ours.
    is_ours = origin == "bytes" or is_trained_here(origin)
    settings = {"tokenizer": f"./{origin}" if is_ours else origin}
    data = {"settings": settings, "tokenizer": tokenizer.state, "text": {}}
    position = {"consumed_samples": 0, "batches": 0, "epoch_batches": 0}
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": asdict(config)},
        "state_dict": {MODEL_PREFIX + key: tensor for key, tensor in weights.items()},
        VERSION_KEY: VERSION,
        CONFIG_KEY: asdict(config),
        DATA_KEY: {**position, **data},
        ORIGIN_KEY: origin,
    }


# ---- where


def local_config(name: str, option: str) -> GPTConfig:
    """Reads a model's architecture from a folder or the hub's cache, without the network and its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(os.path.expanduser(name))
    try:
        if not folder.exists() and is_hub_name(name):
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG], local_files_only=True))
        return _read_config(folder)[2]
    except LocalEntryNotFoundError:
        raise UserError(f"{option}={name} is not on this machine; give a folder or a checkpoint") from None
    except UserError as error:
        raise UserError(f"{option}={name}: {error}") from None


def _find(name: str, option: str) -> Path:
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if is_hub_name(name):
        return _download(name, option)
    kind = "is a file" if folder.exists() else "is not there"
    raise UserError(f"{option}={name} {kind}; give a folder that holds {CONFIG}, or a name on the hub")


def _download(name: str, option: str) -> Path:
    """Fetches the files of one form of the weights into the hub's cache."""
    from huggingface_hub import snapshot_download

    reachable = hub_is_reachable()
    try:
        for form in FORMS:
            weights = [f"{form}*", "-*.".join(form.split("."))]
            patterns = [CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, *weights]
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not reachable))
            if any(folder.glob(f"{form}*")):
                break
        return folder
    except Exception as error:  # network, hub and cache each raise their own kinds
        reason = first_line(error)[:160] if reachable else "it cannot be reached"
        problem = f"{option}={name} is no folder here, and cannot be had from the hub ({reason})"
        raise UserError(f"{problem}; check the name, or give a folder") from None


# ---- what


def _read_config(folder: Path) -> tuple[Family, Any, GPTConfig]:
    """Returns whose configuration it is, transformers' form of it, and ours."""
    import transformers

    if not (folder / CONFIG).is_file():
        raise UserError(f"it holds no {CONFIG}; give the folder of a Hugging Face model")
    stored = _read_json(folder / CONFIG)
    kind = stored.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"it is a model of the type {kind!r}; import one of {', '.join(FAMILIES)}")
    try:
        config_class: Any = getattr(transformers, family.config_class)
        # The others, of which some cost memory or make noise, have no meaning here.
        known = family.own | config_class.attribute_map.keys()
        options = {key: value for key, value in stored.items() if key in known}
        ends = {"bos_token_id": None, "eos_token_id": None}
        theirs = config_class.from_dict({**options, **ends})
        return family, theirs, family.config_from(theirs)
    except UserError:
        raise
    except Exception as error:  # huggingface_hub has error classes of its own
        reason = " ".join(str(error).split())
        raise UserError(f"{CONFIG} is no {family.name}'s ({reason}); mend it") from None


def _read_tokenizer(folder: Path, config: GPTConfig) -> TextTokenizer:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if name != TEMPLATE_FILE):
        raise UserError("it holds no tokenizer; put the tokenizer.json that belongs to it there")
    ends = _stored_ends(folder, config)
    ours = load_tokenizer_folder(folder, "its tokenizer", ends[0] if ends else None)
    tokenizer = as_transformers_reads(folder, ours)
    if tokenizer.vocab_size > config.vocab_size:
        ids = f"{tokenizer.vocab_size} ids, and its model knows {config.vocab_size} (vocab_size)"
        raise UserError(f"its tokenizer has {ids}; give the model with its own tokenizer")
    if ends and tokenizer.eos_token_id not in ends:
        message = "%s says eos_token_id=%s, and its tokenizer ends a text with %s; each of them will end one"
        _log.warning(message, folder, ", ".join(map(str, ends)), tokenizer.eos_token_id)
    return tokenizer.with_ends(ends)


def _stored_ends(folder: Path, config: GPTConfig) -> list[int]:
    """Returns what the model takes for ends of a text; an id that it lacks is GPT-2's, written unasked."""
    found: list[int] = []
    for path in (folder / CONFIG, folder / GENERATION_CONFIG):
        stored = _read_json(path).get("eos_token_id") if path.is_file() else None
        found += [index for index in (stored if isinstance(stored, list) else [stored]) if type(index) is int]
    return [index for index in dict.fromkeys(found) if 0 <= index < config.vocab_size]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Maps the weights from their files where the form allows it."""
    from huggingface_hub import load_state_dict_from_file

    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise UserError(f"it lacks {path.name}, a part of its weights; fetch it again")
        try:
            # `weights_only` is said outright: left out, an environment variable could turn it off.
            is_zip = zipfile.is_zipfile(path)
            part = load_state_dict_from_file(path, "cpu", weights_only=True, mmap=is_zip, safe=False)
            if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
                raise UserError("it holds other things than tensors")
        except Exception as error:  # what a changed byte leads to may be anything
            reason = first_line(error)[:160]
            raise UserError(f"{path.name} cannot be read as weights ({reason}); fetch it again") from None
        weights |= {str(name): tensor.detach() for name, tensor in part.items()}
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """Lists the files that the weights are in, all of one form."""
    entries = (folder / name for form in FORMS for name in (form, form + INDEX))
    entry = next((path for path in entries if path.is_file()), None)
    if entry is None:
        raise UserError(f"it holds no weights; give a folder with {SAFETENSORS} or {BIN}")
    if entry.name in FORMS:
        return [entry]
    files = _read_json(entry).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{entry.name} lists no files beside it; fetch it again")
    return [folder / name for name in names]


def _convert(theirs: dict[str, Tensor], family: Family, config: GPTConfig) -> dict[str, Tensor]:
    """Makes GPTModel's weights, in float32, after a look at names, shapes, types and numbers."""
    _check_shapes(theirs, family, config)
    ours = family.weights_from(theirs, config)
    for name, tensor in ours.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"weights of {tensor.dtype} ({name}); save the model in float32")
    if (non_finite := first_non_finite(ours.items())) is not None:
        raise UserError(f"{non_finite} holds NaN or infinity; fetch the weights again")
    converted = {name: tensor.float() for name, tensor in ours.items()}
    if config.tie_embeddings:  # one tensor in the file, too
        converted["lm_head.weight"] = converted["token_embedding.weight"]
    return converted


def _check_shapes(theirs: dict[str, Tensor], family: Family, config: GPTConfig) -> None:
    # Before a model is built: a wrong number could be one of thousands of millions.
    blocks = {match[1] for name in theirs if (match := re.match(family.blocks, name))}
    if len(blocks) != config.n_layers:
        raise UserError(f"{CONFIG} says {config.n_layers} layers, and the weights are of {len(blocks)}")
    try:
        with torch.device("meta"), Uninitialized():
            expected = family.weights_to(GPTModel(config).state_dict(), config)
    except (TypeError, RuntimeError) as error:  # beyond 64 bits
        raise UserError(f"{CONFIG} gives sizes of no weights ({first_line(error)[:160]}); mend it") from None
    for name, tensor in expected.items():
        found = theirs.get(name, theirs.get(name.removeprefix("transformer.")))
        if found is not None and found.shape != tensor.shape:
            raise UserError(f"{name} is {list(found.shape)}, and by {CONFIG} {list(tensor.shape)}")


# ---- files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is no JSON ({first_line(error)[:160]}); mend it") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path.name} holds no options; mend it")
    return stored
