"""Looks for what a run could not go on from in what Lightning and the callbacks keep in a checkpoint."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from gpt_lightning.checkpoint.callback_states import (
    problems_of_averaging,
    problems_of_callbacks,
    problems_of_scaler,
)
from gpt_lightning.checkpoint.values import is_count, is_named, is_number, numbers, short

LIGHTNING_KEY = "pytorch-lightning_version"
_LIGHTNING_VERSION = re.compile(r"[2-9]\.\d{1,3}(\.\d{1,3})?((a|b|rc|\.post|\.?dev)\d{1,9})*(\+[a-z0-9]+)?")
_ALL = ("ready", "started", "processed", "completed")
_STEP = ("ready", "completed")
_EPOCH_LOOP = "fit_loop/epoch_loop."
_OPTIMIZER = f"{_EPOCH_LOOP}automatic_optimization.optim_progress/optimizer"
# What Lightning and ExactResume read of the loops: counts, each in all and of this epoch.
_FIT_COUNTS = {
    **{"fit_loop/epoch_progress": _ALL, f"{_EPOCH_LOOP}batch_progress": _ALL},
    **{f"{_EPOCH_LOOP}val_loop.batch_progress": _ALL, f"{_EPOCH_LOOP}scheduler_progress": _STEP},
    **{f"{_OPTIMIZER}/step": _STEP, f"{_OPTIMIZER}/zero_grad": ("ready", "started", "completed")},
    f"{_EPOCH_LOOP}manual_optimization.optim_step_progress": _STEP,
}
_OTHER_COUNTS = {f"{loop}_loop/batch_progress": _ALL for loop in ("validate", "test", "predict")}
_STATES = [f"{loop}_loop/state_dict" for loop in ("fit", "validate", "test", "predict")]
_EPOCH_STATES = [
    f"{_EPOCH_LOOP}{part}state_dict"
    for part in ("", "automatic_optimization.", "manual_optimization.", "val_loop.")
]
_SCHEDULE: dict[str, Callable[[Any, int], bool]] = {
    "base_lrs": lambda value, groups: numbers(value, groups) and all(rate >= 0 for rate in value),
    "_last_lr": lambda value, groups: numbers(value, groups),
    **dict.fromkeys(("last_epoch", "_step_count"), lambda value, groups: is_count(value)),
    **dict.fromkeys(("_is_initial", "_get_lr_called_within_step"), lambda value, groups: type(value) is bool),
    "lr_lambdas": lambda value, groups: value == [None] * groups,
}
_RESUME_FLAGS = ("validation_is_due", "validation_is_done", "epoch_is_finished")
STATES, ROWS = "random_states", "random_state_rows"  # of all ranks, see callbacks/random_states.py
_POSITION = ("consumed_samples", "batches", "epoch_batches")


def problems_of_training(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is missing or of another kind in a checkpoint that a run is to go on from."""
    version = checkpoint.get(LIGHTNING_KEY, "2.0")
    if type(version) is not str or not _LIGHTNING_VERSION.fullmatch(version):
        yield f"holds {LIGHTNING_KEY}={short(version)}, of which nothing is known; name another"
    for key in ("global_step", "epoch"):
        if key in checkpoint and not is_count(checkpoint[key]):
            yield f"holds {key}={short(checkpoint[key])}, no count; name another"
    yield from _problems_of_loops(checkpoint)
    yield from problems_of_callbacks(checkpoint.get("callbacks", {}))
    yield from problems_of_averaging(checkpoint)
    yield from problems_of_scaler(checkpoint)


def _at(value: Any, place: str) -> Any:
    """Returns what lies at `a/b/c` in nested dictionaries, None if there is nothing."""
    for key in place.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- Lightning's


