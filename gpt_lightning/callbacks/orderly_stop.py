"""Ends a run at a signal in order: after the optimizer step, with a checkpoint, on all ranks together."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.start_signals import EXIT_CODES, StartSignals
from gpt_lightning.callbacks.terminal import log_time
from gpt_lightning.exit_codes import INTERRUPTED, WRITE_FAILED
from gpt_lightning.parallel.gradients import norm
from gpt_lightning.training.step_flags import RUN_AHEAD_OF, Readout, StopCallback, greatest
from gpt_lightning.training.trainer import GPTTrainer, log_step_now, validation_is_due


class Stopped(Exception):
    """Ends a run before its time, in order, on all ranks, and with this exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OrderlyStop(StopCallback):
    """Ends the run when all other callbacks have seen the step, and so must be the last.

    Inside a validation it ends at once, unless the weights are not those that were trained: a callback that
    averages them puts others in meanwhile, and the stop waits until it has taken them out again.

    It hears signals once training begins, and where there are several ranks from the setup on: they end
    together before the first step too, with nothing saved. Of a signal to one rank the others hear in what
    all compare at every step, on GPUs two steps later: no host waits there.

    A GPTTrainer has no handlers of Lightning's, which save nothing, end with code 0, and hang when one rank
    alone is signalled.
    """

    def __init__(self) -> None:
        self._exit_code = 0
        self._seen_step = self._rank = 0
        self._has_begun = False
        self._trained: float | None = None  # the norm of the weights when the validation came up
        self._savers: list[RunCheckpoint] = []
        self._are_several = self._hears_later = False
        self._readout = Readout()
        self._heard: int | None = None  # what all ranks have told in this step, if they have
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
        self._readout, self._heard = Readout(), None
        self._are_several = trainer.world_size > 1
        self._hears_later = self._are_several and trainer.strategy.root_device.type in RUN_AHEAD_OF
        if self._are_several:
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
        saved += " unless a rank is lost" if saved and self._are_several else ""
        after = "in a few steps" if self._hears_later else "after this step"
        when = f"{after}{saved}" if self._has_begun else "before the first step"
        # Not through sys.stderr, in whose writing the signal may have come.
        with suppress(OSError):  # nobody may be reading
            os.write(2, f"{log_time()}{name}: ending {when}\n".encode() * (self._rank == 0))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_together(trainer)
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
            if code := self._code_of_step(trainer, pl_module):
                stop = self._stop(trainer, code)
                log_step_now(trainer)
                raise stop
        self._trained = _norm(pl_module) if validation_is_due(trainer) else None

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and (code := self._code_of_step(trainer, pl_module)):
            are_others = self._trained is None or self._trained != _norm(pl_module)
            if not self._agreed(trainer, int(are_others)):
                raise self._stop(trainer, code)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_together(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exit_code = 0  # all is done: a signal of now stops nothing
        self._stop_together(trainer)

    # ---- what the ranks agree on

    @override
    def stop_code(self, trainer: Trainer) -> int:
        error = trainer.logger_error if isinstance(trainer, GPTTrainer) else None
        return self._exit_code or (WRITE_FAILED if error is not None else 0)

    @override
    def on_code_of_all(self, code: Tensor) -> None:
        self._heard = self._readout(code)

    def _code_of_step(self, trainer: Trainer, module: LightningModule) -> int:
        """Returns the code to stop with that all ranks know of, the same on all."""
        if not self._are_several:
            return self.stop_code(trainer)
        if self._heard is None:  # no other callback has compared anything
            greatest(torch.zeros((), device=module.device), trainer)
        heard, self._heard = self._heard, None
        return heard or 0

    def _agreed(self, trainer: Trainer, number: int) -> int:
        """Returns the greatest number that a rank has now; the host waits for it."""
        if not self._are_several:
            return number
        numbers = torch.tensor(number, device=trainer.strategy.root_device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    # ---- the end

    def _stop_together(self, trainer: Trainer) -> None:
        """Ends the run if any rank has a reason to, where the hosts may wait for each other."""
        if code := self._agreed(trainer, self.stop_code(trainer)):
            raise self._stop(trainer, code)

    def _stop(self, trainer: Trainer, code: int) -> Stopped:
        """Saves a checkpoint, and returns what ends the run; all ranks call it."""
        if not self._has_begun and code != WRITE_FAILED:
            return Stopped("stopped by a signal before the first step; nothing is saved", code)
        saved = ""
        for saver in self._savers if trainer.global_step and self._has_begun else ():
            saver.save_now(trainer)
            path = saver.last_model_path
            weights_alone = f"; --init_from {path} begins a run with its weights"
            saved = weights_alone if saver.save_weights_only else f"; go on with --ckpt_path {path}"
        reason = "by a signal"
        if code == WRITE_FAILED:
            error = trainer.logger_error if isinstance(trainer, GPTTrainer) else None
            reason = f"since curves cannot be written ({error})"
        return Stopped(f"stopped {reason} at step {trainer.global_step:,}{saved}", code)

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
