"""Chooses by measuring which kernel multiplies a model's weights the fastest on this machine.

It takes some 20 ms a shape, once: the times are kept for the machine and PyTorch's version in the user's
cache folder. GPT_LIGHTNING_KERNELS=linear,quantized names kernels to take instead, where a dtype has them.
All layers of a model take the same: two in turns are slower than either (int8 by a fifth, Sapphire Rapids).
Training does not choose like this: after a kill it could go on with a kernel that rounds otherwise.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
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
_MOST_NUMBERS = 2**22  # of a weight, beyond which a part of it stands for it
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


def choose(shapes: Sequence[Shape]) -> str:
    """Returns the kernel, pinned or else the fastest, of layers that have these shapes and one dtype."""
    kernels = kernels_of(shapes[0].dtype)
    if taken := [name for name in pinned() if name in kernels]:
        return taken[0]
    if len(candidates := _measured_ones(kernels)) == 1:
        return next(iter(candidates))
    kept = _read()
    different = dict.fromkeys(shapes)
    missing = [shape for shape in different if not _is_whole(kept.get(str(shape)), candidates)]
    measured = {shape: measure(shape) for shape in missing}
    if measured:
        with suppress(OSError):
            keep(measured)
    times = {shape: measured.get(shape) or kept[str(shape)] for shape in different}
    return fastest([times[shape] for shape in shapes])


def _is_whole(seconds: Any, candidates: Mapping[str, Any]) -> bool:
    """Tells whether these are times of all the kernels that are measured."""
    return (
        isinstance(seconds, dict)
        and seconds.keys() == candidates.keys()
        and all(isinstance(value, float) and value > 0 for value in seconds.values())
    )


def _measured_ones(kernels: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leaves out the products of integers that only fill a gap."""
    return {name: make for name, make in kernels.items() if name != "plain"} or kernels


def kernels_of(dtype: str) -> Mapping[str, Callable[..., Any]]:
    """Returns the makers of a dtype's kernels by their names."""
    return integer_kernels() if dtype == INT8 else float_kernels(getattr(torch, dtype))


def fastest(times: Sequence[Mapping[str, float]]) -> str:
    """Names the kernel of the least sum, or an earlier one that is as fast within a machine's noise."""
    sums = {name: sum(seconds[name] for seconds in times) for name in times[0]}
    least = min(sums.values())
    return next(name for name, value in sums.items() if value <= _GAIN * least)


@torch.inference_mode()
def measure(shape: Shape) -> dict[str, float]:
    """Returns the seconds of one product by each kernel: the least of a few rounds, the kernels in turns."""
    others = torch.ones(_READ_BETWEEN // 4, dtype=torch.float32)
    n_outputs = max(1, min(shape.n_outputs, _MOST_NUMBERS // shape.n_inputs))
    with torch.autocast("cpu", enabled=False):
        makers = _measured_ones(kernels_of(shape.dtype))
        calls = {name: _call(shape._replace(n_outputs=n_outputs), make) for name, make in makers.items()}
        least = dict.fromkeys(calls, math.inf)
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                others.sum()
                start = time.perf_counter()
                call()
                least[name] = min(least[name], time.perf_counter() - start)
    return {name: seconds * shape.n_outputs / n_outputs for name, seconds in least.items()}


def _call(shape: Shape, make: Callable[..., Callable[..., Tensor]]) -> Callable[[], Tensor]:
    """Makes a product of a weight of the shape, and calls it once."""
    n_rows, n_inputs, dtype = shape.n_rows, shape.n_inputs, getattr(torch, shape.dtype)
    weight = torch.ones(shape.n_outputs, n_inputs, dtype=dtype)
    if shape.dtype == INT8:
        x, step = (torch.ones(n_rows, 1, size, dtype=torch.float32) for size in (n_inputs, 1))
        room = make_room(x.shape)
        call = partial(make(weight, n_rows, lambda _: room), x, step)
    else:
        bias = torch.ones(shape.n_outputs, dtype=dtype) if shape.has_bias else None
        call = partial(make(weight, bias, n_rows), torch.ones(n_rows, 1, n_inputs, dtype=dtype))
    call()
    return call


def pinned() -> list[str]:
    """Returns the kernels that the environment names; raises UserError for a name that none has."""
    names = [name for part in os.environ.get(PIN, "").split(",") if (name := part.strip())]
    for name in names:
        if name not in _NAMES:
            known = ", ".join(_NAMES)
            raise UserError(f"{PIN}={os.environ[PIN]}: no kernel is called {name}; name some of {known}")
    return names


def _read() -> dict[str, Any]:
    """Returns what was measured on such a machine before; nothing where the file is not as it was written."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def keep(measured: Mapping[Shape, Mapping[str, float]]) -> None:
    """Has later starts on such a machine take these."""
    kept = _read() | {str(shape): dict(seconds) for shape, seconds in measured.items()}
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_file(path) as file:
        file.write(json.dumps(kept, indent=1, sort_keys=True).encode())


def _path() -> Path:
    machine = f"{processor()}-{torch.get_num_threads()}-threads-torch-{torch.__version__}"
    safe = "".join(letter if letter.isalnum() or letter in ".-+" else "_" for letter in machine)
    return user_cache() / f"kernels-{safe}.json"
