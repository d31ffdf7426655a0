"""Flags that ranks compare at every optimizer step: in one message, over the group of their devices.

To know them the host never waits for a device that it runs ahead of. Whether a step is refused the device
itself heeds; the code of a stop comes to the host a few steps later, in the same step on all ranks.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor

RUN_AHEAD_OF = ("cuda",)
STEPS_LATER = 2


class StopCallback(Callback):
    """Has a code with which the run is to end, which goes along with what other callbacks compare."""

    def stop_code(self, trainer: Trainer) -> int:
        """Returns this rank's, 0 if the run is to go on."""
        return 0

    def on_code_of_all(self, code: Tensor) -> None:
        """Takes the greatest that a rank has, on the device; several ranks are told at every message."""


def greatest(flag: Tensor, trainer: Trainer) -> Tensor:
    """Returns the greatest that a rank has, and tells each StopCallback the greatest of its codes.

    All ranks call it together. One process has nobody to compare with, and is told nothing.
    """
    if trainer.world_size == 1:
        return flag
    stops = [callback for callback in trainer.callbacks if isinstance(callback, StopCallback)]
    codes = [flag.new_full((), stop.stop_code(trainer)) for stop in stops]
    flags = torch.stack([flag, *codes])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    for stop, code in zip(stops, flags[1:]):
        stop.on_code_of_all(code)
    return flags[0]


class Readout:
    """Brings numbers of a device to the host when the host need not wait for them any more."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, Any]] = deque()

    def __call__(self, number: Tensor) -> int:
        """Returns the number of STEPS_LATER calls ago, or 0; where the host does not run ahead, this one."""
        if number.device.type not in RUN_AHEAD_OF:
            return int(number)
        arriving = torch.empty_like(number, device="cpu", pin_memory=number.is_cuda)
        arriving.copy_(number, non_blocking=True)
        copied = torch.get_device_module(number.device).Event()
        copied.record()
        self._under_way.append((arriving, copied))
        if len(self._under_way) <= STEPS_LATER:
            return 0
        arrived, copied = self._under_way.popleft()
        copied.synchronize()
        return int(arrived)
