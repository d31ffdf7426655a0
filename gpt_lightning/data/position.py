"""Where training stands in the sample order, from Lightning's own count of batches.

Lightning restores its loop counters by itself, so this keeps no second count that could disagree: it
remembers the position in the checkpoint it came from, and counts Lightning's batches from there.
"""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from gpt_lightning.data.loader import BatchNumbers
from gpt_lightning.data.windows import batch_span, n_batches


@dataclass(frozen=True)
class EpochShape:
    """An epoch's windows, and how batches and optimizer steps take them; a resumed run may have another."""

    windows: int
    global_batch: int
    accumulate: int

    def batches(self, windows: int) -> int:
        return n_batches(windows, self.global_batch, self.accumulate)

    def position(self, start: int, batches: int) -> int:
        """Where the sample counter stands that many batches after `start`."""
        sizes = {"windows": self.windows, "global_batch": self.global_batch, "accumulate": self.accumulate}
        return batch_span(start, batches, **sizes)[0]


class TrainingOrder:
    """The position of one datamodule's training, and the batches left in its epoch."""

    def __init__(self, datamodule: LightningDataModule) -> None:
        self._datamodule = datamodule
        self._usual_reload: int | None = None
        self.first_sample = 0
        self._first_batch = 0
        self._first_epoch_batches = 0
        self._first_epoch_is_finished = False

    def start(self) -> None:
        """Begin anew with a trainer that has not seen what an earlier one restored."""
        if self._batches_trained() < self._first_batch:
            self.first_sample = self._first_batch = self._first_epoch_batches = 0
            self._first_epoch_is_finished = False

    def consumed_samples(self, shape: EpochShape) -> int:
        return shape.position(self.first_sample, self._batches_since_restored())

    def state_dict(self, shape: EpochShape) -> dict[str, int]:
        return {
            "consumed_samples": self.consumed_samples(shape),
            "batches": max(self._batches_trained(), self._first_batch),
            "epoch_batches": self._batches_of_epoch(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_sample = state_dict["consumed_samples"]
        self._first_batch = state_dict["batches"]
        self._first_epoch_batches = state_dict["epoch_batches"]
        self._first_epoch_is_finished = False

    def close_epoch_first(self) -> None:
        """Lightning resumes in an epoch that is finished but not closed: it is to find no batch left."""
        self._first_epoch_is_finished = True

    def batch_numbers(self, shape: EpochShape) -> BatchNumbers:
        """The rest of the epoch, numbered from the restored position."""
        first = self._batches_since_restored()
        if self._is_to_close_an_epoch():
            return BatchNumbers(range(first, first), self._batches_of_epoch())
        usual = shape.batches(shape.windows)
        within = self.consumed_samples(shape) % shape.windows
        if within == 0 or self._epochs_are_limited(usual):
            return BatchNumbers(range(first, first + usual), usual)
        left = shape.batches(shape.windows - within)
        return BatchNumbers(range(first, first + left), self._batches_of_epoch() + left)

    def keep_epoch_length_true(self, shape: EpochShape) -> None:
        """Have Lightning ask for the length again after an epoch resumed with another global batch."""
        trainer = self._trainer()
        if trainer is None:
            return
        if self.batch_numbers(shape).epoch_length != shape.batches(shape.windows):
            self._usual_reload = trainer.reload_dataloaders_every_n_epochs
            trainer.reload_dataloaders_every_n_epochs = 1
        elif self._usual_reload is not None:
            trainer.reload_dataloaders_every_n_epochs = self._usual_reload
            self._usual_reload = None

    def _trainer(self) -> Trainer | None:
        return self._datamodule.trainer

    def _batches_trained(self) -> int:
        """Over all epochs; `processed` is right in every hook in which a checkpoint is saved."""
        trainer = self._trainer()
        if trainer is None:
            return 0
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _batches_since_restored(self) -> int:
        # Lightning restores its counters after this state; until then it has trained on fewer.
        return max(0, self._batches_trained() - self._first_batch)

    def _batches_of_epoch(self) -> int:
        trainer = self._trainer()
        if trainer is None or self._batches_since_restored() == 0:
            return self._first_epoch_batches
        return trainer.fit_loop.epoch_loop.batch_progress.current.processed

    def _is_to_close_an_epoch(self) -> bool:
        """Until Lightning has asked for the batches of that epoch."""
        trainer = self._trainer()
        if trainer is None or not self._first_epoch_is_finished or self._batches_since_restored() > 0:
            return False
        batches = trainer.fit_loop.epoch_loop.batch_progress
        # Nothing is counted before the counters are restored, and in the epoch after that one.
        return batches.total.processed < self._first_batch or batches.current.ready > 0

    def _epochs_are_limited(self, usual: int) -> bool:
        """With limit_train_batches Lightning's epochs end anywhere in ours, and the order simply goes on."""
        trainer = self._trainer()
        limit = 1.0 if trainer is None else trainer.limit_train_batches
        return limit < (usual if isinstance(limit, int) else 1)
