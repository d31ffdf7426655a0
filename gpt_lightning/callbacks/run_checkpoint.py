"""The checkpoints of a run: the best by validation loss, and always the newest as `last.ckpt`."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint, with a `last.ckpt` that does not depend on the monitored metric.

    The best `save_top_k` checkpoints are judged right after each validation. `last.ckpt` is written then too,
    every `every_n_train_steps` steps, every `train_time_interval`, and when training ends. Lightning's own
    class judges by the previous validation's value when asked to save every N steps, and leaves `last.ckpt`
    behind when nothing was good enough.

    Args:
        dirpath: Folder of the checkpoints; by default checkpoints/<run_name> under trainer.default_root_dir.
        filename: Name of a best checkpoint; {step} and logged metrics such as {val/loss:.3f} may stand in it.
        monitor: The metric that says which is best; null keeps the newest instead, as often as `last.ckpt`.
        mode: min or max, which values of the metric are better.
        save_top_k: How many of the best to keep; 0 for none, -1 for all.
        save_last: Whether to write last.ckpt.
        every_n_train_steps: Write last.ckpt every so many optimizer steps, besides after each validation.
        train_time_interval: Write last.ckpt after so much time, besides after each validation.
        save_weights_only: Leave out the optimizer and all else that resuming needs.
        verbose: Say when a checkpoint is written.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "step{step:06d}",
        monitor: str | None = "val/loss",
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_weights_only: bool = False,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            save_weights_only=save_weights_only,
            verbose=verbose,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(
                f"checkpoint.every_n_train_steps={every_n_train_steps} is below 1; leave it out for none"
            )
        self._last_every_n_steps = every_n_train_steps
        self._last_interval_seconds = (
            train_time_interval.total_seconds() if train_time_interval is not None else None
        )
        self._saved_step = self._seen_step = 0
        self._saved_at_seconds = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = self._seen_step = trainer.global_step
        self._saved_at_seconds = time.monotonic()
        # A checkpoint inside a step would lose the gradients gathered so far: validate at the step's end.
        if trainer.val_check_batch != float("inf"):
            accumulate = trainer.accumulate_grad_batches
            trainer.val_check_batch = -(-trainer.val_check_batch // accumulate) * accumulate

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:  # the batch was accumulated, the step is not done
            return
        self._seen_step = trainer.global_step
        steps = self._last_every_n_steps
        due = steps is not None and trainer.global_step % steps == 0
        if self._last_interval_seconds is not None:
            elapsed = time.monotonic() - self._saved_at_seconds
            # The first rank's clock decides for all: saving is collective.
            due = due or trainer.strategy.broadcast(elapsed >= self._last_interval_seconds)
        if due:
            self._save(trainer, judge=self.monitor is None)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            # A save at this very step came before the validation and could not judge.
            self._saved_step = 0
            self._save(trainer, judge=True)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Without validation nothing else would save before the end of training.
        if not trainer.enable_validation or not sum(trainer.num_val_batches):
            self._save(trainer, judge=self.monitor is None)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, judge=self.monitor is None)

    def _save(self, trainer: Trainer, *, judge: bool) -> None:
        """Write `last.ckpt`, and a best checkpoint where the metric is fresh (`judge`); once a step."""
        if trainer.fast_dev_run or trainer.global_step == self._saved_step:
            return
        metrics = self._monitor_candidates(trainer)
        if judge and self.save_top_k != 0:
            self._save_topk_checkpoint(trainer, metrics)
        if self.save_last:
            assert self.dirpath is not None
            self.last_model_path = str(Path(self.dirpath) / "last.ckpt")
            self._save_checkpoint(trainer, self.last_model_path)
        self._saved_step = trainer.global_step
        self._saved_at_seconds = time.monotonic()

    @override
    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        # The logged "step" is that of the last logging; file names need the one of now.
        metrics = super()._monitor_candidates(trainer)
        metrics["step"] = Tensor([trainer.global_step]).int()[0]
        return metrics
