"""Holds what a checkpoint keeps of Lightning's callbacks to what these go on from."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gpt_lightning.checkpoint.values import is_count, is_named, is_number, short

# Where a callback that averages the weights puts those that were trained, and what else it goes on from.
TRAINED_KEY, AVERAGING_KEY = "current_model_state", "averaging_state"

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
_MAY_LACK = {"stopping_reason"}  # which earlier versions of Lightning did not keep
_KINDS = {  # each by the names of Lightning's classes and ours, and by what tells a child class's state
    ("ModelCheckpoint", "RunCheckpoint"): ({"best_k_models"}, _SAVER),
    ("EarlyStopping",): ({"wait_count", "best_score"}, _STOPPING),
    ("WeightAveraging", "EMAWeightAveraging"): ({"latest_update_step"}, {"latest_update_step": is_count}),
    ("Timer",): ({"time_elapsed"}, {"time_elapsed": lambda value: is_named(value) and _are_numbers(value)}),
}


def _are_numbers(value: Mapping[str, Any]) -> bool:
    return all(map(is_number, value.values()))


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
