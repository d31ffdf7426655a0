"""Measures how fast a run trains, how much of the devices it uses, and what its time goes to."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from gpt_lightning.callbacks.peak_flops import peak_flops
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.kernels.device import peak_memory_gib
from gpt_lightning.model.flops import training_flops_per_token
from gpt_lightning.parallel.ranks import gathered
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import PARTS, GPTTrainer, Stopwatch, is_logging_step


class Throughput(Callback):
    """Logs at logging steps, about the time since the last one, under `throughput/`:

    - `tokens_per_second`: scored tokens of all data-parallel ranks (tensor-parallel peers see the same
      tokens) over the time that is neither validation nor the writing of checkpoints.
    - `step_seconds`: that time for one optimizer step, with all its micro-batches and the waiting for data.
    - `mfu`: the share of the peak arithmetic of all devices, tensor-parallel peers too, that
      `tokens_per_second` needs, as `training_flops_per_token` counts; rows that pad a batch count nothing.
    - `data_share`, `step_share`, `validation_share`, `checkpoint_share`, `other_share`: of the wall time of
      the first rank; they add up to 1. Data is waiting for batches and moving them to the device, which may
      still be busy with a step. What follows a validation, such as samples, counts with it; of a checkpoint,
      what training waits for.
    - `peak_memory_gib`: of the first rank since its start: tensors on the device, or the process on a CPU.

    Lightning's own Trainer tells neither of waiting nor of saving: both are `other` then, and count.
    """

    def __init__(self) -> None:
        self._clock = Stopwatch()
        self._logged_step = self._logged_tokens = 0
        self._peak_flops: float | None = None  # of all devices

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        if self._peak_flops is None:
            trainer.strategy.barrier()  # to measure at the same time where it has to be measured
            self._peak_flops = sum(gathered(peak_flops(pl_module.device, str(trainer.precision))))
        self._clock = Stopwatch()
        if isinstance(trainer, GPTTrainer):
            trainer.clock = self._clock
        else:
            rank_zero_warn(
                "Throughput: this Trainer does not tell of waiting for data and of saving, which count as "
                "other_share; make a gpt_lightning.training.trainer.GPTTrainer"
            )
        self._logged_step, self._logged_tokens = trainer.global_step, pl_module.trained_tokens
        pl_module.step_row.is_shared = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.turn_to("step")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step != self._logged_step and is_logging_step(trainer, step):
            assert isinstance(pl_module, GPTLightningModule)
            tokens = pl_module.trained_tokens  # the module has waited for the device to log the loss
            self._clock.turn_to("other")
            flops_per_token = training_flops_per_token(pl_module.model.config, batch.targets.shape[1])
            values = self._measured(tokens - self._logged_tokens, step - self._logged_step, flops_per_token)
            if (peak_memory := peak_memory_gib(pl_module.device)) is not None:
                values["peak_memory_gib"] = peak_memory
            row = {f"throughput/{name}": value for name, value in values.items()}
            pl_module.step_row.add(trainer, row)
            pl_module.step_row.write(trainer, step)
            self._logged_step, self._logged_tokens = step, tokens
            self._clock.seconds = dict.fromkeys(PARTS, 0.0)
        self._clock.turn_to("other")

    def _measured(self, tokens: int, steps: int, flops_per_token: int) -> dict[str, float]:
        seconds = self._clock.seconds
        assert self._peak_flops is not None
        total = sum(seconds.values())
        training = total - seconds["validation"] - seconds["checkpoint"]
        return {
            "tokens_per_second": tokens / training,
            "step_seconds": training / steps,
            "mfu": tokens / training * flops_per_token / self._peak_flops,
            **{f"{part}_share": seconds[part] / total for part in PARTS},
        }

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            torch.get_device_module(pl_module.device).synchronize()  # steps are to be counted as such
            self._clock.turn_to("validation")
