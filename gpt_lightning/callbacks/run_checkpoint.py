"""Saves the checkpoints of a run: the best by validation loss, and always the newest as `last.ckpt`."""

import re
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from gpt_lightning.checkpoint.files import is_own, lies_in
from gpt_lightning.checkpoint.io import DurableCheckpointIO, SaveOptions
from gpt_lightning.checkpoint.runs import LAST
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.own_checkpoints import forget_other_folders, of_own_folder, savers
from gpt_lightning.training.trainer import (
    can_stop_early,
    counted_as,
    is_end_of_epoch,
    is_inside_a_step,
    loggers_may_fail,
    validates,
)


class RunCheckpoint(ModelCheckpoint):
    """Saves as ModelCheckpoint does, and a `last.ckpt` that does not depend on the monitored metric.

    The best `save_top_k` checkpoints are judged right after each validation. `last.ckpt` is written then too,
    every `every_n_train_steps` steps, every `train_time_interval`, and when training ends; in a run without
    validations that is when the best are judged. Lightning's own class judges by the previous validation's
    value when asked to save every N steps, and leaves `last.ckpt` behind when nothing was good enough.

    Training goes on while a file is written, from a copy in host memory; the next save waits for it. A
    checkpoint is removed after those that replace it are safe, and then loggers are told of them.

    Args:
        dirpath: Folder of the checkpoints; by default checkpoints/<run_name> under trainer.default_root_dir.
        filename: Name of a best checkpoint; {step} and logged metrics such as {val/loss:.3f} may stand in it.
        monitor: The metric that says which is best; null keeps the newest instead, as often as `last.ckpt`.
        mode: min or max, which values of the metric are better.
        save_top_k: How many of the best to keep; 0 for none, -1 for all.
        save_last: Whether to write last.ckpt; a run that is stopped by a signal writes it in any case.
        every_n_train_steps: Write last.ckpt every so many optimizer steps, besides after each validation.
        train_time_interval: Write last.ckpt after so much time, besides after each validation.
        save_weights_only: Leave out the optimizer and all else that resuming needs.
        background: Write while training goes on, for which host memory holds one copy of the checkpoint. Only
            where one process writes one file: not with trainer.strategy.save_sharded.
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
        background: bool = True,
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
            save_on_train_epoch_end=False,  # it would judge a second time by the epoch's last validation
        )
        _check_arguments(filename, every_n_train_steps)
        self._last_every_n_steps = every_n_train_steps
        self._last_interval = train_time_interval
        self._background = background
        self._writer: DurableCheckpointIO | None = None  # which takes options: where it writes one file
        self._untold: Future[None] | None = None  # the writing of what loggers have not heard of
        # What Lightning's class has decided to write and to remove, until `_write` does it.
        self._targets: list[str] = []
        self._outdated: list[str] = []
        self._stop_asked = False
        self._saved_step = self._last_step = self._seen_step = 0
        self._saved_at_seconds = 0.0

    # ---- when

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if isinstance(strategy, TensorParallelDDPStrategy):
            one_file = not strategy.save_sharded
        else:
            one_file = type(strategy).save_checkpoint is Strategy.save_checkpoint
        plugin = strategy.checkpoint_io
        self._writer = plugin if one_file and isinstance(plugin, DurableCheckpointIO) else None
        if isinstance(plugin, DurableCheckpointIO):  # which is not told of sharded checkpoints
            plugin.folders |= {Path(str(callback.dirpath)) for callback in savers(trainer)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = self._last_step = self._seen_step = trainer.global_step
        self._saved_at_seconds = time.monotonic()
        self._stop_asked = False
        _validate_between_steps(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _validate_between_steps(trainer)  # Lightning reckons anew when it has reloaded the data

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._untold is not None and self._untold.done():
            self._finish(trainer)
        if self._stop_asked or trainer.should_stop:
            # Lets a stop wait for the end of the step, whose gathered gradients would be lost.
            self._stop_asked = is_inside_a_step(trainer)
            trainer.should_stop = not self._stop_asked
        if trainer.global_step == self._seen_step:  # the batch was accumulated, the step is not done
            return
        self._seen_step = trainer.global_step
        if self._is_due(trainer):
            # The default metric, which is logged by validations alone, may be missing where there are none.
            is_fresh = not validates(trainer) and self.monitor in trainer.callback_metrics
            self._save(trainer, judge=self.monitor is None or is_fresh)

    def _is_due(self, trainer: Trainer) -> bool:
        steps = self._last_every_n_steps
        due = steps is not None and trainer.global_step % steps == 0
        if not validates(trainer):
            # Nothing else would save before the end of training. Not when the epoch has ended: resumed from
            # there, Lightning would end it a second time.
            due = due or is_end_of_epoch(trainer)
        if self._last_interval is not None:
            elapsed = timedelta(seconds=time.monotonic() - self._saved_at_seconds)
            # The first rank's clock decides for all: saving is collective.
            due = due or trainer.strategy.broadcast(elapsed >= self._last_interval)
        # The last step, too, not after the loops have ended: from its state a resumed run goes on.
        stops = trainer.should_stop and can_stop_early(trainer)
        return due or stops or trainer.global_step == trainer.max_steps

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            # A save at this very step came before the validation and could not judge.
            self._save(trainer, judge=True, again=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, judge=self.monitor is None)
        self._finish(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._untold is not None and self._untold.exception() is None:  # for which it waits
            self._finish(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Writes `last.ckpt`, unless it is of this step, and waits until it is safe; all ranks call it.

        It needs no `save_last`. Inside an optimizer step it would lose the gradients gathered so far.
        """
        if not trainer.fast_dev_run and (trainer.global_step != self._last_step or not self.last_model_path):
            self._finish(trainer)
            self._write(trainer, last=True)
        self._finish(trainer)

    # ---- what

    def _save(self, trainer: Trainer, *, judge: bool, again: bool = False) -> None:
        """Writes `last.ckpt`, and a best checkpoint where the metric is fresh (`judge`); once a step."""
        if trainer.fast_dev_run or (trainer.global_step == self._saved_step and not again):
            return
        self._finish(trainer)  # before what loggers are told of changes
        if judge:
            # The logged "step" is that of the last logging; file names need the one of now.
            step = torch.tensor(trainer.global_step)
            self._save_topk_checkpoint(trainer, {**self._monitor_candidates(trainer), "step": step})
        if self._targets or self.save_last:
            self._write(trainer, last=bool(self.save_last))

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._targets.append(filepath)

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if lies_in(Path(str(self.dirpath)), Path(filepath)):
            self._outdated.append(filepath)

    def _write(self, trainer: Trainer, *, last: bool) -> None:
        if last:
            assert self.dirpath is not None
            self.last_model_path = str(Path(self.dirpath) / LAST)
            self._targets.append(self.last_model_path)
            self._last_step = trainer.global_step
        first, *others = dict.fromkeys(self._targets)
        outdated = self._outdated
        self._targets, self._outdated = [], []
        if self._writer is not None:
            also, remove = (tuple(map(Path, paths)) for paths in (others, outdated))
            options = SaveOptions(background=self._background, also=also, remove=remove)
            trainer.save_checkpoint(first, self.save_weights_only, options)
        else:
            for path in (first, *others):
                trainer.save_checkpoint(path, self.save_weights_only)
            for path in outdated:
                if is_own(Path(str(self.dirpath)), Path(path)):
                    trainer.strategy.remove_checkpoint(path)
        self._untold = self._writer.writing if self._writer is not None else None
        if self._untold is None:
            self._tell_loggers(trainer)
        self._saved_step = trainer.global_step
        self._saved_at_seconds = time.monotonic()

    def _finish(self, trainer: Trainer) -> None:
        """Waits until the last checkpoint is whole, and lets the loggers know; raises if it failed."""
        with counted_as(trainer, "checkpoint"):
            if self._writer is not None:
                self._writer.finish()
            if self._untold is not None:
                self._untold = None
                self._tell_loggers(trainer)

    def _tell_loggers(self, trainer: Trainer) -> None:
        with loggers_may_fail(trainer):
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.after_save_checkpoint(proxy(self))

    # ---- after a resume

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        forget_other_folders(trainer, checkpoint)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the best checkpoints that lie in this run's folder, also if it was moved."""
        super().load_state_dict(of_own_folder(self, state_dict))


def _check_arguments(filename: str, every_n_train_steps: int | None) -> None:
    if "/" in re.sub(r"\{.*?\}", "", filename or ""):
        raise UserError(
            f"checkpoint.filename={filename} leads into another folder, where no run looks for its "
            "checkpoints; leave out the slash"
        )
    if every_n_train_steps is not None and every_n_train_steps < 1:
        raise UserError(
            f"checkpoint.every_n_train_steps={every_n_train_steps} is below 1; leave it out for none"
        )


def _validate_between_steps(trainer: Trainer) -> None:
    """Moves validations to the ends of steps: a checkpoint inside one would lose its gradients.

    A `val_check_interval` of time stays as it is.
    """
    batches, accumulate = trainer.val_check_batch, trainer.accumulate_grad_batches
    if batches not in (None, float("inf")):
        trainer.val_check_batch = -(-batches // accumulate) * accumulate
