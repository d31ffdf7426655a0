"""Picks of all options those by which runs are compared: the hyper-parameters that loggers show."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt_lightning.callbacks.overview import Value
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

# Of every run; a name of the table where the option's last word would not say enough.
COLUMNS = {
    "model.config.n_layers": "n_layers",
    "model.config.d_model": "d_model",
    "model.config.n_heads": "n_heads",
    "data.seq_len": "seq_len",
    "data.batch_size": "batch_size",
    "model.optimizer.name": "optimizer",
    "model.optimizer.learning_rate": "learning_rate",
    "model.optimizer.weight_decay": "weight_decay",
    "model.schedule.shape": "schedule",
    "model.schedule.warmup_steps": "warmup_steps",
    "data.tokenizer": "tokenizer",
    "data.train_files": "train_files",
    "trainer.precision": "precision",
    "trainer.max_steps": "max_steps",
    "seed_everything": "seed",
    "init_from": "init_from",
}
# Of runs that give them another value than they have when left out; all of `model` is here too.
_OTHERS = (
    *("data.val_fraction", "data.document_mask", "trainer.accumulate_grad_batches", "trainer.devices"),
    *("trainer.num_nodes", "trainer.gradient_clip_val", "trainer.max_epochs", "trainer.strategy"),
)
_FOLLOWS = {"model.config.vocab_size", "model.config.max_position_embeddings", "model.class_path"}
PRECISION = "32-true"  # Lightning's, where none is given
_LONGEST = 60  # characters of a value


def compared_options(settings: Any, defaults: Any, n_parameters: int) -> dict[str, Value]:
    """Returns the row of a run, by the last words of its options; what is constant almost always is left out.

    `settings` are those of a run, `defaults` those of a parser.
    """
    given = {"trainer.precision": PRECISION, **_said(_flat(settings))}
    usual = {**_of_dataclasses(), **_flat(defaults)}
    row = {name: _plain(given[option]) for option, name in COLUMNS.items() if option in given}
    for option in [*(name for name in given if name.startswith("model.")), *_OTHERS]:
        value, name = given.get(option), option.rpartition(".")[2]
        if value is None or option in COLUMNS or option in _FOLLOWS:
            continue
        if _plain(value) != _plain(usual.get(option)):
            row[name if name not in row else option] = _plain(value)
    return {**row, "parameters": n_parameters}


def _flat(settings: Any) -> dict[str, Any]:
    """Names every option in full; the arguments of a child class stand where those of ours would."""
    flat = {name.replace("model.init_args.", "model.", 1): value for name, value in settings.items()}
    if (strategy := flat.get("trainer.strategy.class_path")) is not None:
        flat["trainer.strategy"] = strategy.rpartition(".")[2]
    return flat


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what says nothing: null, and the -1 by which the Trainer knows no limit."""
    return {name: value for name, value in options.items() if value not in (None, -1)}


def _of_dataclasses() -> dict[str, Any]:
    groups: dict[str, Any] = {
        "config": GPTConfig(),
        "optimizer": OptimizerConfig(),
        "schedule": ScheduleConfig(),
    }
    return {
        f"model.{group}.{name}": value
        for group, defaults in groups.items()
        for name, value in asdict(defaults).items()
    }


def _plain(value: Any) -> Value:
    """Makes a number or a short text of a value: of files their names, of a class its own name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        return _cut(", ".join(str(_plain(each)) for each in value))
    path = Path(str(value))  # of a pattern such as *.txt the folder says more
    name = "/".join(path.parts[-2:]) if "*" in path.name else path.name
    return _cut(name if "/" in str(value) else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
