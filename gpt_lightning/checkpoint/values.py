"""Holds values from a file to what plain data is: containers, finite numbers, ordinary tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt_lightning.checkpoint.pickles import DEEPEST, problem_of_pickling
from gpt_lightning.exit_codes import UserError

MOST_VALUES = 5_000_000
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_COUNT = 2**53  # beyond it a float, as loggers take it, is no longer exact


def short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(type(key) is str for key in value)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def is_number(value: Any) -> bool:
    """Tells a finite number, also one that is held by a tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta or value.layout != torch.strided or value.is_complex():
            return False
        value = value.item()
    return type(value) in (int, float) and abs(value) < 1e300  # which NaN is not


def numbers(value: Any, length: int | None = None) -> bool:
    """Tells a list or tuple of finite numbers, of some length."""
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        return False
    return all(map(is_number, value))


def check_plain(checkpoint: Mapping[str, Any]) -> None:
    """Raises, before it is written, for what is in no checkpoint but numbers, texts and their containers."""
    problem = problem_of_values(checkpoint)  # of what is without end the next one would not come to it
    if problem is None and (found := problem_of_pickling(dict(checkpoint))) is not None:
        problem = f"holds {found}"
    if problem is not None:
        raise not_readable(problem.removesuffix("; name another"))


def not_readable(problem: str) -> UserError:
    reason = f"no checkpoint is saved, as it would be refused when it is read: it {problem}"
    return UserError(f"{reason}; keep numbers, texts, lists and dictionaries there")


def problem_of_values(checkpoint: Any) -> str | None:
    """Says what would have a walk through the checkpoint go on for ever, or which tensor is not all there."""
    try:
        size = _count(checkpoint, "", {}, DEEPEST)
    except UserError as error:
        return f"{error}; name another"
    return f"holds more than {MOST_VALUES:,} values; name another" if size > MOST_VALUES else None


def _count(value: Any, place: str, counted: dict[int, int], depth: int) -> int:
    """Counts the values in nested containers, as often as one meets them; looks at each container once."""
    if isinstance(value, Tensor):
        if (problem := problem_of_tensor(value)) is not None:
            raise UserError(f"holds {problem} as {place}")
        return 1
    if not isinstance(value, (Mapping, list, tuple, set)):
        return 1
    if id(value) in counted:
        size = counted[id(value)]
        if size == 0:
            raise UserError(f"holds itself within {place}")
        return size
    if depth == 0:
        raise UserError(f"is nested more than {DEEPEST} deep")
    counted[id(value)], size = 0, 1
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        name = f"{place}.{key if type(key) in (str, int) else '?'}"[-80:].strip(".")
        size += _count(part, name, counted, depth - 1)
    counted[id(value)] = size
    return size


def problem_of_tensor(tensor: Tensor) -> str | None:
    """Says what a tensor is that has not every number in a place of its own in ordinary memory."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.is_meta:
        return "a tensor without numbers"
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reach and tensor.numel():
            return f"a tensor of {tensor.numel():,} numbers that share memory"
        reach += (size - 1) * stride
    return None
