"""Holds the state of an optimizer to the parameters that it is for, before anything is computed with it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gpt_lightning.checkpoint.files import OPTIMIZERS
from gpt_lightning.checkpoint.training_state import problem_of_schedulers
from gpt_lightning.checkpoint.values import FLOATS, is_number, numbers, problem_of_tensor, short

Groups = Sequence[Sequence[Tensor]]  # the parameters of an optimizer, group by group
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_MUON_GROUP = {"params", "lr", "initial_lr", "weight_decay", "momentum"}
_LIKE_PARAMETERS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_MUON_NUMBERS = ("lr", "weight_decay")
_ADAM_NUMBERS = (*_MUON_NUMBERS, "eps")
_ADAM_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused")


def problem_of_optimizer(state: Any, groups: Groups | None, *, is_ours: bool = False) -> str | None:
    """Says what is wrong with an optimizer's state dict, or how it does not fit these parameters.

    Without parameters it is that of an optimizer of which nothing is known. One that `is_ours` was saved with
    these very parameters, of which all have an entry, or none, before the first step.
    """
    problem = next(_problems(state, groups, is_ours), None)
    return problem and f"holds a state of the optimizer that does not fit: {problem}"


def problem_of_name(groups: Sequence[Mapping[str, Any]], own: str | None) -> str | None:
    """Says where saved groups are those of another model.optimizer.name than a run's own."""
    saved = optimizer_name(groups)
    if own is None or saved in (own, None):
        return None
    remedy = f"go on with {saved}, or begin a run with its weights (init_from)"
    return f"holds the state of model.optimizer.name={saved}, and this run has {own}; {remedy}"


def problems_of_optimizers(checkpoint: Mapping[str, Any], choices: Sequence[Groups]) -> Iterator[str]:
    """Yields where a checkpoint's optimizers and schedules are not those that its model's own class builds.

    `choices` are the parameters of the optimizers that it can build; without them the class is unknown.
    """
    if OPTIMIZERS not in checkpoint:
        return
    states = checkpoint[OPTIMIZERS]
    if not isinstance(states, list):
        yield f"holds {OPTIMIZERS}={short(states)}, no states of optimizers; name another"
    own = _own_groups(states, choices)
    for state in states:
        if problem := problem_of_optimizer(state, own, is_ours=own is not None):
            yield f"{problem}; name another"
    if own is not None and (problem := problem_of_schedulers(checkpoint["lr_schedulers"], len(own))):
        yield problem


