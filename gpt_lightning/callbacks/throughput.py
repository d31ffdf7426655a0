"""How fast a run trains, in tokens a second over all devices."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from gpt_lightning.data.batches import TokenBatch, rank_and_ranks
from gpt_lightning.linear_cross_entropy import IGNORE_INDEX


class Throughput(Callback):
    """Logs `throughput/tokens_per_second` at logging steps.

    Counted are scored tokens of all data-parallel ranks (tensor-parallel peers see the same tokens, and
    Lightning's ThroughputMonitor counts them again), over the time of the steps and of waiting for data.
    Validation and the writing of checkpoints are left out.
    """

    def __init__(self) -> None:
        self._reset()
        self._last_end: float | None = None
        self._logged_step = 0

    def _reset(self) -> None:
        self._seconds = 0.0
        self._tokens: Tensor | int = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter() if self._last_end is None else self._last_end

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        # Summed on the device: reading it every step would make the host wait.
        self._tokens = self._tokens + (batch.targets != IGNORE_INDEX).sum()
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._log(trainer, pl_module)
        else:
            self._add_time()

    def _add_time(self) -> None:
        self._last_end = time.perf_counter()
        self._seconds += self._last_end - self._start

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokens = torch.as_tensor(self._tokens, device=pl_module.device)
        if rank_and_ranks(trainer)[1] > 1:
            tokens = trainer.strategy.reduce(tokens, reduce_op="sum")
        n_tokens = int(tokens)  # waits for the device, so the clock is read after it
        self._add_time()
        pl_module.log("throughput/tokens_per_second", n_tokens / self._seconds)
        self._logged_step = trainer.global_step
        self._reset()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_end = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._last_end = None
