"""Finds what a verb's model comes from: a checkpoint to go on from or to judge, or weights to begin with."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.contents import MODULE_KEY, SETTINGS
from gpt_lightning.checkpoint.files import OPTIMIZERS, is_sharded
from gpt_lightning.checkpoint.optimizer_state import problem_of_name
from gpt_lightning.checkpoint.runs import find_checkpoint, newest_checkpoint, newest_of_run
from gpt_lightning.cli.errors import say, shorten
from gpt_lightning.cli.model_class import DEFAULT_CLASS, model_key, model_options
from gpt_lightning.cli.parser import ALLOW_IMPORT
from gpt_lightning.cli.ranks import is_tensor_parallel
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.importing import import_model
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig
from gpt_lightning.training.saving import check_arguments

OURS = {"config", "optimizer", "schedule", "activation_checkpointing", "compile_backend"}
# What nanoGPT's option of this name takes besides a model.
ELSEWHERE = {
    "resume": "to go on with a run, give --ckpt_path last",
    "scratch": "a fit begins so without it, so leave it out",
}
NOT_ARCHITECTURE = {"vocab_size", "dropout"}  # the tokenizer decides the one, the command line the other


@dataclass(frozen=True)
class Origin:
    """Holds the checkpoint, if there is one, that decides the architecture and the tokenizer.

    The Trainer restores it, or a run begins at step 0 with its weights; `init_from` is what the latter was
    called. A run that `begins_again` was asked to go on from its last checkpoint, and its folder has none.
    """

    checkpoint: Checkpoint | None = None
    init_from: str | None = None
    begins_again: bool = False


def find_origin(verb: str, settings: Any, root: Path) -> Origin:
    """Looks for it where the options say; `settings` then name what was found."""
    path, begins_again, init_from = None, False, None
    if verb == "fit":
        path, begins_again = _resume_path(settings, root / settings.run_name)
    elif verb != "prepare":
        path = find_checkpoint(settings.ckpt_path, root, say)
    if verb in ("fit", "prepare"):  # a run's configuration is given to other verbs too
        init_from = settings.init_from
    checkpoint = None
    if path is not None:
        checkpoint = Checkpoint.open(path, may_be_sharded=is_tensor_parallel(settings))
        if verb != "fit" or not _is_untrained(checkpoint):
            say(f"resuming: {path}, step {checkpoint.step:,}" if verb == "fit" else f"checkpoint: {path}")
            _tell_of_another_class(settings, checkpoint)
            settings.ckpt_path = str(path)
            return Origin(checkpoint, begins_again=begins_again)
        settings.ckpt_path, settings.init_from = None, str(path)
        init_from = str(path)
    if init_from is not None:
        checkpoint = checkpoint or _open_initial(init_from, settings)
        say(f"starting from the weights of {init_from}")
    elif begins_again:
        own = settings.checkpoint.dirpath
        say(f"no checkpoint in {own or root / settings.run_name} yet: starting from scratch")
    return Origin(checkpoint, init_from, begins_again)


def _tell_of_another_class(settings: Any, checkpoint: Checkpoint) -> None:
    """Says which class saved it: another one may compute something else with the same weights."""
    saved = checkpoint.contents.get(MODULE_KEY)
    if saved is not None and settings.model.get("class_path", DEFAULT_CLASS) != saved:
        say(f"warning: it is of {saved!r}; to compute as that does, add --model and {ALLOW_IMPORT}")


def _resume_path(settings: Any, folder: Path) -> tuple[Path | None, bool]:
    """Returns the checkpoint to go on from, and whether the run is begun again."""
    if settings.ckpt_path != "last":
        path = settings.ckpt_path
        return (None if path is None else find_checkpoint(path, folder.parent, say)), False
    own = settings.checkpoint.dirpath
    newest = newest_of_run(folder, say) if own is None else newest_checkpoint(Path(own), say)
    if newest is None:
        settings.ckpt_path = None
    elif own is None:
        settings.run_name = newest.parent.name
    return newest, newest is None or own is not None


def _is_untrained(checkpoint: Checkpoint) -> bool:
    """Tells an imported one, with which a run can only begin."""
    if OPTIMIZERS in checkpoint.contents:
        return False
    if checkpoint.step > 0:
        raise UserError(
            f"ckpt_path={checkpoint.path} holds weights alone (checkpoint.save_weights_only), from which no "
            f"run can go on; begin a new one with them: --init_from {checkpoint.path}"
        )
    return True


def _open_initial(init_from: str, settings: Any) -> Checkpoint:
    """Opens a checkpoint, or imports a model as one."""
    path = Path(os.path.expanduser(init_from))
    if init_from in ELSEWHERE and not path.exists():
        raise UserError(f"init_from={init_from} names no model; {ELSEWHERE[init_from]}")
    if path.is_dir() and not (path / "config.json").exists():  # no model of Hugging Face's
        path = newest_checkpoint(path, say) or path
    if not path.is_file() and not is_sharded(path) and path.suffix != ".ckpt":
        return Checkpoint(path, import_model(init_from, "init_from"))
    try:
        return Checkpoint.open(path, may_be_sharded=is_tensor_parallel(settings))
    except UserError as error:
        raise UserError(str(error).replace("ckpt_path=", "init_from=", 1)) from None


def take_settings(verb: str, settings: Any, explicit: Any, origin: Origin) -> None:
    """Takes over what must be as the origin has it, and refuses `explicit` options that say otherwise."""
    checkpoint = origin.checkpoint
    assert checkpoint is not None
    data = checkpoint.data["settings"]
    names = {"tokenizer"} if verb == "predict" or origin.init_from is not None else SETTINGS.keys()
    saved = {f"data.{name}": data[name] for name in data.keys() & names}
    own = model_options(settings, "config")
    for name, value in asdict(checkpoint.config).items():
        if name in own and name not in NOT_ARCHITECTURE:
            saved[f"{model_key(settings)}.config.{name}"] = value
    for key, value in saved.items():
        given = explicit.get(key)
        if given is not None and given != value:
            where = origin.init_from or checkpoint.path
            raise UserError(
                f"{key.replace('.init_args', '')}={given} contradicts {where}, which has {value}; leave the "
                "option out, or train anew"
            )
        settings[key] = value
    positions = checkpoint.config.max_position_embeddings
    if origin.init_from is not None and explicit.get("data.seq_len") is None:
        settings.data.seq_len = min(settings.data.seq_len, positions)  # the fine-tuning's is GPT-2's
    if verb == "fit" and origin.init_from is None:
        _take_recipe(settings, explicit, checkpoint)
        _refuse_another_optimizer(settings, checkpoint)


def _take_recipe(settings: Any, explicit: Any, checkpoint: Checkpoint) -> None:
    """Takes over how the run was optimized, where that is not said: a file of before may know no Muon."""
    saved = checkpoint.contents.get("hyper_parameters") or {}
    kinds = {"optimizer": OptimizerConfig, "schedule": ScheduleConfig}
    check_arguments(checkpoint.path, checkpoint.contents, kinds)
    for group, kind in kinds.items():
        own, of_run = model_options(settings, group), saved.get(group)
        if not isinstance(of_run, dict):
            continue
        for name, value in asdict(kind(**of_run)).items():
            key = f"{model_key(settings)}.{group}.{name}"
            if name in own and key not in explicit:
                settings[key] = value


def _refuse_another_optimizer(settings: Any, checkpoint: Checkpoint) -> None:
    """Refuses one whose state would not fit, unless a child class may build what it likes."""
    states = checkpoint.contents[OPTIMIZERS]
    if model_key(settings) == "model" and len(states) == 1:
        own = model_options(settings, "optimizer")["name"]
        if (problem := problem_of_name(states[0]["param_groups"], own)) is not None:
            raise UserError(f"ckpt_path={checkpoint.path} {problem}")


def take_arguments(settings: Any, explicit: Any, checkpoint: Checkpoint, parser: ArgumentParser) -> None:
    """Takes over the arguments that a child class adds, as it was built with them, where none are given."""
    saved = checkpoint.contents.get("hyper_parameters", {})
    arguments, given = settings.model.init_args, explicit.get("model.init_args", {})
    for name in saved.keys() - OURS:
        if name in arguments and name not in given:
            arguments[name] = saved[name]
    try:
        parser.validate(settings)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"ckpt_path={checkpoint.path} does not fit: {shorten(str(error))}") from error
