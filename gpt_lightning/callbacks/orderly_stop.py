"""Ends a run at a signal in order: after the optimizer step, with a checkpoint, on all ranks together."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.start_signals import EXIT_CODES, StartSignals
from gpt_lightning.callbacks.terminal import log_time
from gpt_lightning.exit_codes import INTERRUPTED, WRITE_FAILED
from gpt_lightning.parallel.gradients import norm
from gpt_lightning.training.trainer import GPTTrainer, log_step_now, timeout_of, validation_is_due


class Stopped(Exception):
    """Ends a run before its time, in order, on all ranks, and with this exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OrderlyStop(Callback):
    """Ends the run when all other callbacks have seen the step, and so must be the last.

    Inside a validation it ends at once, unless the weights are not those that were trained: a callback that
    averages them puts others in meanwhile, and the stop waits until it has taken them out again.

    It hears signals once training begins, and where there are several ranks from the setup on: they end
    together before the first step too, with nothing saved.

    A GPTTrainer has no handlers of Lightning's, which save nothing, end with code 0, and hang when one rank
    alone is signalled.
    """

    def __init__(self) -> None:
        self._exit_code = 0
        self._seen_step = self._rank = 0
        self._has_begun = False
        self._trained: float | None = None  # the norm of the weights when the validation came up
        self._savers: list[RunCheckpoint] = []
        self._group: dist.ProcessGroup | None = None
        self._former_handlers: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":  # a signal ends an evaluation or a prediction as it ends any process
            return
        if not isinstance(trainer, GPTTrainer):
            rank_zero_warn(
                "OrderlyStop hears no signal of a Trainer whose own handlers take it: make a "
                "gpt_lightning.training.trainer.GPTTrainer"
            )
        savers = [] if trainer.fast_dev_run else trainer.checkpoint_callbacks  # which saves nothing then
        self._savers = [each for each in savers if isinstance(each, RunCheckpoint)]
        self._rank, self._has_begun = trainer.global_rank, False
        if trainer.world_size > 1:
            # On the host: to agree on a stop never waits for a device.
            self._group = dist.new_group(backend="gloo", timeout=timeout_of(trainer))
            self._take_signals()

    def _take_signals(self) -> None:
        if not self._former_handlers and threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                if (number := getattr(signal, name, None)) is not None:
                    self._former_handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remembers the signal; a second SIGINT ends at once, as everywhere."""
        name = signal.Signals(number).name
        if name == "SIGINT" and self._exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        self._exit_code = EXIT_CODES[name]
        saved = ", with a checkpoint" if self._savers else ""
        saved += " unless a rank is lost" if saved and self._group is not None else ""
        when = f"after this step{saved}" if self._has_begun else "before the first step"
        # Not through sys.stderr, in whose writing the signal may have come.
        with suppress(OSError):  # nobody may be reading
            os.write(2, f"{log_time()}{name}: ending {when}\n".encode() * (self._rank == 0))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (stop := self._stop(trainer)) is not None:
            raise stop
        self._take_signals()
        for handler in self._former_handlers.values():
            if isinstance(handler, StartSignals):
                handler.has_trained = True
        self._seen_step, self._has_begun = trainer.global_step, True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:  # else the batch was accumulated, the step is not done
            self._seen_step = trainer.global_step
            if (stop := self._stop(trainer)) is not None:
                log_step_now(trainer)
                raise stop
        self._trained = _norm(pl_module) if validation_is_due(trainer) else None

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._greatest(self._exit_code):
            are_others = self._trained is None or self._trained != _norm(pl_module)
            if not self._greatest(int(are_others)) and (stop := self._stop(trainer)) is not None:
                raise stop

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and (stop := self._stop(trainer)) is not None:
            raise stop

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exit_code = 0  # all is done: a signal of now stops nothing
        if (stop := self._stop(trainer)) is not None:
            raise stop

    def _stop(self, trainer: Trainer) -> Stopped | None:
        """Saves a checkpoint and returns what ends the run, if any rank has a reason to end it."""
        error = trainer.logger_error if isinstance(trainer, GPTTrainer) else None
        code = self._greatest(self._exit_code or (WRITE_FAILED if error is not None else 0))
        if not code:
            return None
        if not self._has_begun and code != WRITE_FAILED:
            return Stopped("stopped by a signal before the first step; nothing is saved", code)
        saved = ""
        for saver in self._savers if trainer.global_step and self._has_begun else ():
            saver.save_now(trainer)
            path = saver.last_model_path
            weights_alone = f"; --init_from {path} begins a run with its weights"
            saved = weights_alone if saver.save_weights_only else f"; go on with --ckpt_path {path}"
        reason = f"since curves cannot be written ({error})" if code == WRITE_FAILED else "by a signal"
        return Stopped(f"stopped {reason} at step {trainer.global_step:,}{saved}", code)

    def _greatest(self, number: int) -> int:
        """Returns the greatest number that a rank has, the same on all."""
        if self._group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back_signals()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back_signals()

    def _give_back_signals(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}


def _norm(module: LightningModule) -> float:
    with torch.no_grad():
        return float(norm(module.parameters()))
