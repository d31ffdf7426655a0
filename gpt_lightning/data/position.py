"""Tells where training stands in the sample order, from Lightning's own count of batches.

Lightning restores its loop counters by itself, so this keeps no second count that could disagree: it
remembers the position in the checkpoint it came from, and counts Lightning's batches from there.
"""

from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule, Trainer

from gpt_lightning.data.loader import EpochBatches
from gpt_lightning.data.windows import SampleOrder


class Position(NamedTuple):
    """Counts what was trained on: windows over all ranks and epochs, batches, and those of this epoch."""

    consumed_samples: int = 0
    batches: int = 0
    epoch_batches: int = 0


class TrainingOrder:
    """Tells one datamodule's position in training, and the batches left in its epoch."""

    def __init__(self, datamodule: LightningDataModule) -> None:
        self._datamodule = datamodule
        self._epochs: SampleOrder | None = None
        self._usual_reload: int | None = None
        self.restored = Position()
        self._first_epoch_is_finished = False

    def start(self) -> None:
        """Begins anew with a trainer that has not seen what an earlier one restored."""
        if self._datamodule.trainer is None or self._counted.total.processed < self.restored.batches:
            self.restore(Position())

    def restore(self, position: Position) -> None:
        """Goes on at a checkpoint's position."""
        self.restored = position
        self._first_epoch_is_finished = False

    def close_epoch_first(self) -> None:
        """Has Lightning, which resumes in an epoch that is finished but not closed, find no batch left."""
        self._first_epoch_is_finished = True

    def position(self) -> Position:
        if self._datamodule.trainer is None or self._epochs is None:
            return self.restored
        batches = self._counted
        # `processed` is right in every hook in which a checkpoint is saved. Lightning restores its counters
        # after this position; until then it has trained on fewer.
        since_restored = batches.total.processed - self.restored.batches
        if since_restored <= 0:
            return self.restored
        consumed_samples = self._epochs.span(since_restored)[0]
        return Position(consumed_samples, batches.total.processed, batches.current.processed)

    def reached(self) -> int:
        """Counts the windows trained on with those of the batch that is under way."""
        if self._datamodule.trainer is None or self._epochs is None:
            return self.restored.consumed_samples
        return self._epochs.span(max(0, self._counted.total.ready - self.restored.batches))[0]

    def take_epochs(self, epochs: SampleOrder) -> None:
        """Counts by these; Lightning is to ask again for the length after an epoch resumed otherwise."""
        self._epochs = epochs
        if self.batches().epoch_length != epochs.epoch_batches:
            self._usual_reload = self._trainer.reload_dataloaders_every_n_epochs
            self._trainer.reload_dataloaders_every_n_epochs = 1
        elif self._usual_reload is not None:
            self._trainer.reload_dataloaders_every_n_epochs = self._usual_reload
            self._usual_reload = None

    def batches(self) -> EpochBatches:
        """Tells the rest of the epoch, numbered from the restored position."""
        numbers, length = self._numbers()
        done, trainer = self._counted.current.ready, self._trainer
        return EpochBatches(
            numbers, length, done, trainer.accumulate_grad_batches, trainer.num_training_batches
        )

    def _numbers(self) -> tuple[range, int]:
        position, epochs, limit = self.position(), self._epochs, self._trainer.limit_train_batches
        assert epochs is not None
        usual = epochs.epoch_batches
        if self._trainer.overfit_batches:
            return range(usual), usual
        first = position.batches - self.restored.batches
        if first == 0 and self._is_to_close_an_epoch():
            return range(0), position.epoch_batches
        within = position.consumed_samples % epochs.windows
        # A limit ends Lightning's epochs in ours, while the order goes on.
        if within == 0 or limit < (usual if isinstance(limit, int) else 1):
            return range(first, first + usual), usual
        left = epochs.n_batches(epochs.windows - within)
        return range(first, first + left), position.epoch_batches + left

    def _is_to_close_an_epoch(self) -> bool:
        """Holds until Lightning has asked for the batches of that epoch."""
        # Nothing is counted before the counters are restored, and in the epoch after that one.
        is_counted = self._counted.total.processed >= self.restored.batches
        return self._first_epoch_is_finished and (not is_counted or self._counted.current.ready > 0)

    @property
    def _trainer(self) -> Trainer:
        assert self._datamodule.trainer is not None
        return self._datamodule.trainer

    @property
    def _counted(self) -> Any:
        """Holds Lightning's counts of batches: `total` and `current`, those of this epoch."""
        return self._trainer.fit_loop.epoch_loop.batch_progress
