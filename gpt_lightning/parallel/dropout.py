"""Dropout that differs between tensor-parallel peers, where each works on other values.

Elsewhere the peers draw the same random numbers, since they are seeded alike and draw alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt_lightning.parallel.mesh import ParallelMesh


def draw_own_numbers(module: nn.Module, mesh: ParallelMesh, when: Callable[[], bool] = lambda: True) -> None:
    """Makes `module`, in training, draw random numbers of this peer's own, apart from the common ones.

    Their seed is drawn from the common stream. So whoever restores that stream (activation checkpointing, a
    resumed run) restores these numbers too.
    """
    outer: list[tuple[torch.Generator, Tensor]] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and when():
            outer.append(_switch(inputs[0].device, mesh.tp_rank))

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if outer:
            generator, state = outer.pop()
            generator.set_state(state)

    module.register_forward_pre_hook(torch.compiler.disable(enter))
    module.register_forward_hook(torch.compiler.disable(leave), always_call=True)


def _switch(device: torch.device, tp_rank: int) -> tuple[torch.Generator, Tensor]:
    seed = int(torch.randint(2**32, ()))  # on the host, which does not wait for the device
    of_gpus = torch.cuda.default_generators
    generator = of_gpus[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    # On the host a generator heeds the lowest 32 bits only.
    generator.manual_seed((seed + tp_rank * 0x9E3779B1) % 2**32)
    return generator, state
