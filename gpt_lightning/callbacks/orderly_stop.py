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
from gpt_lightning.exit_codes import INTERRUPTED, TERMINATED
from gpt_lightning.training.trainer import GPTTrainer, log_step_now, timeout_of

EXIT_CODES = {"SIGTERM": TERMINATED, "SIGUSR1": TERMINATED, "SIGINT": INTERRUPTED}


class Stopped(Exception):
    """Ends a run before its time, in order, on all ranks, and with this exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OrderlyStop(Callback):
    """Ends the run when all other callbacks have seen the step, and so must be the last.

    A GPTTrainer has no handlers of Lightning's, which save nothing, end with code 0, and hang when one rank
    alone is signalled.
    """

    def __init__(self) -> None:
        self._exit_code = 0
        self._seen_step = 0
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
        if trainer.world_size > 1:
            # On the host: to agree on a stop never waits for a device.
            self._group = dist.new_group(backend="gloo", timeout=timeout_of(trainer))
        if threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                if (number := getattr(signal, name, None)) is not None:
                    self._former_handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remembers the signal; a second SIGINT ends at once, as everywhere."""
        name = signal.Signals(number).name
        if name == "SIGINT" and self._exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        self._exit_code = EXIT_CODES[name]
        # Not through sys.stderr, in whose writing the signal may have come.
        with suppress(OSError):  # nobody may be reading
            os.write(2, f"{name}: ending after this step, with a checkpoint\n".encode())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:  # else the batch was accumulated, the step is not done
            self._seen_step = trainer.global_step
            self._stop_if_asked(trainer)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        code = self._exit_code
        if self._group is not None:
            codes = torch.tensor(code)
            dist.all_reduce(codes, op=dist.ReduceOp.MAX, group=self._group)
            code = int(codes)
        if not code:
            return
        saved = ""
        if isinstance(trainer.checkpoint_callback, RunCheckpoint) and trainer.global_step:
            trainer.checkpoint_callback.save_now(trainer)
            saved = f"; go on with --ckpt_path {trainer.checkpoint_callback.last_model_path}"
        log_step_now(trainer)
        raise Stopped(f"stopped by a signal at step {trainer.global_step:,}{saved}", code)

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
