"""The best by the monitored metric, and `last.ckpt` whatever the metric says."""

import os
import re
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import gpt_lightning.callbacks.run_checkpoint as run_checkpoint_module
import gpt_lightning.checkpoint.io as checkpoint_module
from gpt_lightning.callbacks.orderly_stop import Stopped
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.checkpoint.files import CheckpointWriteError, verify, write
from gpt_lightning.checkpoint.io import DurableCheckpointIO
from gpt_lightning.exit_codes import UserError

pytestmark = pytest.mark.slow


class Scripted(pl.LightningModule):
    """Logs the given validation losses, one a validation."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.losses = iter(losses)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", next(self.losses))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    losses: list[float],
    max_steps: int = 8,
    trainer: dict[str, Any] | None = None,
    others: list[pl.Callback] | None = None,
    resume_from: Path | None = None,
    plugin: Any = DurableCheckpointIO,
    **checkpoint: Any,
) -> RunCheckpoint:
    callback = RunCheckpoint(dirpath=str(folder), **checkpoint)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None} if trainer is None else trainer
    fitting = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        **{"logger": False, "num_sanity_val_steps": 0, **settings},
        callbacks=[callback, *(others or [])],
        plugins=[plugin()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = DataLoader(torch.ones(100, 1)), DataLoader(torch.ones(1, 1))
    fitting.fit(Scripted(losses), *data, ckpt_path=resume_from)
    return callback


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_the_best_is_judged_by_its_own_validation(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0, 2.0, 2.5])
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step000004.ckpt"]
    assert step_of(tmp_path / "step000004.ckpt") == 4


def test_it_is_judged_once_where_an_epoch_ends_with_a_validation(tmp_path: Path) -> None:
    settings = {"limit_train_batches": 3}
    fit(tmp_path, [3.0, 2.0, 1.0], max_steps=9, trainer=settings, save_top_k=2)
    assert names_in(tmp_path) == ["last.ckpt", "step000006.ckpt", "step000009.ckpt"]
    assert [step_of(path) for path in sorted(tmp_path.glob("step*.ckpt"))] == [6, 9]


def test_without_validations_the_best_are_judged_at_each_save(tmp_path: Path) -> None:
    """The loss of training goes down with every step, so that the last saves are the best."""
    settings = {"limit_val_batches": 0, "limit_train_batches": 2, "log_every_n_steps": 1}
    callback = fit(tmp_path, [], max_steps=7, trainer=settings, monitor="loss", save_top_k=3)
    assert names_in(tmp_path) == ["last.ckpt", "step000004.ckpt", "step000006.ckpt", "step000007.ckpt"]
    assert [step_of(path) for path in sorted(tmp_path.glob("step*.ckpt"))] == [4, 6, 7]
    assert Path(callback.best_model_path).name == "step000007.ckpt"


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


class Clock(pl.Callback):
    """On which a batch takes a second."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def on_train_batch_start(self, *args: Any) -> None:
        self.seconds += 1


def test_checkpoints_by_time_come_when_it_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(run_checkpoint_module, "time", clock)
    settings = {"limit_val_batches": 0, "accumulate_grad_batches": 2}
    checkpoint = {"monitor": None, "save_top_k": -1, "train_time_interval": timedelta(seconds=4.5)}
    fit(tmp_path, [], max_steps=10, trainer=settings, others=[clock], **checkpoint)
    steps = [step_of(path) for path in sorted(tmp_path.glob("step*.ckpt"))]
    assert steps == [3, 6, 9, 10]  # after 6, 12 and 18 seconds, and in the end


