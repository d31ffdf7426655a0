"""Tokens a second by a clock that the test moves: steps and waiting for data count, the rest does not."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from gpt_lightning.callbacks import throughput
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.data.batches import TokenBatch

pytestmark = pytest.mark.slow


class Clock:
    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Timed(pl.LightningModule):
    """A step takes 2 s, waiting for its batch 1 s, a validation 1000 s, a checkpoint 500 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.clock = clock

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        self.clock.seconds += 2
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.clock.seconds += 1000

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.seconds += 500

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches(torch.utils.data.Dataset):
    def __init__(self, clock: Clock, scored: int) -> None:
        self.clock = clock
        self.scored = scored

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> TokenBatch:
        self.clock.seconds += 1
        targets = torch.full((2, 8), -100)
        targets.view(-1)[: self.scored] = 1
        return TokenBatch(torch.ones(2, 8, dtype=torch.long), targets, None)


class Record(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if "throughput/tokens_per_second" in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics["throughput/tokens_per_second"]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_and_saving_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    clock, record = Clock(), Record()
    monkeypatch.setattr(throughput, "time", clock)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=9,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        callbacks=[Throughput(), record, pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training, validation = (DataLoader(Batches(clock, 12), batch_size=None) for _ in range(2))
    trainer.limit_val_batches = 1
    trainer.fit(Timed(clock), training, validation)
    # 12 scored tokens in 2 s, or in 3 s where the wait for the batch was not behind a validation or a save.
    assert record.values
    assert all(12 / 3 <= value <= 12 / 2 for value in record.values), record.values
    assert len(set(record.values)) <= 4
