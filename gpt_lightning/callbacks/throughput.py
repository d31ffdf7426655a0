"""Measures how fast a run trains, how much of the devices it uses, and what its time goes to."""

from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from gpt_lightning.data.loader import TokenBatch, rank_and_ranks, token_batch
from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.device import peak_memory_gib
from gpt_lightning.model.flops import training_flops_per_token
from gpt_lightning.parallel.ranks import total
from gpt_lightning.planning.peak_flops import peak_flops
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import PARTS, GPTTrainer, Stopwatch, is_logging_step

LOOKS = 5  # at the peak of a CPU, which other programs may keep busy at the first


class Throughput(Callback):
    """Logs at logging steps, about the time since the last one, under `throughput/`:

    - `tokens_per_second`: scored tokens of all data-parallel ranks (tensor-parallel peers see the same
      tokens) over the time that is neither validation nor the writing of checkpoints.
    - `step_seconds`: that time for one optimizer step, with all its micro-batches and the waiting for data.
    - `mfu`: the share of the peak arithmetic of all devices, tensor-parallel peers too, that
      `tokens_per_second` needs, as `training_flops_per_token` counts; rows that pad a batch count nothing.
      The peak is the highest rate that was seen, by the run's own steps, too.
    - `data_share`, `step_share`, `validation_share`, `checkpoint_share`, `other_share`: of the wall time of
      the first rank; they add up to 1. Data is waiting for batches and moving them to the device, which may
      still be busy with a step. What follows a validation, such as samples, counts with it; of a checkpoint,
      what training waits for.
    - `peak_memory_gib`: of the first rank since its start: tensors on the device, or the process on a CPU.

    Lightning's own Trainer tells neither of waiting nor of saving: both are `other` then, and count. Where a
    batch does not show its tokens, there are the times alone.
    """

    def __init__(self) -> None:
        self._clock = Stopwatch()
        self._logged_step = self._counted_step = 0
        self._tokens: int | Tensor | None = 0  # scored since then; None if a batch does not show them
        self._width = 0
        self._peak_flops = 0.0  # of all devices
        self._looks = 0  # that were taken at it

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        if not self._looks:
            self._look_at_peak(trainer, pl_module)
        self._clock = Stopwatch()
        if isinstance(trainer, GPTTrainer):
            trainer.clock = self._clock
        else:
            rank_zero_warn(
                "Throughput: this Trainer does not tell of waiting for data and of saving, which count as "
                "other_share; make a gpt_lightning.training.trainer.GPTTrainer"
            )
        self._logged_step = self._counted_step = trainer.global_step
        self._tokens = 0
        pl_module.step_row.is_shared = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.turn_to("step")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count(trainer, batch)
        step = trainer.global_step
        if step != self._logged_step and is_logging_step(trainer, step):
            assert isinstance(pl_module, GPTLightningModule)
            # The module has waited for the device to log the loss.
            tokens = None if self._tokens is None else int(self._tokens)
            self._clock.turn_to("other")
            if self._looks < LOOKS and pl_module.device.type == "cpu":
                seconds = dict(self._clock.seconds)
                self._look_at_peak(trainer, pl_module)
                self._clock.turn_to("other")
                self._clock.seconds = seconds  # the look is no part of the run's time
            values = self._measured(step - self._logged_step)
            if tokens is not None:
                flops = training_flops_per_token(pl_module.model.config, self._width)
                values = self._rates(tokens, flops) | values
            if (peak_memory := peak_memory_gib(pl_module.device)) is not None:
                values["peak_memory_gib"] = peak_memory
            row = {f"throughput/{name}": value for name, value in values.items()}
            pl_module.step_row.add(trainer, row)
            pl_module.step_row.write(trainer, step)
            self._logged_step, self._tokens = step, 0
            self._clock.seconds = dict.fromkeys(PARTS, 0.0)
        self._clock.turn_to("other")

    def _look_at_peak(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises the peak where devices do more than before: other programs may have held them up then."""
        trainer.strategy.barrier()  # to measure at the same time where it has to be measured
        found = total(peak_flops(pl_module.device, str(trainer.precision)), pl_module.device)
        self._peak_flops = max(self._peak_flops, found)
        self._looks += 1

    def _count(self, trainer: Trainer, batch: Any) -> None:
        """Adds the tokens that all ranks score: of a batch that says so, of the whole step at its end."""
        is_step_over = trainer.global_step != self._counted_step
        self._counted_step = trainer.global_step
        tokens: TokenBatch | None = None
        with suppress(UserError):
            tokens = token_batch(batch)
        if tokens is None or self._tokens is None:
            self._tokens = None
        elif tokens.step_tokens is None:
            self._tokens = self._tokens + rank_and_ranks(trainer)[1] * tokens.scored()
        elif is_step_over:
            self._tokens = self._tokens + tokens.step_tokens
        self._width = 0 if tokens is None else tokens.targets.shape[-1]

    def _training_seconds(self) -> float:
        seconds = self._clock.seconds
        return sum(seconds.values()) - seconds["validation"] - seconds["checkpoint"]

    def _measured(self, steps: int) -> dict[str, float]:
        seconds = self._clock.seconds
        total = sum(seconds.values())
        shares = {f"{part}_share": seconds[part] / total for part in PARTS}
        return {"step_seconds": self._training_seconds() / steps, **shares}

    def _rates(self, tokens: int, flops_per_token: int) -> dict[str, float]:
        rate = tokens / self._training_seconds()
        done = rate * flops_per_token
        self._peak_flops = max(self._peak_flops, done)  # what was done can be done
        return {"tokens_per_second": rate, "mfu": done / self._peak_flops if done else 0.0}

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            torch.get_device_module(pl_module.device).synchronize()  # steps are to be counted as such
            self._clock.turn_to("validation")
