"""Refuses what no checkpoint may hold: all but plain data, and weights of another architecture than its."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from gpt_lightning.checkpoint.files import (
    FOLDER_KEY,
    OPTIMIZERS,
    TRAINED_KEY,
    WEIGHTS,
    is_sharded,
    no_file,
    unreadable,
    verify,
)
from gpt_lightning.checkpoint.optimizer_state import problems_of_optimizers, problems_of_sizes
from gpt_lightning.checkpoint.pickles import check_pickles
from gpt_lightning.checkpoint.training_state import (
    LIGHTNING_KEY,
    problems_of_position,
    problems_of_resume,
    problems_of_training,
)
from gpt_lightning.checkpoint.values import (
    FLOATS,
    check_plain,
    is_count,
    is_named,
    is_number,
    not_readable,
    problem_of_values,
    short,
)
from gpt_lightning.checkpoint.weights import CONFIG_KEY, differences, groups_of_ours, problems_of_weights
from gpt_lightning.data.chat_template import check_chat
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig

VERSION_KEY, VERSION = "checkpoint_version", 1  # of what is in a checkpoint; formerly none was said
DATA_KEY = "TextDataModule"
MODULE_KEY = "module_class"  # that was saved, unless it is GPTLightningModule; it is shown, never imported
TOKENIZER_KEY = "tokenizer"  # where no TextDataModule saves it under its own name
ORIGIN_KEY = "begun_from"  # the model whose weights a run began with, or that was imported
VALIDATION_KEY = "last_validation"  # its step, its loss, and whether it was of the whole text
# Where Lightning looks for the arguments to build a module or a datamodule with, today and formerly.
_HYPER_PARAMETERS = (
    *("hyper_parameters", "hparams_name", "hparams_type", "hparams", "module_arguments"),
    *("datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type"),
)
# What a checkpoint decides of a datamodule's settings, and of which kind each is.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "tokenizer": lambda value: type(value) is str,
    "seed": is_count,
    "val_fraction": lambda value: is_number(value) and type(value) is not Tensor and 0 <= value < 1,
    "seq_len": lambda value: is_count(value) and value > 0,
}
# Names by which Lightning and jsonargparse are told what to import and call.
_CALLING_KEYS = {"class_path", "_class_path", "_instantiator", "init_args", "dict_kwargs"}


def load_plain(path: Path) -> Any:
    """Returns what the file holds, tensors mapped from it, not read; of a sharded one all but its tensors."""
    if is_sharded(path):
        from gpt_lightning.checkpoint.folder import read_rest  # slow to import

        return read_rest(path)
    if not path.is_file():  # a pipe would be waited for
        raise no_file(path)
    try:
        check_pickles(path)
        # `weights_only` is said outright: left out, an environment variable could turn it off.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a pickle leads to may be anything
        raise unreadable(path, error) from error


def read_checked(path: Path, *, sharded: bool = False) -> dict[str, Any]:
    """Reads one that is as it was written and in which nothing acts, also of another module."""
    if sharded:
        from gpt_lightning.checkpoint.folder import check_whole  # slow to import

        checkpoint = check_whole(path)
        check_contents(path, checkpoint)
        if (problem := next(_problems_of_folder(path, checkpoint), None)) is not None:
            raise UserError(f"ckpt_path={path} {problem}")
        return checkpoint
    verify(path)
    checkpoint = load_plain(path)
    if isinstance(checkpoint, dict) and FOLDER_KEY in checkpoint:
        raise UserError(f"ckpt_path={path} is a file and says that it is a folder; name another")
    check_contents(path, checkpoint)
    return checkpoint


def check_contents(path: Path, checkpoint: Any) -> None:
    """Raises, in one line, what no checkpoint holds, and where one of this package does not fit itself."""
    if (problem := next(_problems(checkpoint), None)) is not None:
        raise UserError(f"ckpt_path={path} {problem}")


def check_readable(checkpoint: Mapping[str, Any]) -> None:
    """Raises, before it is written, for what a child class or a callback adds and no reader would take."""
    check_plain(checkpoint)
    for key in _HYPER_PARAMETERS:
        if (found := next(acting(checkpoint.get(key), key), None)) is not None:
            raise not_readable(f"holds {found}")


def check_same_architecture(config: GPTConfig, checkpoint: Mapping[str, Any]) -> None:
    """Raises where a model differs from the one whose weights it is to take; only its dropout may differ."""
    if CONFIG_KEY not in checkpoint:
        return
    both = (config, GPTConfig(**checkpoint[CONFIG_KEY]))
    own, stored = (
        {**asdict(each), "d_ff": each.mlp_width, "d_head": each.head_dim, "n_kv_heads": each.kv_heads}
        for each in both
    )
    follow = {name for name in ("d_head", "n_kv_heads") if all(getattr(each, name) is None for each in both)}
    differing = [name for name in own if name not in {"dropout", *follow} and own[name] != stored[name]]
    if differing:
        listing = ", ".join(f"{name}={own[name]} (there {stored[name]})" for name in differing)
        raise UserError(
            f"model.config differs from the checkpoint's: {listing}; build the model as the checkpoint has it"
        )


def with_config_of_child_class(checkpoint: dict[str, Any]) -> bool:
    """Fills in what a child class's own `on_save_checkpoint` has left out, from the hyper-parameters."""
    match checkpoint.get("hyper_parameters"):
        case {"config": dict(config), "optimizer": dict(), "schedule": dict()}:
            checkpoint[CONFIG_KEY] = config
            checkpoint.setdefault(MODULE_KEY, "the class that saved it")
            return True
    return False


