"""Holds the Trainer of this program, and all that is needed of Lightning's private names.

tests/training/test_trainer.py fails when one of them goes away, or is used anywhere else. It knows two more
kinds: the names that RunCheckpoint inherits, and the layout of the loops' state, which ExactResume mends.
"""

import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from typing_extensions import override

PARTS = ("data", "step", "validation", "checkpoint", "other")


class Stopwatch:
    """Adds up the time of each part; every moment belongs to the part that was turned to last."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part = "other"
        self._since = time.perf_counter()

    def turn_to(self, part: str) -> str:
        """Returns the part that was on before."""
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        former, self._part, self._since = self._part, part, now
        return former


class ResumeCallback(Callback):
    """Restores what Lightning does not: with it a resumed run is the one that was never interrupted."""


class SaveCallback(Callback):
    """Is told by a GPTTrainer before anything of a checkpoint is made; Lightning's hook is in the middle."""

    def on_save_start(self, trainer: Trainer) -> None: ...


class GPTTrainer(Trainer):
    """Measures its fetches and saves, for which Lightning has no hooks, and leaves signals to OrderlyStop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Stopwatch()  # Throughput turns it to the other parts
        loop = self.fit_loop.epoch_loop
        self.fit_loop.epoch_loop = _EpochLoop(self, min_steps=loop.min_steps, max_steps=loop.max_steps)
        self._signal_connector = _NoSignals(self)
        self._logger_connector = _Logging(self)
        self.logger_error: BaseException | None = None  # with which OrderlyStop ends the run

    @override
    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Saves until training may go on, whether the checkpoint is written or only copied."""
        torch.get_device_module(self.strategy.root_device).synchronize()  # steps are to be counted as such
        with counted_as(self, "checkpoint"):
            for callback in self.callbacks:
                if isinstance(callback, SaveCallback):
                    callback.on_save_start(self)
            super().save_checkpoint(filepath, weights_only, storage_options)


@contextmanager
def counted_as(trainer: Trainer, part: str) -> Generator[None, None, None]:
    """Counts the time inside as that of a part of the run, where the Trainer measures it."""
    clock = trainer.clock if isinstance(trainer, GPTTrainer) else Stopwatch()
    former = clock.turn_to(part)
    yield
    clock.turn_to(former)


class _EpochLoop(_TrainingEpochLoop):
    trainer: GPTTrainer

    @override
    def _on_before_fetch(self) -> None:
        self.trainer.clock.turn_to("data")
        super()._on_before_fetch()

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Does nothing: Lightning's broadcast has the host wait for the device at every batch."""


class _Logging(_LoggerConnector):
    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with loggers_may_fail(self.trainer):
            super().log_metrics(metrics, step)


class _NoSignals(_SignalConnector):
    @override
    def register_signal_handlers(self) -> None:
        """Registers none: Lightning's save nothing, exit with 0, and hang if one rank alone is signalled."""


@contextmanager
def loggers_may_fail(trainer: Trainer) -> Generator[None, None, None]:
    """Keeps, for a GPTTrainer, a logger's error: raised, it would end the run without a checkpoint."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # TensorBoardLogger raises another ValueError from it
        is_outside = isinstance(cause, OSError) or "start new thread" in str(cause)
        if not is_outside or not isinstance(trainer, GPTTrainer):
            raise
        trainer.logger_error = trainer.logger_error or cause


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Tells whether the numbers of this optimizer step are logged."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


def is_inside_a_step(trainer: Trainer) -> bool:
    """Tells whether the optimizer step is still to come after the batch that was trained last."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_end_of_epoch(trainer: Trainer) -> bool:
    """Tells whether the batch that was trained last is the epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def can_stop_early(trainer: Trainer) -> bool:
    """Tells whether the least steps and epochs that were asked for are done."""
    return trainer.fit_loop._can_stop_early


def validates(trainer: Trainer) -> bool:
    """Tells whether the run has validations."""
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0


def validation_is_due(trainer: Trainer) -> bool:
    """Tells whether the schedule, not a stop, asks for a validation after the batch that was trained last."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or not validates(trainer):
        return False
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))
    finally:
        trainer.should_stop = should_stop


def has_logged(trainer: Trainer) -> bool:
    """Tells whether somebody has logged a value of this loop with `self.log`."""
    return bool(trainer._results)


def log_step_now(trainer: Trainer) -> None:
    """Hands the loggers what was logged in this step with `self.log`; Lightning does it after the hooks."""
    trainer._logger_connector.update_train_step_metrics()


def starts_ranks_as_programs(trainer: Trainer) -> bool:
    """Tells whether Lightning starts the machine's other ranks, each as this program anew."""
    return isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)


def started_ranks(trainer: Trainer) -> dict[int, "subprocess.Popen[bytes]"]:
    """Returns the processes of the ranks that this one has started, which Lightning watches no longer."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return {}
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            # It would kill all ranks when one has a non-zero exit code, as those have that agreed to stop.
            thread._child_processes = []
    return {trainer.global_rank + 1 + number: child for number, child in enumerate(launcher.procs)}


def timeout_of(trainer: Trainer) -> timedelta | None:
    """Returns how long a rank waits for the others in a collective operation, where the strategy says it."""
    return getattr(trainer.strategy, "_timeout", None)
