"""Finds the shipped recipes by their names, and the one that holds what a command line leaves unsaid."""

import difflib
import os
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint.runs import run_folder
from gpt_lightning.data.python_docs import SOURCE_NAME
from gpt_lightning.data.sources import SUFFIXES
from gpt_lightning.exit_codes import UserError

QUICKSTART, FINE_TUNING = "quickstart", "finetune_gpt2"
# A file with all of them was written by the program (config.yaml, --print_config) and leaves nothing unsaid
# but the options of later versions, which are to stay as if they were not there.
_GROUPS_OF_WHOLE = "seed_everything trainer model data generation checkpoint non_finite samples".split()


def recipe(name: str) -> Path:
    """Returns the file of a shipped recipe."""
    return _folder() / f"{name}.yaml"


def config_file(given: str) -> Path:
    """Returns a file that is named, or the shipped recipe of this name, as `shakespeare`."""
    path = Path(given)
    if path.is_file():
        return path
    names = sorted(file.stem for file in _folder().glob("*.yaml"))
    name = path.stem if path.suffix == ".yaml" else path.name
    if path.parent in (Path(), Path("configs")) and name in names:
        return recipe(name)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(
        f"--config {given} is neither a file, seen from {Path.cwd()}, nor a recipe{hint}; the recipes are "
        + ", ".join(names)
    )


def with_recipe_names(words: list[str]) -> list[str]:
    """Returns the words of a command line with the names of recipes in the place of their files."""
    names = {str(file): file.stem for file in _folder().glob("*.yaml")}
    parts = (word.rpartition("=") for word in words)
    return [f"{option}{equals}{names.get(value, value)}" for option, equals, value in parts]


def recipe_beneath(contents: list[Any], *, is_fine_tuning: bool | None) -> Path | None:
    """Returns the recipe of all that these files and the command line do not say; None where all is said.

    Where the command line does not say whether it `is_fine_tuning`, the files do.
    """
    mappings = [content for content in contents if isinstance(content, dict)]
    if any({*_GROUPS_OF_WHOLE} <= mapping.keys() for mapping in mappings):
        return None
    if is_fine_tuning is None:
        begins_from = [mapping["init_from"] for mapping in mappings if "init_from" in mapping]
        is_fine_tuning = bool(begins_from) and begins_from[-1] is not None
    return recipe(FINE_TUNING if is_fine_tuning else QUICKSTART)


def give_way(settings: Any, given: Any) -> None:
    """Fits the recipe's text, end and times of validation to what of them is given."""
    if given.get("data.mixture") is not None and given.get("data.train_files") is None:
        settings.data.train_files = None
    trainer = settings.trainer
    has_end = trainer.max_epochs is not None or trainer.max_time is not None
    if given.get("trainer.max_steps") is None and has_end:
        trainer.max_steps = -1
    if given.get("trainer.val_check_interval") is not None:
        return
    if trainer.max_epochs is not None or given.get("trainer.check_val_every_n_epoch") is not None:
        trainer.val_check_interval = None  # by epochs
    elif type(trainer.val_check_interval) is int and trainer.max_steps > 0:
        trainer.val_check_interval = min(trainer.val_check_interval, trainer.max_steps)


def name_of_run(settings: Any) -> str:
    """Names a run after its last configuration, or else after its text."""
    if settings.run_name is not None:
        return str(settings.run_name)
    if settings.config:
        return Path(str(settings.config[-1])).stem
    if settings.data.mixture is not None:
        return "mixture"
    files = settings.data.train_files
    first = files if isinstance(files, str) else next(iter(files or ()), "")
    return QUICKSTART if first in ("", SOURCE_NAME) else _name_of_text(first)


def _name_of_text(pattern: str) -> str:
    """Returns a file's name without its endings, or that of the folder in which a pattern looks."""
    path = Path(os.path.abspath(os.path.expanduser(pattern)))
    if not path.exists():
        path = next((parent for parent in reversed(path.parents) if has_magic(str(parent))), path)
        path = path.parent if has_magic(path.name) else path
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    with suppress(UserError):
        return run_folder(Path(), name).name
    return "run"


def _folder() -> Path:
    """Returns configs/, inside the package where that is installed, beside it in a clone."""
    package = Path(__file__).parent.parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
