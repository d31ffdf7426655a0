"""What a verb's model comes from: a checkpoint to go on from or to judge, or weights to begin a run with."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint.checkpoint import (
    DATA_KEY,
    check_not_sharded,
    checkpoint_config,
    newest_checkpoint,
    read_checkpoint,
)
from gpt_lightning.checkpoint.contents import OPTIMIZERS_KEY
from gpt_lightning.checkpoint.runs import find_checkpoint, newest_of_run
from gpt_lightning.cli.checks import say
from gpt_lightning.cli.ranks import is_tensor_parallel
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.importing import import_gpt2

NOT_ARCHITECTURE = {"vocab_size", "dropout"}  # the tokenizer decides the one, the command line the other


@dataclass(frozen=True)
class Origin:
    """`contents` decide the architecture and the tokenizer.

    `path` is the checkpoint that the Trainer restores, of which `contents` are; without one they are those of
    `init_from`, with whose weights a run begins at step 0. A run that `begins_again` was asked to go on from
    its last checkpoint, and its folder has none.
    """

    path: Path | None = None
    init_from: str | None = None
    contents: dict[str, Any] | None = None
    begins_again: bool = False

    @property
    def restored(self) -> dict[str, Any]:
        """What the Trainer restores; empty where a run begins."""
        return self.contents or {} if self.path is not None else {}

    @property
    def initial(self) -> dict[str, Any] | None:
        """Whose weights a run begins with."""
        return self.contents if self.path is None else None


def find_origin(verb: str, settings: Any, root: Path) -> Origin:
    """Look for it where the options say; `settings` then name what was found."""
    path, begins_again = None, False
    if verb == "fit":
        path, begins_again = _resume_path(settings, root / settings.run_name)
    elif verb != "prepare":
        path = find_checkpoint(settings.ckpt_path, root, say)
    if path is not None:
        contents = _read(path, settings)
        if verb != "fit" or not _is_untrained(path, contents):
            say(f"{'resuming' if verb == 'fit' else 'checkpoint'}: {path}")
            settings.ckpt_path = str(path)
            return Origin(path, contents=contents, begins_again=begins_again)
        settings.ckpt_path, settings.init_from = None, str(path)
    init_from = settings.init_from if verb in ("fit", "prepare") else None
    if init_from is not None:
        contents = _contents_of(init_from, settings)
        say(f"starting from the weights of {init_from}")
        return Origin(init_from=init_from, contents=contents, begins_again=begins_again)
    if begins_again:
        own = settings.checkpoint.dirpath
        say(f"no checkpoint in {own or root / settings.run_name} yet: starting from scratch")
    return Origin(begins_again=begins_again)


def _resume_path(settings: Any, folder: Path) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, and whether the run is begun again."""
    if settings.ckpt_path is None:
        return None, False
    if settings.ckpt_path != "last":
        return Path(settings.ckpt_path), False
    own = settings.checkpoint.dirpath
    newest = newest_of_run(folder, say) if own is None else newest_checkpoint(Path(own), say)
    if newest is None:
        settings.ckpt_path = None
    elif own is None:
        settings.run_name = newest.parent.name
    return newest, newest is None or own is not None


def _read(path: Path, settings: Any) -> dict[str, Any]:
    if not is_tensor_parallel(settings):
        check_not_sharded(path)
    return read_checkpoint(path)


def _is_untrained(path: Path, contents: dict[str, Any]) -> bool:
    """Whether it is an imported one, with which a run can only begin."""
    if OPTIMIZERS_KEY in contents:
        return False
    if contents.get("global_step", 0) > 0:
        raise UserError(
            f"ckpt_path={path} holds weights alone (checkpoint.save_weights_only), from which no run can go "
            f"on; begin a new one with them: --init_from {path}"
        )
    return True


def _contents_of(init_from: str, settings: Any) -> dict[str, Any]:
    """Those of a checkpoint, or of what would be imported."""
    path = Path(os.path.expanduser(init_from))
    if path.is_file() or path.suffix == ".ckpt":
        try:
            return _read(path, settings)
        except UserError as error:
            raise UserError(str(error).replace("ckpt_path=", "init_from=", 1)) from None
    return import_gpt2(init_from, "init_from")


def take_settings(verb: str, settings: Any, explicit: Any, origin: Origin) -> None:
    """Take over what must be as the origin has it, and refuse `explicit` options that say otherwise."""
    assert origin.contents is not None
    architecture = asdict(checkpoint_config(origin.contents))
    saved = {f"model.config.{name}": architecture[name] for name in architecture.keys() - NOT_ARCHITECTURE}
    data = origin.contents.get(DATA_KEY, {}).get("settings", {})
    names = data.keys() & {"tokenizer"} if verb == "predict" or origin.path is None else data
    saved.update({f"data.{name}": data[name] for name in names})
    for key, value in saved.items():
        given = explicit.get(key)
        if given is not None and given != value:
            raise UserError(
                f"{key}={given} contradicts {origin.path or origin.init_from}, which has {value}; "
                "leave the option out, or train anew"
            )
        settings[key] = value
