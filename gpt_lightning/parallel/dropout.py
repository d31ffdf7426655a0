"""Random numbers that differ between ranks where each works on other values: replicas, and cut layers.

Elsewhere all ranks draw the same ones, since they are seeded alike and draw alike: one random state, in a
checkpoint too, stands for them all and for any other number of them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from gpt_lightning.parallel.mesh import ParallelMesh


@contextmanager
def own_numbers(number: int) -> Iterator[None]:
    """Draws random numbers of this replica's or peer's own, by its `number`, apart from the common ones.

    Their seed is drawn from the common stream. So whoever restores that stream (activation checkpointing, a
    resumed run) restores these numbers too.
    """
    seed = int(torch.randint(2**32, ()))  # on the host, which does not wait for the device
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        # On the host a generator heeds the lowest 32 bits only.
        generator.manual_seed((seed + number * 0x9E3779B1) % 2**32)
    try:
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)


def draw_own_numbers(module: nn.Module, mesh: ParallelMesh, when: Callable[[], bool] = lambda: True) -> None:
    """Makes `module`, in training, draw random numbers of this tensor-parallel peer's own."""
    inside: list[AbstractContextManager[None]] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and when():
            inside.append(own_numbers(mesh.tp_rank))
            inside[-1].__enter__()

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inside:
            inside.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(torch.compiler.disable(enter))
    module.register_forward_hook(torch.compiler.disable(leave), always_call=True)
