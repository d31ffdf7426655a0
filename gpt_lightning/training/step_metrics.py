"""The numbers of a logging step, for callbacks, loggers and progress bars."""

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def is_logging_step(trainer: Trainer, step: int) -> bool:
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


def log_step(
    trainer: Trainer, step: int, values: Mapping[str, Tensor | float], progress_bar: Collection[str] = ()
) -> None:
    """What `self.log(..., on_step=True)` does, for the logging step of now and right away.

    Lightning looks through all that `self.log` was ever given after every batch, and reads what is for the
    progress bar from the device each time, also where nothing was logged.
    """
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in values.items()}
    numbers = {name: tensor.item() for name, tensor in tensors.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    trainer.progress_bar_metrics.update({name: numbers[name] for name in progress_bar})
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step)
        logger.save()
