"""The numbers of a logging step, for callbacks, loggers and progress bars."""

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def is_logging_step(trainer: Trainer, step: int) -> bool:
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


class StepSums:
    """Of the micro-batches of the optimizer step that is under way."""

    def __init__(self) -> None:
        self.places = 0  # targets of one micro-batch, scored or not
        self._sums: tuple[Tensor, Tensor] | None = None

    def __bool__(self) -> bool:
        return self._sums is not None

    def add(self, nll: Tensor, tokens: Tensor, places: int) -> None:
        self.places = places
        self._sums = (nll, tokens) if self._sums is None else (self._sums[0] + nll, self._sums[1] + tokens)

    def take(self) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of tokens it is summed over; the next step begins with nothing."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums


class StepRow:
    """The numbers of a logging step: for callbacks and bars at once, for loggers all in one row.

    `is_shared` tells that somebody will add to what the module adds, and write then.

    It does what `self.log(..., on_step=True)` does. Lightning looks through all that `self.log` was ever
    given after every batch, and reads what is for the progress bar from the device each time, also where
    nothing was logged.
    """

    def __init__(self, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self._step = 0
        self._numbers: dict[str, float] = {}

    def add(
        self,
        trainer: Trainer,
        step: int,
        values: Mapping[str, Tensor | float],
        progress_bar: Collection[str] = (),
    ) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        tensors = dict(zip(numbers, torch.tensor(list(numbers.values()), dtype=torch.float32)))
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        trainer.progress_bar_metrics.update({name: numbers[name] for name in progress_bar})
        self._step = step
        self._numbers.update(numbers)

    def write(self, trainer: Trainer) -> None:
        numbers, self._numbers = self._numbers, {}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, self._step)
            logger.save()
