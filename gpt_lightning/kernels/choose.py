"""Chooses by measuring which kernel multiplies a model's weights the fastest on this machine.

It takes some 20 ms a shape, once: the choice is kept for the machine and PyTorch's version in the user's
cache folder. GPT_LIGHTNING_KERNELS=linear,quantized names kernels to take instead, where a shape has them.
Training does not choose like this: after a kill it could go on with a kernel that rounds otherwise.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_lightning.checkpoint.atomic import user_cache, written_file
from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.device import processor
from gpt_lightning.kernels.products import float_kernels, integer_kernels, make_room

PIN = "GPT_LIGHTNING_KERNELS"
INT8 = "int8"
_NAMES = ("linear", "one_row", "packed", "plain", "quantized", "onednn")
_MOST_NUMBERS = 2**22  # of a weight, beyond which a part of it is measured
_READ_BETWEEN = 2**24  # bytes, after which a weight is not in the processor's nearest caches, as in a step
_ROUNDS = 3
_GAIN = 1.03  # of the time of one that comes first, below which it is not left


class Shape(NamedTuple):
    """Tells of a layer what its speed depends on; `dtype` is float32, bfloat16 or int8."""

    n_outputs: int
    n_inputs: int
    has_bias: bool
    n_rows: int
    dtype: str

    def __str__(self) -> str:
        bias = ", bias" if self.has_bias else ""
        rows = "row" if self.n_rows == 1 else "rows"
        return f"{self.n_outputs} x {self.n_inputs}{bias}, {self.n_rows} {rows}, {self.dtype}"


def choose(shapes: Iterable[Shape]) -> dict[Shape, str]:
    """Returns the name of each shape's kernel: the pinned, the remembered or the fastest one."""
    pinned = _pinned()
    chosen = {}
    remembered = _read()
    missing = []
    for shape in dict.fromkeys(shapes):
        kernels = kernels_of(shape.dtype)
        if found := [name for name in pinned if name in kernels]:
            chosen[shape] = found[0]
        elif remembered.get(str(shape)) in kernels:
            chosen[shape] = remembered[str(shape)]
        else:
            missing.append(shape)
    if missing:
        measured = {shape: fastest(measure(shape)) for shape in missing}
        keep(measured)
        chosen |= measured
    return chosen


def kernels_of(dtype: str) -> Mapping[str, Callable[..., Any]]:
    """Returns the makers of a dtype's kernels by their names."""
    return integer_kernels() if dtype == INT8 else float_kernels(getattr(torch, dtype))


def fastest(seconds: Mapping[str, float]) -> str:
    """Names the fastest kernel, or an earlier one that is as fast within what a machine's noise is."""
    least = min(seconds.values())
    return next(name for name, value in seconds.items() if value <= _GAIN * least)


@torch.inference_mode()
def measure(shape: Shape) -> dict[str, float]:
    """Returns the seconds of one product by each kernel: the least of a few rounds, the kernels in turns."""
    makers = kernels_of(shape.dtype)
    others = torch.ones(_READ_BETWEEN // 4, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        calls = {name: _call(shape, make) for name, make in makers.items() if name != "plain"}
        least = dict.fromkeys(calls or makers, math.inf)
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                others.sum()
                start = time.perf_counter()
                call()
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def _call(shape: Shape, make: Callable[..., Callable[..., Tensor]]) -> Callable[[], Tensor]:
    """Makes a product of a weight of the shape, cut where it is tall, and calls it once."""
    n_rows, n_inputs, dtype = shape.n_rows, shape.n_inputs, getattr(torch, shape.dtype)
    n_outputs = max(1, min(shape.n_outputs, _MOST_NUMBERS // n_inputs))
    weight = torch.ones(n_outputs, n_inputs, dtype=dtype)
    if shape.dtype == INT8:
        x, step = torch.ones(n_rows, 1, n_inputs, dtype=torch.float32), torch.ones(n_rows, 1, 1)
        room = make_room(x.shape)
        call = partial(make(weight, n_rows, lambda _: room), x, step)
    else:
        bias = torch.ones(n_outputs, dtype=dtype) if shape.has_bias else None
        call = partial(make(weight, bias, n_rows), torch.ones(n_rows, 1, n_inputs, dtype=dtype))
    call()
    return call


def _pinned() -> list[str]:
    names = [name for name in os.environ.get(PIN, "").split(",") if name]
    for name in names:
        if name not in _NAMES:
            known = ", ".join(_NAMES)
            raise UserError(f"{PIN}={os.environ[PIN]}: no kernel is called {name}; name some of {known}")
    return names


def _read() -> dict[str, str]:
    """Returns what was measured on such a machine before; nothing where the file is not as it was written."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        return {shape: name for shape, name in found.items() if isinstance(name, str)}
    return {}


def keep(measured: Mapping[Shape, str]) -> None:
    """Has later starts on such a machine take these, as far as the user's cache folder can be written."""
    path = _path()
    kept = _read() | {str(shape): name for shape, name in measured.items()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_file(path) as file:
            file.write(json.dumps(kept, indent=1, sort_keys=True).encode())


def _path() -> Path:
    machine = f"{processor()}-{torch.get_num_threads()}-threads-torch-{torch.__version__}"
    safe = "".join(letter if letter.isalnum() or letter in ".-+" else "_" for letter in machine)
    return user_cache() / f"kernels-{safe}.json"
