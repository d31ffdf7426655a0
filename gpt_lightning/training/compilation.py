"""Decides, by device and length of the run, whether it trains through torch.compile, and how."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.device import can_compile_for_cuda

OFF = "none"
# Compiling takes about as long as it spares in so many passes, be the model small or large.
MIN_PASSES = 2000


def check_backend(name: str | None) -> None:
    if name not in (None, OFF) and name not in torch.compiler.list_backends(exclude_tags=()):
        raise UserError(
            f"model.compile_backend={name!r} is unknown; choose inductor, {OFF}, or one of "
            f"{', '.join(torch.compiler.list_backends())}"
        )


def choose_backend(name: str | None, *, device: str, passes: float, can_compile: bool) -> str | None:
    """Returns the backend to compile with; `passes` are those through the model in the whole run.

    The whole run counts, not what is left of it: a resumed run must compute as the interrupted one did.
    """
    if name is not None:
        return None if name == OFF else name
    return "inductor" if device == "cuda" and can_compile and passes >= MIN_PASSES else None


def compile_blocks(blocks: nn.ModuleList, trainer: Trainer, name: str | None) -> None:
    """Compiles in place: names in checkpoints stay, and all blocks run the code made for the first."""
    device = trainer.strategy.root_device.type
    backend = choose_backend(
        name,
        device=device,
        passes=trainer.estimated_stepping_batches * trainer.accumulate_grad_batches,
        can_compile=device == "cuda" and can_compile_for_cuda(),
    )
    if backend is None:
        return
    if name is None:
        rank_zero_info(f"compiling the blocks for about a minute (not with model.compile_backend={OFF})")
    for block in blocks:
        block.compile(backend=backend)
