"""Ends a run before the step that would put NaN or infinity into its weights."""

import logging

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from gpt_lightning.data.batches import TokenBatch
from gpt_lightning.ranks import gathered, is_distributed

_log = logging.getLogger("gpt_lightning")


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite, with the step and the samples."""


class FiniteGuard(Callback):
    """Looks at loss and gradient before each optimizer step, on all ranks together.

    Args:
        max_skipped_steps: Leave out up to so many optimizer steps whose loss or gradient is NaN or infinite,
            saying so each time; 0 ends the run at the first.
    """

    def __init__(self, max_skipped_steps: int = 0) -> None:
        if max_skipped_steps < 0:
            raise ValueError(
                f"non_finite.max_skipped_steps={max_skipped_steps} is below 0; choose 0 to end at the first"
            )
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self._sample_ids: list[Tensor] = []  # of the micro-batches of this step
        self._losses: list[Tensor] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TokenBatch, batch_idx: int
    ) -> None:
        if batch.sample_ids is not None:
            self._sample_ids.append(batch.sample_ids)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        losses, sample_ids = self._losses, self._sample_ids
        self._losses, self._sample_ids = [], []
        total = torch.stack(losses).sum().float() if losses else torch.zeros((), device=pl_module.device)
        finite = total.isfinite()
        if not _lowers_its_scale(trainer):
            finite = finite & _gradient_norm(pl_module).isfinite()
        if _any_rank(~finite):
            self._refuse(trainer, optimizer, losses, sample_ids)

    def _refuse(
        self, trainer: Trainer, optimizer: Optimizer, losses: list[Tensor], sample_ids: list[Tensor]
    ) -> None:
        what, where = _of_all_ranks(losses, sample_ids)
        found = f"step {trainer.global_step + 1:,}: the {what} is not finite{where}"
        self.skipped_steps += 1
        if self.skipped_steps > self.max_skipped_steps:
            raise NonFiniteError(
                f"{found}; the step was not taken. Lower model.optimizer.learning_rate or clip with "
                "trainer.gradient_clip_val, and go on with --ckpt_path last; "
                "--non_finite.max_skipped_steps N leaves such steps out"
            )
        if trainer.is_global_zero:
            _log.warning("%s; left out, %s of at most %s", found, self.skipped_steps, self.max_skipped_steps)
        # Without gradients no optimizer changes anything: no weight, no moment, no decay.
        optimizer.zero_grad(set_to_none=True)

    @override
    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]


def _lowers_its_scale(trainer: Trainer) -> bool:
    """Whether fp16's scaler leaves out steps of infinite gradients itself; at 1 the scale is not to blame."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None and plugin.scaler.get_scale() > 1


def _gradient_norm(module: LightningModule) -> Tensor:
    """Of what this rank holds."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return get_total_norm(gradients).float() if gradients else torch.zeros((), device=module.device)


def _any_rank(flag: Tensor) -> bool:
    flag = flag.to(torch.int32)
    if is_distributed():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _of_all_ranks(losses: list[Tensor], sample_ids: list[Tensor]) -> tuple[str, str]:
    """What is not finite, and in which samples: those of the losses that are not, else all of the step."""
    bad = [index for index, loss in enumerate(losses) if not bool(loss.isfinite())]
    ids = [[int(i) for i in ids if i >= 0] for ids in sample_ids]
    all_found = gathered(
        (bool(bad), [i for index, own in enumerate(ids) if not bad or index in bad for i in own])
    )
    in_loss = any(has_bad_loss for has_bad_loss, _ in all_found)
    named = {i for has_bad_loss, own in all_found if has_bad_loss == in_loss for i in own}
    return "loss" if in_loss else "gradient", f" (samples {_ranges(named)})" if named else ""


def _ranges(numbers: set[int]) -> str:
    """`3-6, 9`."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    return ", ".join(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in zip(starts, ends))
