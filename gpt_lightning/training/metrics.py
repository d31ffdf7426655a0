"""Gathers and logs the numbers of a step, and sums the loss over batches exactly."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from gpt_lightning.training.trainer import loggers_may_fail


@dataclass(eq=False)
class OptimizerStep:
    """Gathers what this rank has done of an optimizer step: its micro-batches' losses and samples.

    `tokens` are those that all ranks score in all of the step.
    """

    nlls: list[Tensor] = field(default_factory=list)
    sample_ids: list[Tensor] = field(default_factory=list)
    tokens: int = 0


class StepRow:
    """Gives the numbers of a logging step to callbacks and bars at once, and to loggers in one row.

    `self.log` would read what is for the progress bar from the device after every batch, and lose the row of
    a step that ends the run. `is_shared` tells that a callback adds to what the module adds, and writes then.
    """

    def __init__(self, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self._numbers: dict[str, float] = {}

    def add(
        self, trainer: Trainer, values: Mapping[str, Tensor | float], progress_bar: Collection[str] = ()
    ) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        tensors = {name: torch.tensor(number) for name, number in numbers.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        trainer.progress_bar_metrics.update({name: numbers[name] for name in progress_bar})
        self._numbers.update(numbers)

    def write(self, trainer: Trainer, step: int) -> None:
        numbers, self._numbers = self._numbers, {}
        with loggers_may_fail(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step)
                logger.save()


class TokenLoss:
    """Computes the mean negative log-likelihood per scored token, in nats: summed nll over summed tokens.

    The mean of batch means would weigh tokens by how they were batched. The sums are on the device, which
    adds to them without the host waiting, and in float64 where there is one: in bfloat16 they would stop
    growing at 256.
    """

    def __init__(self) -> None:
        # On the host, also where the model around it is built on the meta device.
        self.nll = self.tokens = torch.zeros((), dtype=torch.long, device="cpu")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Adds a batch's summed nll and the number of tokens it was summed over."""
        dtype = torch.float32 if nll.device.type == "mps" else torch.float64
        self.nll = self.nll + nll.detach().to(dtype)
        self.tokens = self.tokens + tokens

    def compute(self, strategy: Strategy) -> Tensor:
        """Sums over all ranks, which call it together."""
        self.nll = strategy.reduce(self.nll, reduce_op="sum")
        self.tokens = strategy.reduce(self.tokens, reduce_op="sum")
        return self.nll / self.tokens
