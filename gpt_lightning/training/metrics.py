"""Gathers and logs the numbers of a step, and sums the loss over batches exactly."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from gpt_lightning.data.loader import rank_and_ranks
from gpt_lightning.parallel.gradients import norm
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.trainer import loggers_may_fail


@dataclass(eq=False)
class OptimizerStep:
    """Gathers what this rank has done of the optimizer step that follows `after` others.

    `tokens` are those that all ranks score in all of the step.
    """

    after: int = -1
    nlls: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def loss(self, trainer: Trainer, device: torch.device) -> dict[str, Tensor | float]:
        """Returns the loss per token; nothing where a child class computes, and logs, its own."""
        if self.after != trainer.global_step:
            return {}
        nll = sum(self.nlls, torch.zeros((), device=device))
        if rank_and_ranks(trainer)[1] > 1:
            nll = summed(nll, trainer.strategy)
        loss = nll / self.tokens
        return {"train/loss": loss, "train/ppl": loss.exp()}


def epochs_trained(trainer: Trainer) -> float:
    """Counts the epochs trained, with the fraction of this one; Lightning would log whole ones."""
    done: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.current_epoch + done / trainer.num_training_batches


def gradient_norm(trainer: Trainer, module: LightningModule) -> Tensor:
    """Returns that of the whole model, of which a rank may hold a part."""
    if isinstance(trainer.strategy, TensorParallelDDPStrategy):
        return trainer.strategy.gradient_norm(module.parameters())
    return norm(p.grad for p in module.parameters() if p.grad is not None)


def summed(values: Tensor, strategy: Strategy) -> Tensor:
    """Sums over the ranks that read other samples, which call it together.

    Before its own reductions Lightning has all ranks wait for each other, and each host for its device.
    """
    group = strategy.mesh.dp_group if isinstance(strategy, TensorParallelDDPStrategy) else None
    dist.all_reduce(values, group=group)
    return values


class StepRow:
    """Gives the numbers of a logging step to callbacks and bars at once, and to loggers in one row.

    `self.log` would read what is for the progress bar from the device after every batch, and lose the row of
    a step that ends the run. `is_shared` tells that a callback adds to what the module adds, and writes then.
    """

    def __init__(self) -> None:
        self.is_shared = False
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
        self.is_empty = True

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Adds a batch's summed nll and the number of tokens it was summed over."""
        dtype = torch.float32 if nll.device.type == "mps" else torch.float64
        self.nll = self.nll + nll.detach().to(dtype)
        self.tokens = self.tokens + tokens
        self.is_empty = False

    def compute(self, strategy: Strategy) -> Tensor:
        """Sums over all ranks, which call it together."""
        if dist.is_initialized():
            sums = summed(torch.stack([self.nll, self.tokens.to(self.nll.dtype)]), strategy)
            self.nll, self.tokens = sums[0], sums[1].long()
        return self.nll / self.tokens