def _problems_of_loops(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    if "loops" not in checkpoint:
        return
    loops = checkpoint["loops"]
    for place, names in {**_FIT_COUNTS, **_OTHER_COUNTS}.items():
        for part in ("total", "current"):
            counts = _at(loops, f"{place}/{part}")
            if not isinstance(counts, dict) or not all(is_count(counts.get(name)) for name in names):
                yield f"holds {short(counts)} as loops/{place}/{part}, no counts; name another"
    for place in (*_STATES, *_EPOCH_STATES):
        if not isinstance(_at(loops, place), dict):
            yield f"holds {short(_at(loops, place))} as loops/{place}; name another"
    if not is_count(stepped := _at(loops, f"{_EPOCH_LOOP}state_dict/_batches_that_stepped")):
        yield f"holds {short(stepped)} as the loops' _batches_that_stepped, no count; name another"
    steps = [
        _at(loops, f"{place}/total/completed")
        for place in (f"{_OPTIMIZER}/step", f"{_EPOCH_LOOP}manual_optimization.optim_step_progress")
    ]
    if "global_step" in checkpoint and checkpoint["global_step"] not in steps:
        yield f"holds global_step={checkpoint['global_step']}, and its loops count {steps[0]}; name another"


def problem_of_schedulers(states: Any, groups: int) -> str | None:
    """Says what is wrong with the states of learning-rate schedules over so many groups of parameters."""
    if not isinstance(states, list) or not all(is_named(state) for state in states):
        return f"holds lr_schedulers={short(states)}, no schedules; name another"
    for state in states:
        for name in _SCHEDULE.keys() & {*state, "base_lrs", "last_epoch"}:
            if not _SCHEDULE[name](state.get(name), groups):
                return f"holds {name}={short(state.get(name))} in lr_schedulers; name another"
        for name in state:
            # PyTorch makes them attributes, which would hide those of the class.
            if name == "optimizer" or name not in _SCHEDULE and hasattr(LambdaLR, name):
                return f"holds {short(name)}, no part of a schedule, in lr_schedulers; name another"
    return None


# ---- ours


def problems_of_resume(saved: Any) -> Iterator[str]:
    """Yields what ExactResume could not go on from."""
    match saved:
        case {"random_states": [first, *others], "samples_per_step": samples} if is_count(samples):
            pass
        case _:
            yield f"holds resume={short(saved)}, from which no run goes on; name another"
            return
    for name in _RESUME_FLAGS:
        if type(saved.get(name)) is not bool:
            yield f"holds resume.{name}={short(saved.get(name))}; name another"
    monitored = saved.get("monitored", {})
    if not is_named(monitored) or not all(type(value) is float for value in monitored.values()):
        yield f"holds resume.monitored={short(monitored)}, no metrics; name another"
    if (problem := problem_of_generators(first)) is not None:
        yield f"holds no random states of rank 0 ({problem}); name another"
    rows = saved.get(ROWS)
    are_rows = rows is None or isinstance(rows, Tensor) and rows.dim() == 2 and rows.dtype == torch.uint8
    # Of the other ranks each tries its own, when it takes it: to try all would take as long as there are.
    if not are_rows or not all(isinstance(state, dict) for state in others):
        yield f"holds {short(others or rows)} as random states of the other ranks; name another"


def problem_of_generators(state: Any) -> str | None:
    """Tries the states on generators of its own."""
    try:
        torch.Generator().set_state(state["torch"])
        version, internal, gauss = state["python"]
        random.Random().setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        # NumPy itself would read beyond the end of its numbers.
        if name != "MT19937" or not (is_count(position) and position <= 624 and is_number(cached)):
            return f"numpy: {short(name)} at {short(position)}"
        np.random.RandomState().set_state((name, keys, position, has_gauss, cached))
        if not (gauss is None or is_number(gauss)):
            return f"python: {short(gauss)}"
        device = state["device"]
    except Exception as error:  # a generator raises whatever it likes
        return " ".join(str(error).split())[:100] or type(error).__name__
    if device is not None and not (isinstance(device, Tensor) and device.dtype == torch.uint8):
        return f"device: {short(device)}"
    return None


def problems_of_position(state: Mapping[str, Any]) -> Iterator[str]:
    """Yields what TextDataModule could not go on from."""
    for name in _POSITION:
        if not is_count(state.get(name)):
            yield f"holds {name}={short(state.get(name))} as where its data stands, no count; name another"
