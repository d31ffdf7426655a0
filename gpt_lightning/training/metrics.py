"""Logs the numbers of a step, and sums the loss over batches exactly, at any batch size and device count."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from typing_extensions import override


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
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)
            logger.save()


class TokenLoss(Metric):
    """Computes the mean negative log-likelihood per scored token, in nats: summed nll over summed tokens.

    The mean of batch means would weigh tokens by how they were batched, and `torchmetrics.text.Perplexity`
    returns inf where one token's probability underflows in float32.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        # On the host, also where the model around it is built on the meta device.
        with torch.device("cpu"):
            super().__init__()
            self.add_state("nll", torch.zeros((), dtype=_sum_dtype()), dist_reduce_fx="sum")
            self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Adds a batch's summed nll and the number of tokens it was summed over."""
        self.nll += nll.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        return self.nll / self.tokens

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Follows the model to its device, but not to its dtype: in bfloat16 the sum stops growing at 256."""
        super()._apply(fn, exclude_state)
        self.nll = self.nll.to(_sum_dtype())
        self._defaults["nll"] = torch.zeros_like(self.nll)
        return self


def _sum_dtype() -> torch.dtype:
    return torch.float32 if torch.backends.mps.is_available() else torch.float64
