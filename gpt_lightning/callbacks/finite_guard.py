"""Ends a run before the step that would put NaN or infinity into its weights."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from typing_extensions import override

from gpt_lightning.exit_codes import NON_FINITE, UserError
from gpt_lightning.parallel.gradients import norm
from gpt_lightning.parallel.ranks import gathered
from gpt_lightning.training.muon import MuonWithAdamW
from gpt_lightning.training.step_flags import greatest
from gpt_lightning.training.trainer import GPTTrainer, SaveCallback, is_logging_step

# Where the host reads results at once; on these the fused optimizers leave a step out by themselves.
DEVICES_THAT_SKIP = ("cuda",)
MOST_STEPS_UNSEEN = 100

_log = logging.getLogger("gpt_lightning")


class NonFiniteError(ArithmeticError):
    """Says which loss or gradient is NaN or infinite, by step and samples."""

    exit_code = NON_FINITE


@dataclass(eq=False)
class _Seen:
    """Gathers an optimizer step's losses, and the samples that they are of, where a batch names them."""

    losses: list[Tensor] = field(default_factory=list)
    sample_ids: list[Tensor | None] = field(default_factory=list)


class FiniteGuard(SaveCallback):
    """Looks at a module's loss and gradient before each optimizer step, on all ranks together.

    On a GPU the device itself leaves out refused steps, and every step once too many were; the host
    looks at logging steps and before validations and checkpoints, and waits for the device only then. (With
    fp16's scaler, which waits at every step, and with Lightning's own Trainer it looks at every step.)

    Args:
        max_skipped_steps: Leave out up to so many optimizer steps whose loss or gradient is NaN or infinite,
            saying so each time; 0 ends the run at the first.
    """

    def __init__(self, max_skipped_steps: int = 0) -> None:
        if max_skipped_steps < 0:
            raise UserError(
                f"non_finite.max_skipped_steps={max_skipped_steps} is below 0; choose 0 to end at the first"
            )
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self._device_decides = False
        self._step = _Seen()  # which is under way
        self._batch: Any = None
        self._unseen: list[tuple[int, _Seen, Tensor]] = []  # and whether it is refused, on the device
        self._refused: Tensor | None = None  # how many are, on the device

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._unseen, self._refused = _Seen(), [], None
        self._device_decides = isinstance(trainer, GPTTrainer) and all(
            _skips_by_itself(optimizer, trainer) for optimizer in trainer.optimizers
        )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._step.losses.append(loss.detach())
        self._step.sample_ids.append(getattr(self._batch, "sample_ids", None))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        number, step = trainer.global_step + 1, self._step
        self._step, self._batch = _Seen(), None
        refused = greatest((~_looked_at(trainer, pl_module, step.losses).isfinite()).float(), trainer)
        if self._device_decides:
            self._leave_out_on_device(optimizer, refused)
            self._unseen.append((number, step, refused))
            if is_logging_step(trainer, number) or len(self._unseen) == MOST_STEPS_UNSEEN:
                self._look(trainer)
        elif refused:
            self._refuse(trainer, number, step)
            # Without gradients no optimizer changes anything: no weight, no moment, no decay.
            optimizer.zero_grad(set_to_none=True)

    def _leave_out_on_device(self, optimizer: Optimizer, refused: Tensor) -> None:
        if self._refused is None:
            self._refused = torch.full_like(refused, self.skipped_steps)
        self._refused = self._refused + refused
        leave_out = (refused > 0) | (self._refused > self.max_skipped_steps)
        optimizer.found_inf = leave_out.float()  # type: ignore[attr-defined]

    def _look(self, trainer: Trainer) -> None:
        """Waits for the device, and reads what it has decided about the steps since the last look."""
        unseen, self._unseen = self._unseen, []
        if unseen:
            refused = torch.stack([flag for _, _, flag in unseen]).tolist()
            for (number, step, _), is_refused in zip(unseen, refused):
                if is_refused:
                    self._refuse(trainer, number, step)

    @override
    def on_save_start(self, trainer: Trainer) -> None:
        self._look(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._look(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)
        self._leave(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            optimizer.__dict__.pop("found_inf", None)

    def _refuse(self, trainer: Trainer, number: int, step: _Seen) -> None:
        what, where = _of_all_ranks(step)
        found = f"step {number:,}: the {what} is not finite{where}"
        self.skipped_steps += 1
        if self.skipped_steps > self.max_skipped_steps:
            raise NonFiniteError(
                f"{found}; the step was not taken. Lower model.optimizer.learning_rate or clip with "
                "trainer.gradient_clip_val, and go on with --ckpt_path last; "
                "--non_finite.max_skipped_steps N leaves such steps out"
            )
        if trainer.is_global_zero:
            _log.warning("%s; left out, %s of at most %s", found, self.skipped_steps, self.max_skipped_steps)

    @override
    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]


def _looked_at(trainer: Trainer, module: LightningModule, losses: list[Tensor]) -> Tensor:
    """Returns a number that is as finite as the losses and the squared norm of this rank's gradients.

    A finite gradient whose square is infinite would end AdamW's moments. While fp16's scaler can lower
    its scale, it leaves out steps of infinite gradients itself.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    is_scaled = scaler is not None and scaler.get_scale() > 1
    parameters = () if is_scaled else module.parameters()
    square = norm(p.grad for p in parameters if p.grad is not None).square()
    return torch.stack([square.to(module.device), *(loss.float() for loss in losses)]).sum()


def _skips_by_itself(optimizer: Optimizer, trainer: Trainer) -> bool:
    """Tells whether a step does nothing, on the device, where `found_inf` is 1; fp16's scaler sets it."""
    device = trainer.strategy.root_device.type
    if device not in DEVICES_THAT_SKIP or getattr(trainer.precision_plugin, "scaler", None) is not None:
        return False
    if type(optimizer) is MuonWithAdamW:
        return True
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in (SGD, Adagrad, Adam, AdamW)


def _of_all_ranks(step: _Seen) -> tuple[str, str]:
    """Says what is not finite, and in which samples: those of the losses that are not, else of the step."""
    bad = [index for index, loss in enumerate(step.losses) if not bool(loss.isfinite())]
    ids = [[int(i) for i in ids if i >= 0] if ids is not None else [] for ids in step.sample_ids]
    all_found = gathered(
        (bool(bad), [i for index, own in enumerate(ids) if not bad or index in bad for i in own])
    )
    in_loss = any(has_bad_loss for has_bad_loss, _ in all_found)
    named = {i for has_bad_loss, own in all_found if has_bad_loss == in_loss for i in own}
    return "loss" if in_loss else "gradient", f" (samples {_ranges(named)})" if named else ""


def _ranges(numbers: set[int]) -> str:
    """Writes numbers as `3-6, 9`."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    return ", ".join(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in zip(starts, ends))
