"""Lets a verb build a child class of GPTLightningModule: `--model CLASS`, or `class_path` in a file."""

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gpt_lightning.cli.parser import ALLOW_IMPORT
from gpt_lightning.exit_codes import UserError

if TYPE_CHECKING:
    from gpt_lightning.training.module import GPTLightningModule

DEFAULT_CLASS = "gpt_lightning.GPTLightningModule"


def names_a_class(words: list[str]) -> bool:
    """Tells whether the command line, or a configuration file of it, says which class the model is."""
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name in ("--model", "--model.class_path") and not Path(value).is_file():
            return True
        if name in ("--config", "-c", "--model"):
            found = _read(Path(value))
            section = found if name == "--model" else found.get("model")
            if isinstance(section, dict) and "class_path" in section:
                return True
    return False


def _read(path: Path) -> dict[str, Any]:
    """Returns what a file holds, if it holds anything: the parser will say what is wrong with it."""
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def model_key(settings: Any) -> str:
    """Returns the key under which the arguments of the model stand."""
    return "model.init_args" if "class_path" in settings.model else "model"


def model_options(settings: Any, name: str) -> dict[str, Any]:
    """Returns a group of the model's options; a child class may have left it out."""
    group = settings[model_key(settings)].get(name)
    return {} if group is None else group.as_dict()


def import_class(path: str, allowed: Iterable[str]) -> "type[GPTLightningModule]":
    """Imports a child class from a package that the command line allows."""
    from gpt_lightning.training.module import GPTLightningModule

    module, _, name = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        remedy = f"name one, as package.Class; a checkpoint is --ckpt_path {path}"
        raise UserError(f"model={path} is no class; {remedy}")
    if not any(f"{path}.".startswith(f"{package}.") for package in ("gpt_lightning", *allowed)):
        package = path.split(".")[0]
        raise UserError(f"model={path} is not imported; if you trust it, add {ALLOW_IMPORT} {package}")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "name a class, as package.Class"
        raise UserError(f"model={path} cannot be imported ({error}); {remedy}") from error
    if not (isinstance(kind, type) and issubclass(kind, GPTLightningModule)):
        raise UserError(f"model={path} is no child class of {DEFAULT_CLASS}; name one that is")
    return kind
