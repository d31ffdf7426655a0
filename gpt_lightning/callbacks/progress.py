"""Shows how far a run is: in one line of a terminal, or in a line from time to time where there is none."""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.live import Live
from typing_extensions import override

from gpt_lightning import __version__
from gpt_lightning.callbacks.memory_estimate import memory_lines
from gpt_lightning.callbacks.progress_line import Progress, ProgressLine, shortened
from gpt_lightning.callbacks.run_config import RunConfig
from gpt_lightning.callbacks.terminal import printable
from gpt_lightning.data.loader import is_first_of_replica, rank_and_ranks
from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.ranks import gathered
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.notes import part_of_text
from gpt_lightning.training.prediction import CompletionCallback
from gpt_lightning.training.trainer import is_logging_step

REFRESHES_PER_SECOND = 2  # each takes 2 ms of CPU


class StepProgressBar(ProgressBar, CompletionCallback):
    """Shows optimizer steps; Lightning's bars count an epoch's batches, of which a GPT may need a part.

    Everything goes to stderr, by the first rank. Each fit begins with what is trained, where, on what and
    with how much memory, and has a line after each validation.

    Args:
        every_n_seconds: Where there is no terminal, write a line that often; null for none.
    """

    def __init__(self, every_n_seconds: float | None = 30) -> None:
        super().__init__()
        if every_n_seconds is not None and not every_n_seconds >= 0:
            raise UserError(f"progress.every_n_seconds={every_n_seconds} is below 0; raise it, or give null")
        self._every_n_seconds = every_n_seconds
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._enabled = True
        self._said_at = 0.0  # when a line was last written, for a file
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

    # ---- fit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(f"gpt_lightning {__version__}; run folder {_run_folder(trainer)}; {_devices(trainer)}")

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Writes a line of another callback's above the bar."""
        self._say(" ".join(map(str, args)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        self._say(
            f"model of {pl_module.n_parameters:,} parameters; "
            f"epoch of {batches:,} batch{'es' if batches != 1 else ''}; "
            f"training to {_end(total, total * trainer.accumulate_grad_batches / batches)}"
        )
        for line in memory_lines(trainer, pl_module):
            self._say(line)
        self._start("step", total, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is not None:
            # Metrics change at logging steps; to read them between would make the host wait for the device.
            if is_logging_step(trainer, trainer.global_step):
                self._take_numbers(trainer)
            self._advance(trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop()
        elif not trainer.sanity_checking:
            self._note("")
            if self._progress is not None:
                self._take_numbers(trainer)
            self._say_validated(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    # ---- validate, test

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
        elif not trainer.sanity_checking:
            self._note(f"validating {batch_idx + 1:,}/{sum(trainer.num_val_batches):,}")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("testing", sum(trainer.num_test_batches))

    on_test_batch_end = on_validation_batch_end
    on_test_end = on_train_end

    # ---- predict

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
        if now - then >= 1 and self._progress is not None:
            self._progress.rate = (self._tokens - tokens) / (now - then)
            self._counted = (now, self._tokens)
            self._advance(self._completions)

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
            generated = f"{tokens:,} token{'s' if tokens != 1 else ''}"
            rate = f"{tokens / seconds:,.0f} tokens/s"
            self._say(f"generated {generated} of {texts} in {seconds:,.1f} s: {rate}")

    # ---- what is shown

    def _start(self, what: str, total: float, completed: int = 0) -> None:
        if not (self._enabled and self.trainer.is_global_zero):
            return
        self._stop()
        self._progress = Progress(what, total, completed)
        self._said_at = time.monotonic()
        if self._is_on_screen:
            self._live = Live(
                get_renderable=self._line, console=self._console, refresh_per_second=REFRESHES_PER_SECOND
            )
            self._live.start()

    @property
    def _is_on_screen(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _line(self) -> ProgressLine:
        assert self._progress is not None
        return ProgressLine(self._progress, self._remaining())

    def _remaining(self) -> float | None:
        """Ends with the steps or with trainer.max_time, whichever comes first."""
        assert self._progress is not None
        timers = [callback for callback in self.trainer.callbacks if isinstance(callback, Timer)]
        limits = [timer.time_remaining() for timer in timers] if self.trainer.training else []
        ends = [end for end in (self._progress.remaining_seconds, *limits) if end is not None]
        return max(0.0, min(ends)) if ends else None

    def _take_numbers(self, trainer: Trainer) -> None:
        assert self._progress is not None
        self._progress.numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._progress.rate = self._progress.numbers.get("throughput/tokens_per_second")

    def _note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note = printable(text)
            self._say_if_due()

    def _advance(self, completed: int) -> None:
        if self._progress is not None:
            self._progress.advance(completed)
            self._say_if_due()

    def _say_if_due(self) -> None:
        """Writes a line, after so much time, where no terminal shows it all along."""
        if self._live is None and self._every_n_seconds is not None and self._progress is not None:
            if time.monotonic() - self._said_at >= self._every_n_seconds:
                self._said_at = time.monotonic()
                self._say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self._progress.line(self._remaining())}")

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._progress = None

    def _say_validated(self, trainer: Trainer) -> None:
        step = f"step {trainer.global_step:,}:"
        losses = [name for name in trainer.callback_metrics if name.startswith("val/loss/")]
        line = f"{step} {_describe(trainer, 'train/loss', 'val/loss', 'val/ppl', 'val/bpb', 'val/share')}"
        rate = trainer.callback_metrics.get("throughput/tokens_per_second")
        rated = line if rate is None else f"{line}  {shortened(float(rate))} tok/s"
        self._say(rated if not self._is_on_screen or len(rated) <= self._console.width else line)
        if losses:
            self._say(f"  of each text: {_describe(trainer, *losses)}")

    def _say(self, line: str) -> None:
        if self._enabled and self.trainer.is_global_zero:
            self._console.print(printable(line), markup=False)


def _end(step: float, epochs: float) -> str:
    if step == float("inf"):
        return "the end of its time"
    if not epochs:  # of data without an end
        return f"step {step:,}"
    times = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    return f"step {step:,} ({times} epoch{'s' if times != '1' else ''})"


def _describe(trainer: Trainer, *names: str) -> str:
    metrics = trainer.callback_metrics
    values = {name: float(metrics[name]) for name in names if name in metrics}
    texts = {name: f"{name} {value:{',.0f' if value >= 1000 else '.4g'}}" for name, value in values.items()}
    if (share := values.get("val/share")) is not None:
        texts["val/share"] = f"(val: {part_of_text(share)})"
    return "  ".join(texts.values())


def _run_folder(trainer: Trainer) -> str:
    """Names the folder that a run has by the command line, or where its checkpoints go."""
    for callback in trainer.callbacks:
        if isinstance(callback, RunConfig):
            return str(callback.folder)
    saver: Any = trainer.checkpoint_callback
    return str(Path(getattr(saver, "dirpath", None) or trainer.default_root_dir))


def _devices(trainer: Trainer) -> str:
    """Says what it computes on, and in which precision."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"cpu with {threads} thread{'s' if threads != 1 else ''}"
    else:
        name = device.type
    times = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return f"{times}{name}, precision {trainer.precision}"
