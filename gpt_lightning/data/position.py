"""Tells where training stands in the sample order, from Lightning's own count of batches.

Lightning restores its loop counters by itself, so this keeps no second count that could disagree: it
remembers the position in the checkpoint it came from, and counts Lightning's batches from there.
"""

from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule

from gpt_lightning.data.loader import BatchNumbers
from gpt_lightning.data.windows import Epochs


class TrainingOrder:
    """Tells one datamodule's position in training, and the batches left in its epoch and optimizer step."""

    def __init__(self, datamodule: LightningDataModule) -> None:
        self._datamodule = datamodule
        self._usual_reload: int | None = None
        self.first_sample = 0
        self._first_batch = 0
        self._first_epoch_batches = 0
        self._first_epoch_is_finished = False

    def start(self) -> None:
        """Begins anew with a trainer that has not seen what an earlier one restored."""
        if self._counts().total < self._first_batch:
            self.first_sample = self._first_batch = self._first_epoch_batches = 0
            self._first_epoch_is_finished = False

    def consumed_samples(self, epochs: Epochs) -> int:
        """Counts the windows that were trained on, over all ranks and epochs: the position."""
        return epochs.span(self.first_sample, self._counts().since_restored)[0]

    def state_dict(self, epochs: Epochs) -> dict[str, int]:
        counts = self._counts()
        return {
            "consumed_samples": self.consumed_samples(epochs),
            "batches": self._first_batch + counts.since_restored,
            "epoch_batches": counts.of_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_sample = state_dict["consumed_samples"]
        self._first_batch = state_dict["batches"]
        self._first_epoch_batches = state_dict["epoch_batches"]
        self._first_epoch_is_finished = False

    def close_epoch_first(self) -> None:
        """Leaves no batch in the epoch that Lightning resumes, since it is finished but not closed."""
        self._first_epoch_is_finished = True

    def batch_numbers(self, epochs: Epochs) -> BatchNumbers:
        """Numbers the rest of the epoch from the restored position."""
        counts = self._counts()
        first, of_epoch = counts.since_restored, counts.of_epoch
        if self._is_to_close_an_epoch():
            return BatchNumbers(range(first, first), of_epoch)
        usual = epochs.n_batches(epochs.windows)
        within = self.consumed_samples(epochs) % epochs.windows
        if within == 0 or self._epochs_are_limited(usual):
            return BatchNumbers(range(first, first + usual), usual)
        left = epochs.n_batches(epochs.windows - within)
        return BatchNumbers(range(first, first + left), of_epoch + left)

    def rest_of_step(self) -> tuple[bool, range]:
        """Tells whether the next batch begins an optimizer step, and the step's batches from this one on.

        Lightning steps after `accumulate_grad_batches` batches of an epoch, and after its last.
        """
        trainer = self._datamodule.trainer
        assert trainer is not None
        batches = trainer.fit_loop.epoch_loop.batch_progress
        ready = batches.current.ready
        accumulate, of_epoch = trainer.accumulate_grad_batches, int(trainer.num_training_batches)
        left = accumulate - ready % accumulate
        if ready < of_epoch:  # else Lightning resumes in an epoch that is finished, and goes on with it
            left = min(left, of_epoch - ready)
        # With overfit_batches Lightning has each epoch begin with batch 0.
        first = ready if trainer.overfit_batches else batches.total.processed - self._first_batch
        return ready % accumulate == 0, range(first, first + left)

    def keep_epoch_length_true(self, epochs: Epochs) -> None:
        """Has Lightning ask for the length again after an epoch resumed with another global batch."""
        trainer = self._datamodule.trainer
        if trainer is None:
            return
        if self.batch_numbers(epochs).epoch_length != epochs.n_batches(epochs.windows):
            self._usual_reload = trainer.reload_dataloaders_every_n_epochs
            trainer.reload_dataloaders_every_n_epochs = 1
        elif self._usual_reload is not None:
            trainer.reload_dataloaders_every_n_epochs = self._usual_reload
            self._usual_reload = None

    def _counts(self) -> "_Counts":
        trainer = self._datamodule.trainer
        if trainer is None:
            return _Counts(0, 0, self._first_epoch_batches, 0)
        batches = trainer.fit_loop.epoch_loop.batch_progress
        # `processed` is right in every hook in which a checkpoint is saved. Lightning restores its counters
        # after this state; until then it has trained on fewer.
        since = max(0, batches.total.processed - self._first_batch)
        of_epoch = batches.current.processed if since else self._first_epoch_batches
        return _Counts(batches.total.processed, since, of_epoch, batches.current.ready)

    def _is_to_close_an_epoch(self) -> bool:
        """Tells whether there is an epoch to close, whose batches Lightning has not asked for yet."""
        counts = self._counts()
        if not self._first_epoch_is_finished or counts.since_restored:
            return False
        # Nothing is counted before the counters are restored, and in the epoch after that one.
        return counts.total < self._first_batch or counts.ready > 0

    def _epochs_are_limited(self, usual: int) -> bool:
        """Tells whether limit_train_batches ends Lightning's epochs inside ours; the order simply goes on."""
        trainer = self._datamodule.trainer
        limit = 1.0 if trainer is None else trainer.limit_train_batches
        return limit < (usual if isinstance(limit, int) else 1)


class _Counts(NamedTuple):
    """Counts the batches trained, and (`ready`) those of Lightning's epoch that were begun."""

    total: int
    since_restored: int
    of_epoch: int
    ready: int