def problems_of_sizes(
    checkpoint: Mapping[str, Any], sizes: Mapping[str, list[int]], choices: Sequence[Groups]
) -> Iterator[str]:
    """Yields the same of a sharded checkpoint, whose state lacks the tensors, by their names and sizes."""
    states = checkpoint.get(OPTIMIZERS, [])
    if not isinstance(states, list):
        yield f"holds {OPTIMIZERS}={short(states)}, no states of optimizers; name another"
    for state in states:
        entries = state.get("state") if isinstance(state, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            yield f"holds {short(state)} as the state of an optimizer; name another"
    own = _own_groups(states, choices)
    without = {**checkpoint, OPTIMIZERS: [{**state, "state": {}} for state in states]}
    yield from problems_of_optimizers(without if OPTIMIZERS in checkpoint else {}, choices)
    for key in sizes:
        _, number, index, _ = key.split("/")
        if int(number) >= len(states) or int(index) not in states[int(number)]["state"]:
            yield f"holds {key}, for which its {OPTIMIZERS} have no place; name another"
    if own is None or not sizes or optimizer_name(saved := states[0]["param_groups"]) is None:
        return
    kept = [(parameter, group) for group, of in zip(saved, own) for parameter in of]
    expected = {
        f"{OPTIMIZERS}/0/{index}/{name}": [] if name == "step" else list(parameter.shape)
        for index, (parameter, group) in enumerate(kept)
        for name in _moments(group) or ()
    }
    for key in {**sizes, **expected}:
        if sizes.get(key) != expected.get(key):
            yield f"holds {key} of the size {sizes.get(key)} instead of {expected.get(key)}; name another"


def _own_groups(states: Sequence[Any], choices: Sequence[Groups]) -> Groups | None:
    """Returns the groups that the state is for; none if a child class has built another optimizer."""
    fitting = (groups for groups in choices if len(states) == 1 and fits_groups(states[0], groups))
    return next(fitting, None)


def problem_of_options(state: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Says which option in a state is of another kind than an optimizer's own, or switches something on."""
    for number, (saved, own) in enumerate(zip(state["param_groups"], own_groups)):
        for name, value in own.items():
            found = saved.get(name)
            is_switch = type(value) is bool and name not in ("foreach", "fused")
            is_other = is_switch and name in saved and found != value
            is_other |= is_number(value) and not is_number(found)
            is_other |= numbers(value) and not numbers(found, len(value))
            if is_other and name != "params":
                return f"holds {name}={short(found)} in group {number} of the optimizer, which has {value}"
    return None


def fits_groups(state: Any, groups: Groups) -> bool:
    """Tells whether an optimizer of these parameters could take the state, by the numbers of its groups."""
    match state:
        case {"param_groups": list(saved)} if all(isinstance(group, dict) for group in saved):
            sizes = [len(group["params"]) for group in saved if isinstance(group.get("params"), list)]
            return sizes == [len(group) for group in groups]
    return False


def is_adam(group: Mapping[str, Any]) -> bool:
    return "betas" in group and "amsgrad" in group


def is_muon(group: Mapping[str, Any]) -> bool:
    """Tells the group of matrices that our Muon has, and no other optimizer that knows a momentum."""
    return "momentum" in group and group.keys() <= _MUON_GROUP


def optimizer_name(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the model.optimizer.name to which the groups belong, if they are of one."""
    if not all(is_adam(group) or is_muon(group) for group in groups):
        return None
    return "muon" if any(map(is_muon, groups)) else "adamw"


def _moments(group: Mapping[str, Any]) -> set[str] | None:
    """Returns what the optimizer keeps of each parameter of such a group; None for those of others."""
    if is_muon(group):
        return {"momentum_buffer"}
    if is_adam(group):
        return MOMENTS | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
    return None


def _problems(state: Any, groups: Groups | None, is_ours: bool) -> Iterator[str]:
    match state:
        case {"state": dict(entries), "param_groups": list(saved_groups)}:
            pass
        case _:
            yield f"it is {short(state)}"
            return
    for number, group in enumerate(saved_groups):
        yield from _problems_of_group(group, number)
    indices = [index for group in saved_groups for index in group["params"]]
    if indices != list(range(len(indices))):
        yield "its parameters are not numbered from 0 on"
    if groups is not None and not fits_groups(state, groups):
        sizes, own = ([len(group) for group in each] for each in (indices_of(saved_groups), groups))
        yield f"it has groups of {sizes} parameters instead of {own}"
    unknown = [index for index in entries if type(index) is not int or not 0 <= index < len(indices)]
    if unknown:
        yield f"it has an entry for {short(unknown[0])}, which is no parameter"
    if is_ours and len(entries) not in (0, len(indices)):
        yield f"it has entries for {len(entries)} of {len(indices)} parameters"
    parameters = [parameter for group in groups or [] for parameter in group]
    groups_of = [group for group in saved_groups for _ in group["params"]]
    for index, entry in entries.items():
        parameter = parameters[index] if parameters else None
        yield from _problems_of_entry(entry, index, parameter, groups_of[index], is_ours)
    yield from _shared_memory(entries)


def indices_of(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [group["params"] for group in groups]


def _problems_of_group(group: Any, number: int) -> Iterator[str]:
    match group:
        case {"params": list(indices)} if all(type(index) is int for index in indices):
            pass
        case _:
            yield f"group {number} is {short(group)}"
            return
    if _moments(group) is None:
        return
    for name in _MUON_NUMBERS if is_muon(group) else _ADAM_NUMBERS:
        if not is_number(group.get(name)) or group[name] < 0:
            yield f"{name} of group {number} is {short(group.get(name))}"
    if is_muon(group):
        if not is_number(group["momentum"]) or not 0 <= group["momentum"] < 1:
            yield f"momentum of group {number} is {short(group['momentum'])}"
    elif not numbers(group["betas"], 2) or not all(0 <= beta < 1 for beta in group["betas"]):
        yield f"betas of group {number} are {short(group['betas'])}"
    if "initial_lr" in group and not (is_number(group["initial_lr"]) and group["initial_lr"] > 0):
        yield f"initial_lr of group {number} is {short(group['initial_lr'])}"
    for name in _ADAM_FLAGS if is_adam(group) else ():
        if type(group.get(name)) not in (bool, type(None)):
            yield f"{name} of group {number} is {short(group[name])}"


def _problems_of_entry(
    entry: Any, index: int, parameter: Tensor | None, group: Mapping[str, Any], is_ours: bool
) -> Iterator[str]:
    if not isinstance(entry, dict) or not all(type(name) is str for name in entry):
        yield f"the entry of parameter {index} is {short(entry)}"
        return
    if (wanted := _moments(group)) is not None and entry.keys() != wanted:
        yield f"parameter {index} has {short(sorted(entry))} instead of {sorted(wanted)}"
    for name, value in entry.items():
        what = f"{name} of parameter {index}"
        if isinstance(value, Tensor):
            if (problem := problem_of_tensor(value)) is not None:
                yield f"{what} is {problem}"
            elif value.is_neg() or value.is_conj() or value.requires_grad:
                yield f"{what} is no ordinary tensor"
        elif wanted is not None and name != "step":
            yield f"{what} is {short(value)}"
        if name == "step" and not (is_number(value) and float(value) >= 0):
            yield f"{what} is {short(value)}"
        elif name in _LIKE_PARAMETERS and parameter is not None:
            yield from _problems_of_moment(value, what, parameter, is_ours)


def _problems_of_moment(value: Any, what: str, parameter: Tensor, is_ours: bool) -> Iterator[str]:
    """Yields where what an optimizer computes with beside a parameter differs from it in form."""
    if value is None:  # SGD's, before its first step
        return
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        found = list(value.shape) if isinstance(value, Tensor) else short(value)
        yield f"{what} is {found} instead of {list(parameter.shape)}"
    elif value.dtype not in FLOATS or is_ours and value.dtype != parameter.dtype:
        yield f"{what} is of {value.dtype} instead of {parameter.dtype}"
    elif value.stride() != parameter.stride() and not (value.is_contiguous() and parameter.is_contiguous()):
        yield f"{what} has the strides {list(value.stride())} instead of {list(parameter.stride())}"


def _shared_memory(entries: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Yields a tensor whose memory another one has too: an optimizer changes each in its place."""
    tensors = [
        (value.data_ptr(), _extent(value), f"{name} of parameter {index}")
        for index, entry in entries.items()
        for name, value in entry.items()
        if isinstance(value, Tensor) and value.numel()
    ]
    end = 0
    for start, size, what in sorted(tensors):
        if start < end:
            yield f"{what} shares its memory"
        end = max(end, start + size)


def _extent(tensor: Tensor) -> int:
    """Counts the bytes from a tensor's first number to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize
