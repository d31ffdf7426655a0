"""Shows one progress bar over the whole run, and writes a line after each validation."""

import time
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from gpt_lightning.callbacks.terminal import printable
from gpt_lightning.data.loader import is_first_of_replica, rank_and_ranks
from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.parallel.ranks import gathered
from gpt_lightning.training.metrics import part_of_text
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.prediction import CompletionCallback
from gpt_lightning.training.trainer import is_logging_step

REFRESHES_PER_SECOND = 2  # each takes 2 ms of CPU


class StepProgressBar(ProgressBar, CompletionCallback):
    """Shows optimizer steps; Lightning's bars count an epoch's batches, of which a GPT may need a part.

    Everything goes to stderr. Where that is no terminal, only the lines after validations are written,
    and one when all prompts are continued.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True
        self._tokens = self._completions = 0  # of this rank, since `_begun`
        self._begun = 0.0
        self._counted = (0.0, 0)  # when the rate was last shown, and the tokens by then

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
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Writes a line of another callback's above the bar."""
        self._say(" ".join(map(str, args)))

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
        if self._progress is None:
            return
        # Metrics change at logging steps only; reading them between would make the host wait for the device.
        is_logged = is_logging_step(trainer, trainer.global_step)
        names = ("train/loss", "throughput/tokens_per_second")
        self._advance(trainer.global_step, _describe(trainer, *names) if is_logged else None)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop()
        elif not trainer.sanity_checking:
            val = ("val/loss", "val/ppl", "val/bpb", "val/share")
            names = ("train/loss", *val, "throughput/tokens_per_second")
            self._say(f"step {trainer.global_step:,}: {_describe(trainer, *names)}")

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
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._advance(batch_idx + 1)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("testing", sum(trainer.num_test_batches))

    on_test_batch_end = on_validation_batch_end
    on_test_end = on_train_end

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        self._tokens = self._completions = 0
        self._begun = time.perf_counter()
        self._counted = (self._begun, 0)
        ranks = rank_and_ranks(trainer)[1]
        what = "generating" if ranks == 1 else f"generating, one share of {ranks}"
        self._start(what, len(batch.indices) * pl_module.generation.num_samples)

    @override
    def on_new_token(self) -> None:
        self._tokens += 1
        now, (then, tokens) = time.perf_counter(), self._counted
        if now - then >= 1:
            self._advance(self._completions, f"{(self._tokens - tokens) / (now - then):,.0f} tokens/s")
            self._counted = (now, self._tokens)

    @override
    def on_completion(self, row: dict[str, Any]) -> None:
        self._completions += 1
        self._advance(self._completions)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        counts = (self._tokens, self._completions) if is_first_of_replica(trainer) else (0, 0)
        tokens, completions = (sum(column) for column in zip(*gathered(counts)))
        if completions:
            seconds = time.perf_counter() - self._begun
            texts = f"{completions:,} completion{'s' if completions != 1 else ''}"
            rate = f"{tokens / seconds:,.0f} tokens/s"
            self._say(f"generated {tokens:,} tokens of {texts} in {seconds:,.1f} s: {rate}")

    def _start(self, what: str, total: float, completed: int = 0) -> None:
        if not (self._enabled and self.trainer.is_global_zero and self._console.is_terminal):
            return
        self._stop()
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *("{task.description}", *columns, "{task.fields[metrics]}"),
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self._progress.add_task(what, total=total, completed=completed, metrics="")
        self._progress.start()

    def _advance(self, completed: int, metrics: str | None = None) -> None:
        if self._progress is not None:
            fields: dict[str, Any] = {} if metrics is None else {"metrics": printable(metrics)}
            self._progress.update(self._progress.task_ids[0], completed=completed, **fields)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        if self._enabled and self.trainer.is_global_zero:
            self._console.print(printable(line), markup=False)


def _describe(trainer: Trainer, *names: str) -> str:
    metrics = trainer.callback_metrics
    values = {name: float(metrics[name]) for name in names if name in metrics}
    texts = {name: f"{name} {value:{',.0f' if value >= 1000 else '.4g'}}" for name, value in values.items()}
    if (share := values.get("val/share")) is not None:
        texts["val/share"] = f"(val: {part_of_text(share)})"
    return "  ".join(texts.values())
