"""What a checkpoint may hold: plain data, and the weights of its own architecture. Nothing in it can act."""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from gpt_lightning.checkpoint.files import unreadable, verify
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized

CONFIG_KEY = "gpt_config"
DATA_KEY = "TextDataModule"
MODEL_PREFIX = "model."
ORIGIN_KEY = "begun_from"  # what other model's weights a run began with, or were imported
VALIDATION_KEY = "last_validation"  # its step, its loss, and whether it was of the whole text
WEIGHTS_KEY = "state_dict"
OPTIMIZERS_KEY = "optimizer_states"
PROGRESS_KEYS = ("global_step", "loops")
# Where Lightning looks for the arguments to build a module or a datamodule with, today and formerly.
_HYPER_PARAMETERS = (
    *("hyper_parameters", "hparams_name", "hparams_type", "hparams", "module_arguments"),
    *("datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type"),
)
# Names by which Lightning and jsonargparse are told what to import and call.
_CALLING_KEYS = {"class_path", "_class_path", "_instantiator", "init_args", "dict_kwargs"}
_SHOWN = 3


def load_plain(path: str | Path) -> Any:
    """What the file holds, tensors mapped from it, not read.

    `weights_only` is said outright: left out, an environment variable could turn it off.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, KeyError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise unreadable(Path(path), error) from error


def read_checked(path: str | Path) -> dict[str, Any]:
    """A file that is as it was written, and in which nothing acts; another module's checkpoint may be one."""
    verify(Path(path))
    checkpoint = load_plain(path)
    check_contents(path, checkpoint)
    return dict(checkpoint)


def check_contents(path: str | Path, checkpoint: Any) -> None:
    """Raise, in one line, what no checkpoint holds, and where one of this package does not fit itself."""
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise UserError(f"ckpt_path={path} was not written by gpt_lightning (it is a {kind}); name another")
    for key in _HYPER_PARAMETERS:
        for problem in _problems(checkpoint.get(key), key):
            raise UserError(
                f"ckpt_path={path} holds {problem}; hyper-parameters are plain numbers and texts that name "
                "nothing to import: do not trust the file"
            )
    if DATA_KEY in checkpoint:
        _check_data(path, checkpoint[DATA_KEY])
    if CONFIG_KEY in checkpoint:
        _check_progress(path, checkpoint)
        config = _stored_config(path, checkpoint[CONFIG_KEY])
        # A sharded checkpoint keeps its weights in files of their own.
        if checkpoint.get(WEIGHTS_KEY):
            _check_weights(path, config, checkpoint[WEIGHTS_KEY])


def check_own(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    if CONFIG_KEY not in checkpoint:
        raise UserError(
            f"ckpt_path={path} was not written by gpt_lightning (it has no {CONFIG_KEY!r}); name another"
        )


def _check_progress(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Without the optimizer's state nobody goes on from it, and asks how far it came."""
    for key in PROGRESS_KEYS if OPTIMIZERS_KEY in checkpoint else ():
        if key not in checkpoint:
            raise UserError(f"ckpt_path={path} lacks {key!r}, without which no run goes on; name another")


def _check_data(path: str | Path, state: Any) -> None:
    """The state of a TextDataModule: a tokenizer of two texts, and the settings that a run must share."""
    state = state if isinstance(state, dict) else {}
    tokenizer, settings = state.get("tokenizer"), state.get("settings")
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    texts = [key for key, value in tokenizer.items() if type(value) is str]
    plain = isinstance(settings, dict) and not any(_problems(settings, DATA_KEY))
    if not plain or not {"tokenizer_json", "eos_token"} <= set(texts):
        raise UserError(f"ckpt_path={path} holds no tokenizer and settings under {DATA_KEY}; name another")


def check_same_architecture(config: GPTConfig, checkpoint: Mapping[str, Any]) -> None:
    """Raise where a model differs from the one whose weights it is to take; dropout has none."""
    if CONFIG_KEY not in checkpoint:
        return
    stored = GPTConfig(**checkpoint[CONFIG_KEY])
    names = [field.name for field in fields(GPTConfig) if field.name not in ("dropout", "d_ff")]
    pairs = [(name, getattr(config, name), getattr(stored, name)) for name in names]
    pairs.append(("d_ff", config.mlp_width, stored.mlp_width))
    differences = [f"{name}={own} (there {its})" for name, own, its in pairs if own != its]
    if differences:
        raise UserError(
            f"model.config differs from the checkpoint's: {', '.join(differences)}; build the model as the "
            "checkpoint has it"
        )


def _stored_config(path: str | Path, stored: Any) -> GPTConfig:
    kinds = {field.name: field.type for field in fields(GPTConfig)}
    if not isinstance(stored, Mapping):
        raise UserError(f"ckpt_path={path} holds {CONFIG_KEY}={_short(stored)}, no options; name another")
    for name, value in stored.items():
        if name not in kinds:
            raise UserError(f"ckpt_path={path} holds {CONFIG_KEY}.{name}, which is no option; name another")
        if not _fits(value, kinds[name]):
            raise UserError(f"ckpt_path={path} holds {CONFIG_KEY}.{name}={_short(value)}; name another")
    try:
        return GPTConfig(**stored)
    except UserError as error:
        raise UserError(f"ckpt_path={path} holds no possible model: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; a whole number does for a float."""
    return type(value) in (get_args(kind) or (kind,)) or (kind is float and type(value) is int)


def _problems(value: Any, place: str) -> Iterator[str]:
    """Where a value, or a part of it, is no plain data, or could be taken for something to import."""
    if isinstance(value, dict):
        for key, part in value.items():
            if type(key) is not str or key in _CALLING_KEYS:
                yield f"{place}[{_short(key)}]"
            yield from _problems(part, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _problems(part, f"{place}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        yield f"a {type(value).__name__} as {place}"


def _check_weights(path: str | Path, config: GPTConfig, state_dict: Mapping[str, Any]) -> None:
    found = {
        name.removeprefix(MODEL_PREFIX): tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in state_dict.items()
        if str(name).startswith(MODEL_PREFIX)
    }
    # Before the model is built: a wrong number could be one of thousands of millions.
    n_blocks = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    if n_blocks != config.n_layers:
        raise UserError(
            f"ckpt_path={path} does not fit itself: {CONFIG_KEY}.n_layers={config.n_layers}, but it holds "
            f"the weights of {n_blocks} blocks; name another"
        )
    with torch.device("meta"), Uninitialized():
        expected = {name: tuple(value.shape) for name, value in GPTModel(config).state_dict().items()}
    other_shape = [
        f"{name} {list(shape) if shape is not None else 'no tensor'} instead of {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    differences = (
        _listed([name for name in expected if name not in found], "missing"),
        _listed([name for name in found if name not in expected], "unknown"),
        _listed(other_shape, "of another shape"),
    )
    if any(differences):
        raise UserError(
            f"ckpt_path={path} does not hold the weights of its {CONFIG_KEY}: "
            f"{'; '.join(filter(None, differences))}; name another"
        )


def _listed(names: list[str], what: str) -> str:
    """`5 missing (a, b, c, ...)`, or nothing for none."""
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