def layers_of_child_class(contents: Mapping[str, Any]) -> str | None:
    """Says which weights of a child class's GPT are not those of a GPTModel; None where all of them are."""
    if MODULE_KEY not in contents:
        return None
    problem = next(problems_of_weights(GPTConfig(**contents[CONFIG_KEY]), contents[WEIGHTS]), None)
    return problem.removesuffix("; name another") if problem else None


def other_layers(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Lists in what two state dicts differ by name, shape or kind of numbers; nothing where they do not."""
    return differences(*({name: _form(value) for name, value in each.items()} for each in (own, given)))


def _form(value: Any) -> Any:
    """Returns the shape of a tensor, and the type of its numbers where PyTorch would change their kind."""
    shape = list(getattr(value, "shape", []))
    return shape if getattr(value, "dtype", None) in (None, *FLOATS) else f"{shape} of {value.dtype}"


# ---- problems, in the order in which they are looked for: the first one found is told


def _problems(checkpoint: Any) -> Iterator[str]:
    if not isinstance(checkpoint, Mapping):
        yield f"was not written by gpt_lightning (it is a {type(checkpoint).__name__}); name another"
    version = checkpoint.get(VERSION_KEY, VERSION)
    if type(version) is int and version > VERSION:
        yield f"is of version {version}, and this program reads up to {VERSION}; update gpt_lightning"
    if not is_count(version):
        yield f"holds {VERSION_KEY}={short(version)}; name another"
    if problem := problem_of_values(checkpoint):
        yield problem
    for key in _HYPER_PARAMETERS:
        for found in acting(checkpoint.get(key), key):
            yield f"holds {found}; hyper-parameters are plain and import nothing: do not trust the file"
    if DATA_KEY in checkpoint:
        yield from _problems_of_data(checkpoint[DATA_KEY])
    if CONFIG_KEY in checkpoint and TOKENIZER_KEY in checkpoint:
        yield from _problems_of_tokenizer(checkpoint[TOKENIZER_KEY], TOKENIZER_KEY)
    if CONFIG_KEY in checkpoint:
        # Without the optimizer's state nobody goes on from it, and asks how far it came.
        for key in ("global_step", "loops", "lr_schedulers", LIGHTNING_KEY):
            if OPTIMIZERS in checkpoint and key not in checkpoint:
                yield f"lacks {key!r}, without which no run goes on; name another"
        yield from _problems_of_config(checkpoint[CONFIG_KEY])
        yield from problems_of_training(checkpoint)
        is_ours = MODULE_KEY not in checkpoint
        if not is_ours and type(checkpoint[MODULE_KEY]) is not str:
            yield f"holds {MODULE_KEY}={short(checkpoint[MODULE_KEY])}; name another"
        if FOLDER_KEY not in checkpoint:  # the weights of a sharded checkpoint are in files of their own
            for key in (WEIGHTS, *({TRAINED_KEY} & checkpoint.keys())):
                if not is_named(weights := checkpoint.get(key)) or not weights:
                    yield f"holds {key}={short(weights)}, no weights; name another"
                if is_ours:  # a child class's layers are its own business, when they are loaded
                    yield from problems_of_weights(GPTConfig(**checkpoint[CONFIG_KEY]), weights)
            groups = groups_of_ours(checkpoint[CONFIG_KEY], checkpoint[WEIGHTS]) if is_ours else []
            yield from problems_of_optimizers(checkpoint, groups)
        yield from _problems_of_notes(checkpoint)
        if "resume" in checkpoint:
            yield from problems_of_resume(checkpoint["resume"])


def acting(value: Any, place: str) -> Iterator[str]:
    """Yields where a value, or a part of it, is no plain data, or could be taken for something to import."""
    if isinstance(value, dict):
        for key, part in value.items():
            if type(key) is not str or key in _CALLING_KEYS:
                yield f"{place}[{short(key)}]"
            yield from acting(part, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from acting(part, f"{place}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        yield f"a {type(value).__name__} as {place}"


def _problems_of_data(state: Any) -> Iterator[str]:
    """Yields a problem unless a TextDataModule's state has a tokenizer and plain settings."""
    match state:
        case {"tokenizer": tokenizer, "settings": dict(settings)}:
            yield from _problems_of_tokenizer(tokenizer, DATA_KEY)
        case _:
            yield f"holds no tokenizer and settings under {DATA_KEY}; name another"
            return
    for name, value in settings.items():
        if name not in SETTINGS or not SETTINGS[name](value):
            yield f"holds data.{name}={short(value)}, which no checkpoint decides so; name another"
    yield from problems_of_position(state)
    if not _is_text(text := state.get("text", {})):
        yield f"holds {short(text)} as the text that it was trained on; name another"
    if "mixture" in state and not _is_mixture(state["mixture"]):
        yield f"holds {short(state['mixture'])} as its mixture of texts; name another"


def _is_text(text: Any) -> bool:
    """Tells what describes a text: its files, and what cuts them; nothing does, too."""
    if not isinstance(text, dict):
        return False
    cutting = {type(text.get(name)) for name in ("text_key", "document_separator")}
    are_files = all(_are_files(text.get(name)) for name in ("train_files", "val_files"))
    return not text or are_files and cutting <= {str, type(None)}


def _is_mixture(state: Any) -> bool:
    """Tells weights of named texts, as many each as there are steps from which they hold."""
    match state:
        case {"steps": list(steps), "starts": list(starts), "weights": dict(weights), "texts": dict(texts)}:
            n = len(steps)
            shares = [*weights.values()]
            return (
                all(map(is_count, [*steps, *starts]))
                and steps[:1] == [0]
                and len(starts) in (0, n)
                and starts[:1] in ([], [0])
                and all(isinstance(each, list) and len(each) == n for each in shares)
                and all(type(share) in (int, float) for each in shares for share in each)
                and weights.keys() == texts.keys()
                and all(map(_is_text, texts.values()))
            )
    return False


def _problems_of_tokenizer(state: Any, key: str) -> Iterator[str]:
    match state:
        case {"tokenizer_json": str(), "eos_token": str()} if (
            _are_ids(state.get("eos_token_ids", [])) and ("chat" not in state or check_chat(state["chat"]))
        ):
            pass
        case _:
            yield f"holds no tokenizer and settings under {key}; name another"


def _are_files(value: Any) -> bool:
    """Tells a list of names, each with the hash of what is in the file."""
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs)


