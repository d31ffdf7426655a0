"""Holds to what they go on from what a checkpoint keeps of Lightning's callbacks and gradient scaler."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim.swa_utils import SWALR

from gpt_lightning.checkpoint.files import AVERAGING_KEY, TRAINED_KEY
from gpt_lightning.checkpoint.values import is_count, is_named, is_number, numbers, short

Fields = Mapping[str, Callable[[Any], bool]]


def _is_score(value: Any) -> bool:
    """Tells a number, or infinity."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return is_number(number) or type(number) is float and math.isinf(number)


_SAVER: Fields = {
    "best_k_models": lambda value: is_named(value) and all(map(_is_score, value.values())),
    "dirpath": lambda value: type(value) in (str, type(None)),
    **dict.fromkeys(("best_model_score", "kth_value"), lambda value: value is None or _is_score(value)),
    **dict.fromkeys(
        ("best_model_path", "kth_best_model_path", "last_model_path"), lambda value: type(value) is str
    ),
}
_STOPPING: Fields = {
    **dict.fromkeys(("wait_count", "stopped_epoch", "patience"), is_count),
    "best_score": lambda value: isinstance(value, Tensor) and _is_score(value),
    "stopping_reason": lambda value: is_count(value) and value < 5,
}
_EPOCH_AVERAGES: Fields = {  # StochasticWeightAveraging's; the weights are held to the model as it loads them
    "n_averaged": is_count,
    "latest_update_epoch": lambda value: type(value) is int and value >= -1,
    "scheduler_state": lambda value: value is None or _is_schedule_of_averages(value),
    "average_model_state": lambda value: value is None or is_named(value),
}
_SCHEDULE_OF_AVERAGES: Fields = {
    "_anneal_strategy": lambda value: value in ("cos", "linear"),
    **dict.fromkeys(("anneal_epochs", "last_epoch", "_step_count"), is_count),
    **dict.fromkeys(("base_lrs", "_last_lr"), numbers),
}
_SCALER: Fields = {
    "scale": lambda value: _is_plain_number(value) and value > 0,
    "growth_factor": lambda value: _is_plain_number(value) and value > 1,
    "backoff_factor": lambda value: _is_plain_number(value) and 0 < value < 1,
    "growth_interval": lambda value: is_count(value) and value > 0,
    "_growth_tracker": is_count,
}
_SCALERS = ("MixedPrecision", "FSDPPrecision", "native_amp_scaling_state")  # the last one formerly
_MAY_LACK = {"stopping_reason"}  # which earlier versions of Lightning did not keep
_KINDS = {  # each by the names of Lightning's classes and ours, and by what tells a child class's state
    ("ModelCheckpoint", "RunCheckpoint"): ({"best_k_models"}, _SAVER),
    ("EarlyStopping",): ({"wait_count", "best_score"}, _STOPPING),
    ("WeightAveraging", "EMAWeightAveraging"): ({"latest_update_step"}, {"latest_update_step": is_count}),
    ("StochasticWeightAveraging",): ({"n_averaged", "average_model_state"}, _EPOCH_AVERAGES),
    ("Timer",): ({"time_elapsed"}, {"time_elapsed": lambda value: is_named(value) and _are_numbers(value)}),
}


def _are_numbers(value: Mapping[str, Any]) -> bool:
    return all(map(is_number, value.values()))


def _is_plain_number(value: Any) -> bool:
    return not isinstance(value, Tensor) and is_number(value)


def _is_schedule_of_averages(state: Any) -> bool:
    """Tells one of which PyTorch makes no attribute that hides a function of the class."""
    if not is_named(state) or "optimizer" in state:
        return False
    if any(callable(getattr(SWALR, name, None)) for name in state):
        return False
    return all(is_right(state.get(name)) for name, is_right in _SCHEDULE_OF_AVERAGES.items())


def problems_of_callbacks(states: Any) -> Iterator[str]:
    """Yields what is of another kind in the states of callbacks, by their keys."""
    if not is_named(states) or not all(isinstance(state, dict) for state in states.values()):
        yield f"holds callbacks={short(states)}, no states of callbacks; name another"
        return
    if not is_count(states.get("FiniteGuard", {}).get("skipped_steps", 0)):
        yield f"holds FiniteGuard={short(states['FiniteGuard'])}; name another"
    for key, state in states.items():
        for names, (telling, fields) in _KINDS.items():
            if key.partition("{")[0] in names or telling <= state.keys():
                yield from _problems_of_state(key, state, fields)


def problems_of_scaler(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is of another kind in what scales the gradients of half precision."""
    for key, state in checkpoint.items():
        if key in _SCALERS or isinstance(state, dict) and "_growth_tracker" in state:
            yield from _problems_of_state(key, state if is_named(state) else {}, _SCALER)


def problem_of_saver(key: str, state: Mapping[str, Any]) -> str | None:
    """Says what is of another kind in the state of a ModelCheckpoint, or lacking."""
    return next(_problems_of_state(key, state, _SAVER), None)


def _problems_of_state(key: str, state: Mapping[str, Any], fields: Fields) -> Iterator[str]:
    for name, is_right in fields.items():
        if not is_right(state[name]) if name in state else name not in _MAY_LACK:
            yield f"holds {name}={short(state.get(name))} as a state of {short(key)}; name another"


def problems_of_averaging(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yields where averaged weights could not be averaged further; they are held to the model elsewhere."""
    for key, state in checkpoint.get("callbacks", {}).items():
        if (step := state.get("latest_update_step", 0)) > checkpoint.get("global_step", 0):
            yield f"holds latest_update_step={step}, a step to come, as a state of {short(key)}; name another"
    found = {TRAINED_KEY, AVERAGING_KEY} & checkpoint.keys()
    if len(found) == 1:
        yield f"holds {found.pop()!r} alone, without the rest of what averages weights; name another"
    match checkpoint.get(AVERAGING_KEY):
        case None if not found:
            pass
        case {"n_averaged": Tensor() as count, **others} if not others and _is_counter(count):
            pass
        case other:
            yield f"holds {AVERAGING_KEY}={short(other)}, from which no average goes on; name another"


def _is_counter(count: Tensor) -> bool:
    return count.dim() == 0 and is_count(count.item())
