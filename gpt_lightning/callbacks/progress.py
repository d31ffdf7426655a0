"""One progress bar over the whole run, in optimizer steps, and a line after each validation."""

from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from gpt_lightning.training.module import GPTLightningModule


class StepProgressBar(ProgressBar):
    """Lightning's bars count batches of an epoch; a GPT is trained by steps, a few epochs or part of one.

    Everything goes to stderr. Where that is no terminal, only the lines after validations are written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True

    @cached_property
    def _console(self) -> Console:
        # At its first use, in the process that shows it: a console cannot be sent to one that is spawned.
        return Console(stderr=True, highlight=False, soft_wrap=True)

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        self._say(
            f"model of {pl_module.n_parameters:,} parameters; "
            f"epoch of {trainer.num_training_batches:,} batches; "
            f"training to step {trainer.estimated_stepping_batches:,}"
        )
        self._start("training", trainer.estimated_stepping_batches, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Metrics change at logging steps only; reading them between would make the host wait for the device.
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._advance(
                trainer.global_step, _describe(trainer, "train/loss", "throughput/tokens_per_second")
            )
        else:
            self._advance(trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            names = ("train/loss", "val/loss", "val/ppl", "val/bpb", "throughput/tokens_per_second")
            self._say(f"step {trainer.global_step:,}: {_describe(trainer, *names)}")
        self._end_evaluation()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._start("validating", sum(trainer.num_val_batches))

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._advance(batch_idx + 1)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("testing", sum(trainer.num_test_batches))

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._advance(batch_idx + 1)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("generating", sum(trainer.num_predict_batches))

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._advance(batch_idx + 1)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _end_evaluation(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._stop()

    def _start(self, what: str, total: float, completed: int = 0) -> None:
        if not (self._enabled and self.trainer.is_global_zero and self._console.is_terminal):
            return
        self._stop()
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self._progress = Progress(*columns, console=self._console, refresh_per_second=4)
        self._progress.add_task(what, total=total, completed=completed, metrics="")
        self._progress.start()

    def _advance(self, completed: int, metrics: str | None = None) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=completed)
            if metrics is not None:
                self._progress.update(self._progress.task_ids[0], metrics=metrics)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        if self._enabled and self.trainer.is_global_zero:
            self._console.print(line)


def _describe(trainer: Trainer, *names: str) -> str:
    metrics = trainer.callback_metrics
    return "  ".join(f"{name} {_short(float(metrics[name]))}" for name in names if name in metrics)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