def _problems_of_notes(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yields where what else is said of a model is of another kind, or of another model."""
    match checkpoint.get("hyper_parameters"):  # of which `load_from_checkpoint` builds the module
        case {"config": dict(config)} if MODULE_KEY not in checkpoint and config != checkpoint[CONFIG_KEY]:
            yield f"holds hyper_parameters of another model than its {CONFIG_KEY}; name another"
        case None | dict():
            pass
        case other:
            yield f"holds hyper_parameters={short(other)}, no options; name another"
    if type(kind := checkpoint.get("hparams_type")) not in (str, type(None)):
        yield f"holds hparams_type={short(kind)}; name another"
    if type(checkpoint.get(ORIGIN_KEY)) not in (str, type(None)):
        yield f"holds {ORIGIN_KEY}={short(checkpoint[ORIGIN_KEY])}; name another"
    match checkpoint.get(VALIDATION_KEY):
        case None:
            pass
        case {"step": step, "loss": int() | float(), "whole": bool()} as last if (
            is_count(step) and _are_losses(last.get("sources", {}))
        ):
            pass
        case other:
            yield f"holds {VALIDATION_KEY}={short(other)}; name another"


def _are_losses(value: Any) -> bool:
    """Tells the losses of a mixture's texts, by their names."""
    return isinstance(value, dict) and all(type(loss) is float for loss in value.values())


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)


def _problems_of_config(stored: Any) -> Iterator[str]:
    kinds = {field.name: field.type for field in fields(GPTConfig)}
    if not isinstance(stored, Mapping):
        yield f"holds {CONFIG_KEY}={short(stored)}, no options; name another"
    for name, value in stored.items():
        if name not in kinds:
            yield f"holds {CONFIG_KEY}.{name}, which is no option; name another"
        kind = kinds[name]
        types = [get_origin(part) or part for part in get_args(kind) or (kind,)]
        # A whole number does for a float.
        if type(value) not in types and not (kind is float and type(value) is int):
            yield f"holds {CONFIG_KEY}.{name}={short(value)}; name another"
    try:
        GPTConfig(**stored)
    except UserError as error:
        yield f"holds no possible model: {error}"


def _problems_of_folder(path: Path, checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yields where the tensors in a sharded checkpoint's folder are not those of its model and optimizer."""
    from gpt_lightning.checkpoint.folder import TIED_KEY, tensors_in

    weights = {
        key.partition("/")[2]: torch.empty(meta.size, dtype=meta.properties.dtype, device="meta")
        for key, meta in tensors_in(path, f"{WEIGHTS}/")
    }
    match checkpoint.get(TIED_KEY):
        case dict(tied) if is_named(tied) and all(
            tied[name] in weights and name not in weights for name in tied
        ):
            weights |= {name: weights[original] for name, original in tied.items()}
        case other:
            yield f"holds {TIED_KEY}={short(other)}; name another"
    groups = []
    if CONFIG_KEY in checkpoint and MODULE_KEY not in checkpoint:
        yield from problems_of_weights(GPTConfig(**checkpoint[CONFIG_KEY]), weights)
        groups = groups_of_ours(checkpoint[CONFIG_KEY], weights)
    sizes = {key: list(meta.size) for key, meta in tensors_in(path, f"{OPTIMIZERS}/")}
    yield from problems_of_sizes(checkpoint, sizes, groups)