def test_no_checkpoint_stands_inside_an_optimizer_step(tmp_path: Path) -> None:
    # A tenth of an epoch is 10 batches, which is no whole number of steps of 3.
    settings = {"val_check_interval": 0.1, "accumulate_grad_batches": 3}
    fit(tmp_path, [1.0, 1.0, 1.0], max_steps=12, trainer=settings, save_top_k=-1)
    for path in tmp_path.glob("step*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert batches == 3 * checkpoint["global_step"]
    assert len(list(tmp_path.glob("step*.ckpt"))) == 3


def test_none_does_in_an_epoch_with_reloaded_data_either(tmp_path: Path) -> None:
    # Half an epoch is 10 batches, in the second as in the first.
    settings = {"val_check_interval": 0.5, "limit_train_batches": 21, "accumulate_grad_batches": 3}
    settings["reload_dataloaders_every_n_epochs"] = 1
    fit(tmp_path, [1.0] * 9, max_steps=14, trainer=settings, save_top_k=-1)
    assert names_in(tmp_path) == ["last.ckpt", "step000004.ckpt", "step000011.ckpt"]


def test_validation_may_go_by_the_clock(tmp_path: Path) -> None:
    settings = {"val_check_interval": timedelta(0), "check_val_every_n_epoch": None}
    fit(tmp_path, [3.0, 1.0, 2.0], max_steps=3, trainer=settings)
    assert names_in(tmp_path) == ["last.ckpt", "step000002.ckpt"]


NAN = float("nan")


@pytest.mark.parametrize(
    "losses, top_k, best, kept",
    [
        ([NAN, 5.0, NAN, 6.0], 1, 4, [4]),
        ([5.0, NAN, NAN, NAN], 1, 2, [2]),
        ([NAN, 7.0, 9.0, NAN], 2, 4, [4, 6]),  # a slot is NaN's only until something finite comes
        ([7.0, NAN, NAN, 8.0], 2, 2, [2, 8]),
        ([NAN, 3.0, 2.0, NAN], -1, 6, [2, 4, 6, 8]),
        ([NAN, 3.0, 2.0, NAN], 0, None, []),
    ],
)
@pytest.mark.parametrize("background", [True, False])
def test_the_best_is_a_finite_one(
    losses: list[float], top_k: int, best: int | None, kept: list[int], background: bool, tmp_path: Path
) -> None:
    callback = fit(tmp_path, losses, save_top_k=top_k, background=background)
    assert names_in(tmp_path) == ["last.ckpt", *(f"step{step:06d}.ckpt" for step in kept)]
    assert Path(callback.best_model_path).name == (f"step{best:06d}.ckpt" if best else "")
    assert step_of(tmp_path / "last.ckpt") == 8


def test_lightnings_own_plugin_serves_too(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0, 2.0, 0.5], plugin=TorchCheckpointIO)
    assert names_in(tmp_path) == ["last.ckpt", "step000008.ckpt"]


def test_without_last_only_the_best_are_written(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0, 2.0, 2.0], save_last=False)
    assert names_in(tmp_path) == ["step000004.ckpt"]


