"""What a run did, written down step by step: the sample ids, the loss's bits and the learning rate."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer


class Trace(Callback):
    """Appends a line a micro-batch and a line a validation to `<path>.<rank>`, each in one write.

    A killed run leaves whole lines; a resumed one appends its own.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def _write(self, trainer: Any, row: dict[str, Any]) -> None:
        descriptor = os.open(f"{self.path}.{trainer.global_rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(row) + "\n").encode())
        os.close(descriptor)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total = trainer.fit_loop.epoch_loop.batch_progress.total
        self._write(
            trainer,
            {
                "at": f"batch {total.ready}",
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "samples": batch.sample_ids.tolist(),
                "text": hashlib.sha256(batch.targets.numpy().tobytes()).hexdigest()[:16],
                "loss": float(outputs["loss"]).hex(),
                "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
            },
        )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val/loss"]).hex()
            self._write(trainer, {"at": f"validation {trainer.global_step}", "loss": loss})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # Of an epoch that ends by itself: where the steps are over, a resumed run has nothing more to end.
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == trainer.num_training_batches:
            self._write(trainer, {"at": f"epoch end {trainer.current_epoch}", "step": trainer.global_step})


def read_trace(path: Path, rank: int = 0) -> list[dict[str, Any]]:
    file = Path(f"{path}.{rank}")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def differences(path: Path, whole: Path, rank: int = 0) -> list[str]:
    """How a killed and resumed run's trace differs from that of the run that was never killed.

    Steps between the last checkpoint and a kill are done twice; both times must be as in the whole run.
    """
    expected = {row["at"]: row for row in read_trace(whole, rank)}
    found = read_trace(path, rank)
    wrong = [f"{row} instead of {expected.get(row['at'])}" for row in found if row != expected.get(row["at"])]
    missing = expected.keys() - {row["at"] for row in found}
    return wrong + [f"{at} is missing" for at in sorted(missing)]


class KillAt(Callback):
    """Kills its own process at a moment, such as `batch_end 7` or `validation_start 10`, as kill -9 does."""

    def __init__(self, moment: str, saved_first: bool = False) -> None:
        self.moment = moment
        self.saved_first = saved_first  # wait until the checkpoint of the step is on disk

    def _reached(self, trainer: Any, moment: str) -> None:
        if f"{moment} {trainer.global_step}" == self.moment and not trainer.sanity_checking:
            if self.saved_first:
                trainer.strategy.checkpoint_io.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._reached(trainer, "batch_end")

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        self._reached(trainer, "validation_start")

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self._reached(trainer, "in_validation")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self._reached(trainer, "epoch_end")


class SignalAt(Callback):
    """Sends its own process a signal at the start of a micro-batch or of a validation, on one rank."""

    def __init__(
        self, moment: str, name: str, rank: int = 0, times: int = 1, workers_too: bool = False
    ) -> None:
        self.moment, self.name, self.rank = moment, name, rank
        self.times, self.workers_too = times, workers_too

    def _reached(self, trainer: Any, moment: str) -> None:
        if moment != self.moment or trainer.global_rank != self.rank:
            return
        workers = [child.pid for child in multiprocessing.active_children()] if self.workers_too else []
        for process in [*workers, *[os.getpid()] * self.times]:
            os.kill(process, getattr(signal, self.name))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._reached(trainer, f"batch {trainer.fit_loop.epoch_loop.batch_progress.total.ready}")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._reached(trainer, f"validation {trainer.global_step}")


class FileSizeLimit(Callback):
    """From the start of training on no file may be larger, as under a quota."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n_bytes, self.n_bytes))


class FullDisk(Callback):
    """Fills the disk that `folder` lies on when the first batch comes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, *args: Any) -> None:
        with suppress(OSError), open(f"{self.folder}/filler", "xb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)


class TimeIsOver(Timer):
    """As with --trainer.max_time, at a micro-batch that can be foreseen."""

    def __init__(self, batch: int) -> None:
        super().__init__(timedelta(days=1))
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            self._duration = 0.0
        super().on_train_batch_end(trainer, *args, **kwargs)


class Poison(Callback):
    """Makes the loss or the gradient of some optimizer steps NaN or infinite, on one rank."""

    def __init__(self, steps: list[int], what: str = "loss", value: str = "nan", rank: int = 0) -> None:
        self.steps, self.what, self.value, self.rank = steps, what, float(value), rank
        self._poisoned = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            if not self._poisoned:
                return output
            if self.what == "gradient":
                output.register_hook(lambda gradient: gradient * self.value)
                return output
            return output * self.value

        pl_module.model.ln_f.register_forward_hook(spoil)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._poisoned = trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._poisoned = False
