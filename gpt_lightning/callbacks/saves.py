"""Being told of every checkpoint before anything of it is made; Lightning's hook comes in the middle."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Trainer


def surround_saves(trainer: Trainer, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Have `trainer.save_checkpoint`, whoever calls it, run inside `around()`, until `leave_saves`.

    The first who leaves does it for all: when training has ended.
    """
    save = trainer.save_checkpoint

    def save_inside(*args: Any, **kwargs: Any) -> None:
        with around():
            save(*args, **kwargs)

    trainer.save_checkpoint = save_inside


def leave_saves(trainer: Trainer) -> None:
    trainer.__dict__.pop("save_checkpoint", None)
