"""The best by the monitored metric, and `last.ckpt` whatever the metric says."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint

pytestmark = pytest.mark.slow


class Scripted(pl.LightningModule):
    """Logs the given validation losses, one a validation."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.losses = iter(losses)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", next(self.losses))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    losses: list[float],
    max_steps: int = 8,
    trainer: dict[str, Any] | None = None,
    **checkpoint: Any,
) -> RunCheckpoint:
    callback = RunCheckpoint(dirpath=str(folder), **checkpoint)
    intervals = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fitting = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        **(trainer or intervals),
        num_sanity_val_steps=0,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    fitting.fit(Scripted(losses), DataLoader(torch.ones(100, 1)), DataLoader(torch.ones(1, 1)))
    return callback


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_the_best_is_judged_by_its_own_validation(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0, 2.0, 2.5])
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step000004.ckpt"]
    assert step_of(tmp_path / "step000004.ckpt") == 4


def test_last_is_the_newest_when_nothing_improves(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 2.0, 3.0, float("nan")])
    assert step_of(tmp_path / "last.ckpt") == 8
    assert step_of(tmp_path / "step000002.ckpt") == 2


def test_every_n_train_steps_does_not_judge_by_an_old_value(tmp_path: Path) -> None:
    callback = fit(tmp_path, [3.0, 1.0, 2.0, 2.5], every_n_train_steps=1)
    assert Path(callback.best_model_path).name == "step000004.ckpt"
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step000004.ckpt"]


def test_the_end_of_training_is_saved(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0, 2.0], max_steps=7)
    assert step_of(tmp_path / "last.ckpt") == 7


def test_without_a_metric_the_newest_are_kept(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 2.0, 3.0, 4.0], monitor=None, save_top_k=1, every_n_train_steps=3)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step000008.ckpt"]


def test_a_checkpoint_by_time_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    settings = {"limit_val_batches": 0, "accumulate_grad_batches": 3}
    checkpoint = {"monitor": None, "save_top_k": -1, "train_time_interval": timedelta(0)}
    fit(tmp_path, [], max_steps=4, trainer=settings, **checkpoint)
    paths = sorted(tmp_path.glob("step*.ckpt"))
    assert [step_of(path) for path in paths] == [1, 2, 3, 4]
    for path in paths:
        progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert progress["total"]["processed"] == 3 * step_of(path)


def test_no_checkpoint_stands_inside_an_optimizer_step(tmp_path: Path) -> None:
    # A tenth of an epoch is 10 batches, which is no whole number of steps of 3.
    settings = {"val_check_interval": 0.1, "accumulate_grad_batches": 3}
    fit(tmp_path, [1.0, 1.0, 1.0], max_steps=12, trainer=settings, save_top_k=-1)
    for path in tmp_path.glob("step*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert batches == 3 * checkpoint["global_step"]
    assert len(list(tmp_path.glob("step*.ckpt"))) == 3
