"""Has a module's checkpoint say all that is needed to build and use it again, in plain values."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    DATA_KEY,
    MODULE_KEY,
    TOKENIZER_KEY,
    VERSION,
    VERSION_KEY,
    acting,
    other_layers,
)
from gpt_lightning.checkpoint.values import short
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.trainer import ResumeCallback


def arguments_of_child_classes(module: object, frame: FrameType | None) -> dict[str, Any]:
    """Collects the plain arguments of the `__init__`s that called the one of this frame."""
    found: dict[str, Any] = {}
    while frame is not None and (frame := frame.f_back) is not None:
        names, _, keywords, values = inspect.getargvalues(frame)
        if frame.f_code.co_name != "__init__" or not names or values[names[0]] is not module:
            break
        given = {name: values[name] for name in names[1:]} | (values[keywords] if keywords else {})
        for name, value in given.items():
            if _is_plain(value := _plain(value)):
                found[name] = value
    return found


def check_arguments(path: Path, contents: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuses stored options of which none of these can be made; a child class may call others so."""
    stored = {} if MODULE_KEY in contents else contents.get("hyper_parameters") or {}
    for name in stored.keys() & kinds.keys():
        try:
            kinds[name](**stored[name])
        except (TypeError, AttributeError) as error:
            problem = f"holds hyper_parameters.{name}={short(stored[name])}, no {kinds[name].__name__}"
            raise UserError(f"ckpt_path={path} {problem} ({error}); name another") from None


def plain_settings(settings: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Makes dictionaries of dataclasses, and refuses what cannot be made plain."""
    plain = {name: _plain(value) for name, value in settings.items()}
    for name, value in plain.items():
        if not _is_plain(value):
            raise UserError(
                f"{whose}: the hyper-parameter {name} is a {type(value).__name__}, and a checkpoint with it "
                f"would be refused; leave it out: self.save_hyperparameters(ignore=[{name!r}])"
            )
        if (problem := next(acting({name: value}, "hyper_parameters"), None)) is not None:
            raise UserError(
                f"{whose}: a checkpoint with {problem} would be refused, as that names something to import; "
                "call it otherwise"
            )
    return plain


def describe(
    checkpoint: dict[str, Any], config: GPTConfig, child: type | None, tokenizer: TextTokenizer | None
) -> None:
    """Adds version, architecture, a child class's name, and a tokenizer that no TextDataModule has saved."""
    checkpoint |= {VERSION_KEY: VERSION, CONFIG_KEY: asdict(config)}
    if child is not None:
        checkpoint[MODULE_KEY] = f"{child.__module__}.{child.__qualname__}"
    if tokenizer is not None and DATA_KEY not in checkpoint:
        checkpoint[TOKENIZER_KEY] = tokenizer.state


def refuse_other_layers(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Says in one line what PyTorch would say in one of each layer."""
    if problem := other_layers(module.state_dict(), state_dict):
        raise UserError(
            f"{type(module).__name__} has other layers than these weights: {problem}; use the class that "
            "saved them, from Python or with --model CLASS --allow_import PACKAGE"
        )


def warn_of_inexact_resume(trainer: Trainer) -> None:
    resumes = trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is not None
    if resumes and not any(isinstance(callback, ResumeCallback) for callback in trainer.callbacks):
        rank_zero_warn(
            "this run goes on without the random states, and not at the very place, of the one that was "
            "interrupted; for exactly that run, add gpt_lightning.ExactResume() to the Trainer's callbacks"
        )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)
