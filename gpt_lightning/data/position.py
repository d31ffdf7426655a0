"""Tells where training stands in the sample order, from Lightning's own count of batches.

Lightning restores its loop counters by itself, so this keeps no second count that could disagree: it
remembers the position in the checkpoint it came from, and counts Lightning's batches from there.
"""

from typing import NamedTuple

from lightning.pytorch import LightningDataModule

from gpt_lightning.data.loader import EpochBatches
from gpt_lightning.data.windows import Epochs


class Position(NamedTuple):
    """Counts what was trained on: windows over all ranks and epochs, batches, and those of this epoch."""

    consumed_samples: int = 0
    batches: int = 0
    epoch_batches: int = 0


class TrainingOrder:
    """Tells one datamodule's position in training, and the batches left in its epoch."""

    def __init__(self, datamodule: LightningDataModule) -> None:
        self._datamodule = datamodule
        self._epochs: Epochs | None = None
        self._usual_reload: int | None = None
        self.restored = Position()
        self._first_epoch_is_finished = False

    def start(self) -> None:
        """Begins anew with a trainer that has not seen what an earlier one restored."""
        trainer = self._datamodule.trainer
        total = 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if total < self.restored.batches:
            self.restore(Position())

    def restore(self, position: Position) -> None:
        """Goes on at a checkpoint's position."""
        self.restored = position
        self._first_epoch_is_finished = False

    def close_epoch_first(self) -> None:
        """Has Lightning, which resumes in an epoch that is finished but not closed, find no batch left."""
        self._first_epoch_is_finished = True

    def position(self) -> Position:
        trainer = self._datamodule.trainer
        if trainer is None or self._epochs is None:
            return self.restored
        batches = trainer.fit_loop.epoch_loop.batch_progress
        # `processed` is right in every hook in which a checkpoint is saved. Lightning restores its counters
        # after this position; until then it has trained on fewer.
        since_restored = batches.total.processed - self.restored.batches
        if since_restored <= 0:
            return self.restored
        consumed_samples = self._epochs.span(since_restored)[0]
        return Position(consumed_samples, batches.total.processed, batches.current.processed)

    def take_epochs(self, epochs: Epochs) -> None:
        """Counts by these; Lightning is to ask again for the length after an epoch resumed otherwise."""
        self._epochs = epochs
        trainer = self._datamodule.trainer
        if trainer is None:
            return
        if self.batches().epoch_length != epochs.epoch_batches:
            self._usual_reload = trainer.reload_dataloaders_every_n_epochs
            trainer.reload_dataloaders_every_n_epochs = 1
        elif self._usual_reload is not None:
            trainer.reload_dataloaders_every_n_epochs = self._usual_reload
            self._usual_reload = None

    def batches(self) -> EpochBatches:
        """Tells the rest of the epoch, numbered from the restored position."""
        numbers, length = self._numbers()
        trainer = self._datamodule.trainer
        if trainer is None:
            return EpochBatches(numbers, length)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return EpochBatches(
            numbers, length, done, trainer.accumulate_grad_batches, trainer.num_training_batches
        )

    def _numbers(self) -> tuple[range, int]:
        position, epochs, trainer = self.position(), self._epochs, self._datamodule.trainer
        assert epochs is not None
        usual = epochs.epoch_batches
        if trainer is not None and trainer.overfit_batches:
            return range(usual), usual
        first = position.batches - self.restored.batches
        if first == 0 and self._is_to_close_an_epoch():
            return range(0), position.epoch_batches
        within = position.consumed_samples % epochs.windows
        if within == 0 or self._epochs_are_limited(usual):
            return range(first, first + usual), usual
        left = epochs.n_batches(epochs.windows - within)
        return range(first, first + left), position.epoch_batches + left

    def _is_to_close_an_epoch(self) -> bool:
        """Holds until Lightning has asked for the batches of that epoch."""
        if not self._first_epoch_is_finished or self._datamodule.trainer is None:
            return False
        batches = self._datamodule.trainer.fit_loop.epoch_loop.batch_progress
        # Nothing is counted before the counters are restored, and in the epoch after that one.
        return batches.total.processed < self.restored.batches or batches.current.ready > 0

    def _epochs_are_limited(self, usual: int) -> bool:
        """Tells whether limit_train_batches ends Lightning's epochs in ours, while the order goes on."""
        trainer = self._datamodule.trainer
        limit = 1.0 if trainer is None else trainer.limit_train_batches
        return limit < (usual if isinstance(limit, int) else 1)