class Weights(pl.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.at: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.at[trainer.global_step] = pl_module.layer.weight.detach().clone()


def test_files_hold_the_weights_of_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training goes on: no write begins before the next step has changed the weights."""
    weights = Weights()

    def slow(checkpoint: dict[str, Any], path: Path) -> None:
        deadline = time.monotonic() + 5
        while checkpoint["global_step"] + 1 not in weights.at and time.monotonic() < deadline:
            if checkpoint["global_step"] == 6:
                break
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_module, "write", slow)
    fit(tmp_path, [3.0, 2.0, 1.0], max_steps=6, others=[weights], save_top_k=-1)
    assert len(names_in(tmp_path)) == 4
    for path in tmp_path.glob("*.ckpt"):
        verify(path)
        checkpoint = torch.load(path, weights_only=True)
        assert torch.equal(checkpoint["state_dict"]["layer.weight"], weights.at[checkpoint["global_step"]])


class Uploader(Logger):
    """Reads, when it is told of a checkpoint, the files that it is told of; notes the steps they are of."""

    name, version = "uploader", 0

    def __init__(self) -> None:
        self.heard: list[dict[str, int]] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        paths = map(Path, (checkpoint_callback.last_model_path, *checkpoint_callback.best_k_models))
        self.heard.append({path.name: step_of(path) for path in paths})


class Raises(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError


VALIDATED = {"val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.parametrize("background", [True, False])
def test_loggers_hear_of_a_checkpoint_when_its_files_are_whole(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, weights = Uploader(), Weights()

    def slow(checkpoint: dict[str, Any], path: Path) -> None:
        deadline = time.monotonic() + 5
        while background and checkpoint["global_step"] + 1 not in weights.at and time.monotonic() < deadline:
            if checkpoint["global_step"] == 6:
                break
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_module, "write", slow)
    settings = {**VALIDATED, "logger": logger}
    fit(tmp_path, [3.0, 4.0, 1.0], 6, settings, [weights], background=background)
    best = {"step000002.ckpt": 2}
    heard = [{"last.ckpt": 2, **best}, {"last.ckpt": 4, **best}, {"last.ckpt": 6, **best}]
    assert logger.heard == [*heard, {"last.ckpt": 6, "step000006.ckpt": 6}]  # the last step's, and its best


def test_loggers_do_not_hear_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_from_step_4_on(checkpoint: dict[str, Any], path: Path) -> None:
        if checkpoint["global_step"] >= 4:
            raise CheckpointWriteError(f"{path} cannot be written")
        write(checkpoint, path)

    logger = Uploader()
    monkeypatch.setattr(checkpoint_module, "write", full_from_step_4_on)
    with pytest.raises(CheckpointWriteError):
        fit(tmp_path, [3.0, 2.0, 1.0], 6, {**VALIDATED, "logger": logger})
    assert logger.heard == [{"last.ckpt": 2, "step000002.ckpt": 2}]


def test_loggers_hear_of_what_was_being_written_when_a_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, failed = Uploader(), threading.Event()

    class Watch(pl.Callback):
        def on_exception(self, *args: Any) -> None:
            failed.set()

    def slow(checkpoint: dict[str, Any], path: Path) -> None:
        assert failed.wait(timeout=5)
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_module, "write", slow)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [3.0], 6, {**VALIDATED, "logger": logger}, [Raises(), Watch()])
    assert logger.heard == [{"last.ckpt": 2, "step000002.ckpt": 2}]


def test_a_failed_write_ends_the_run_and_costs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_from_step_6_on(checkpoint: dict[str, Any], path: Path) -> None:
        if checkpoint["global_step"] >= 6:
            raise CheckpointWriteError(f"{path} cannot be written")
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_module, "write", full_from_step_6_on)
    with pytest.raises(CheckpointWriteError, match="step000006.ckpt cannot be written"):
        fit(tmp_path, [4.0, 3.0, 2.0, 1.0], max_steps=8)
    assert [step_of(path) for path in sorted(tmp_path.glob("*.ckpt"))] == [4, 4]
    assert names_in(tmp_path) == ["last.ckpt", "step000004.ckpt"]


class AskingToStop(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.should_stop = True


@pytest.mark.parametrize("batch, step", [(4, 2), (5, 2), (6, 2), (7, 3)])
def test_a_stop_waits_for_the_end_of_the_step(batch: int, step: int, tmp_path: Path) -> None:
    settings = {"limit_val_batches": 0, "accumulate_grad_batches": 3}
    fit(tmp_path, [], trainer=settings, others=[AskingToStop(batch)])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["processed"] == 3 * step
    # As in any checkpoint at a batch's end: the loop has not gone on to what comes after it.
    assert progress["completed"] == 3 * step - 1


def test_the_last_step_is_saved_as_any_other(tmp_path: Path) -> None:
    settings = {"limit_val_batches": 0}
    fit(tmp_path / "short", [], max_steps=4, trainer=settings)
    every_4 = {"every_n_train_steps": 4, "monitor": None, "save_top_k": -1}
    fit(tmp_path / "long", [], max_steps=6, trainer=settings, **every_4)
    short, long = (
        torch.load(path, weights_only=True)["loops"]["fit_loop"]
        for path in (tmp_path / "short" / "last.ckpt", tmp_path / "long" / "step000004.ckpt")
    )
    assert short == long


class SavingNow(pl.Callback):
    def __init__(self) -> None:
        self.written: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        callback = trainer.checkpoint_callback
        if trainer.global_step in (3, 4):
            for _ in range(2):
                callback.save_now(trainer)
            path = Path(callback.last_model_path)
            assert step_of(path) == trainer.global_step
            self.written.append(path.stat().st_ino)


def test_save_now_is_safe_at_once_and_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def counting(checkpoint: dict[str, Any], path: Path) -> None:
        written.append(checkpoint["global_step"])
        write(checkpoint, path)

    monkeypatch.setattr(checkpoint_module, "write", counting)
    settings = {"limit_val_batches": 0}
    fit(tmp_path, [], max_steps=5, trainer=settings, others=[SavingNow()], every_n_train_steps=4)
    assert written == [3, 4, 5]


class StoppedWhileValidating(pl.Callback):
    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.checkpoint_callback.save_now(trainer)
        raise Stopped("by a signal", 0)


@pytest.mark.parametrize("save_top_k", [0, 1])
def test_save_now_writes_last_also_where_no_other_save_does(save_top_k: int, tmp_path: Path) -> None:
    others = [SavingNow()]
    callback = fit(tmp_path, [1.0, 2.0], 4, others=others, save_last=False, save_top_k=save_top_k)
    assert len(others[0].written) == 2
    assert callback.last_model_path == str(tmp_path / "last.ckpt") and step_of(tmp_path / "last.ckpt") == 4


def test_a_run_stopped_while_its_first_weights_are_tried_goes_on(tmp_path: Path) -> None:
    settings = {"num_sanity_val_steps": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    with pytest.raises(Stopped):
        fit(tmp_path, [9.0], trainer=settings, others=[StoppedWhileValidating()])
    assert step_of(tmp_path / "last.ckpt") == 0
    fit(tmp_path, [9.0, 3.0, 1.0], 4, trainer=settings, resume_from=tmp_path / "last.ckpt")
    assert names_in(tmp_path) == ["last.ckpt", "step000004.ckpt"]


def test_a_moved_run_knows_its_best(tmp_path: Path) -> None:
    fit(tmp_path / "old", [3.0, 1.0], max_steps=4)
    (tmp_path / "old").rename(tmp_path / "new")
    callback = fit(tmp_path / "new", [2.0, 0.5], resume_from=tmp_path / "new" / "last.ckpt")
    assert names_in(tmp_path / "new") == ["last.ckpt", "step000008.ckpt"]
    assert callback.best_model_path == str(tmp_path / "new" / "step000008.ckpt")


def test_a_run_in_a_new_folder_leaves_the_old_one_alone(tmp_path: Path) -> None:
    fit(tmp_path / "one", [3.0, 1.0], max_steps=4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.ckpt")}
    callback = fit(tmp_path / "two", [2.0, 1.5], resume_from=tmp_path / "one" / "last.ckpt")
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.ckpt")} == before
    assert names_in(tmp_path / "two") == ["last.ckpt", "step000008.ckpt"]  # the best of this folder
    assert float(callback.best_model_score) == 1.5


def test_a_run_that_keeps_no_best_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, [3.0], max_steps=2, save_top_k=0)
    fit(tmp_path, [2.0], max_steps=4, save_top_k=0, resume_from=tmp_path / "last.ckpt")
    assert names_in(tmp_path) == ["last.ckpt"] and step_of(tmp_path / "last.ckpt") == 4


@pytest.fixture
def precious(tmp_path: Path) -> list[Path]:
    """What lies in and around a run's folder and is none of its checkpoints, in every disguise."""
    run = tmp_path / "run"
    run.mkdir()
    things = [tmp_path / "precious", run / "notes", run / "logs.ckpt", tmp_path / "fake.ckpt"]
    for folder in things:
        folder.mkdir()
        (folder / "thesis.txt").write_text("years")
    (tmp_path / "fake.ckpt" / "rest.pt").touch()
    (run / "mixed.ckpt").mkdir()
    for name in ("rest.pt", ".metadata", "thesis.txt"):
        (run / "mixed.ckpt" / name).write_text("years")
    (run / "readme.txt").write_text("years")
    write({"step": 1}, tmp_path / "other.ckpt")
    (run / "folder_link.ckpt").symlink_to(tmp_path / "precious")
    (run / "file_link.ckpt").symlink_to(tmp_path / "other.ckpt")
    (run / "up").symlink_to(tmp_path)
    return [path for path in tmp_path.rglob("*")]


OUTSIDE = [
    *("../precious", "notes", "logs.ckpt", "mixed.ckpt", "readme.txt", "../other.ckpt", "../fake.ckpt", ".."),
    *("folder_link.ckpt", "file_link.ckpt", "up/other.ckpt", "up/precious", "notes/../../other.ckpt", ""),
    *("last.ckpt", "absolute"),
]


@pytest.mark.parametrize("field", ["best_k_models", "best_model_path", "kth_best_model_path", "everything"])
@pytest.mark.parametrize(  # where both are Lightning's, nothing of this program takes part
    "own, plugin", [(True, DurableCheckpointIO), (True, TorchCheckpointIO), (False, DurableCheckpointIO)]
)
def test_a_file_does_not_say_what_is_deleted(
    own: bool, plugin: Any, field: str, tmp_path: Path, precious: list[Path]
) -> None:
    run, settings = tmp_path / "run", {"val_check_interval": 1, "check_val_every_n_epoch": None}
    paths = [str(tmp_path / "precious") if name == "absolute" else f"{run}/{name}" for name in OUTSIDE]
    own_best = {"save_top_k": len(paths)} if own else {}

    def others() -> list[pl.Callback]:
        saver = ModelCheckpoint(run, monitor="val/loss", filename="{step}", save_top_k=len(paths))
        return [] if own else [saver]

    fit(run, [3.0], max_steps=1, trainer=settings, others=others(), **own_best)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    for key, state in checkpoint["callbacks"].items():
        if "best_k_models" in state and key.startswith("RunCheckpoint") == own:
            if field in ("best_k_models", "everything"):
                state["best_k_models"] = {path: 1e9 + number for number, path in enumerate(paths)}
            if field != "best_k_models":
                state |= {"kth_best_model_path": paths[0], "kth_value": torch.tensor(1e9)}
                state |= {"best_model_path": paths[0], "best_model_score": torch.tensor(1e9)}
            if field == "everything":
                state |= {"last_model_path": paths[0], "current_score": 1e9, "monitor": paths[0]}
    write(checkpoint, run / "last.ckpt")
    losses = [1 / step for step in range(1, 24)]
    resumed = {"resume_from": run / "last.ckpt", "plugin": plugin, **own_best}
    callback = fit(run, losses, 24, trainer=settings, others=others(), **resumed)
    assert all(os.path.lexists(path) for path in precious)
    assert step_of(run / "last.ckpt") == 24 and Path(callback.last_model_path) == run / "last.ckpt"
    assert {Path(path).parent for path in callback.best_k_models} == {run}
    assert Path(callback.best_model_path).name == "step000024.ckpt"


@pytest.mark.parametrize("filename", ["../{step}", "best/{step}", "/tmp/x"])
def test_a_file_name_leads_nowhere_else(filename: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint.filename={re.escape(filename)} leads into another"):
        RunCheckpoint("run", filename=filename)
    RunCheckpoint("run", filename="{val/loss:.3f}-{step}")


def test_a_best_that_somebody_removed_does_not_count(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0], max_steps=4)
    (tmp_path / "step000004.ckpt").unlink()
    fit(tmp_path, [2.0, 2.5], resume_from=tmp_path / "last.ckpt")
    assert names_in(tmp_path) == ["last.ckpt", "step000006.ckpt"]


class ReadingCurves(pl.Callback):
    """What stands in the events file right after the step that was saved."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.seen: list[int] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            events = EventAccumulator(str(self.folder)).Reload()
            self.seen = [event.step for event in events.Scalars("loss")]


def test_curves_reach_as_far_as_the_checkpoint(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="logs", version="")
    reading = ReadingCurves(tmp_path / "logs", step=4)
    settings = {"limit_val_batches": 0, "logger": logger, "log_every_n_steps": 1}
    fit(tmp_path, [], max_steps=6, trainer=settings, others=[reading], every_n_train_steps=4)
    assert reading.seen == [0, 1, 2, 3]  # Lightning counts from 0
