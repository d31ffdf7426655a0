"""From a checkpoint of any moment the run goes on as if it had never ended: bits, validations, epochs."""

import hashlib
import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from gpt_lightning.callbacks.exact_resume import ExactResume
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig
from tests.conftest import write_corpus
from tests.faults.trace import Trace, read_trace

SEQ_LEN = 64
STEPS = (2, 3, 4, 5, 6, 8)  # in an epoch, where "by steps" validates, an epoch's last, its next, the last
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


class SaveEverywhere(pl.Callback):
    """A checkpoint in every hook between steps, with how much of the trace was written by then."""

    def __init__(self, folder: Path, trace: Trace) -> None:
        self.folder, self.trace = folder, trace
        self.saved: dict[str, int] = {}

    def save(self, trainer: Any, hook: str) -> None:
        trained = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        accumulated = trained % trainer.accumulate_grad_batches
        if trainer.sanity_checking or accumulated or trainer.global_step not in STEPS:
            return
        name = f"{hook}-{trainer.global_step}.ckpt"
        if name not in self.saved:
            trainer.save_checkpoint(self.folder / name)
            self.saved[name] = len(read_trace(Path(self.trace.path)))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "batch_end")

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "in_validation")

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "epoch_end")


class Draws(pl.Callback):
    """Draws from every global stream, as augmentations do, and lets the weights depend on it."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        noise = random.random() + np.random.random() + float(torch.rand(()))
        with torch.no_grad():
            pl_module.model.ln_f.bias += 1e-3 * noise


def fit(
    corpus: Path, folder: Path, name: str, *callbacks: Any, ckpt_path: Path | None = None, **options: Any
) -> str:
    """Runs, writes the trace `folder/name`, and returns the hash of the final weights."""
    accumulate = options.pop("accumulate_grad_batches", 1)
    schedule = options.pop("schedule", ScheduleConfig(warmup_steps=3))
    optimizer = options.pop("optimizer", OptimizerConfig(learning_rate=0.01))
    averages = [pl.callbacks.EMAWeightAveraging(decay=0.8)] if options.pop("averaged", False) else []
    data = TextDataModule(
        train_files=str(corpus),
        tokenizer="bytes",
        seq_len=SEQ_LEN,
        batch_size=options.pop("batch_size", 36),
        num_workers=options.pop("num_workers", 0),
        cache_dir=str(corpus.parent / "cache"),
    )
    pl.seed_everything(1, verbose=False)
    module = GPTLightningModule(
        GPTConfig(data.vocab_size, SEQ_LEN, n_layers=1, n_heads=2, d_model=8, dropout=0.1),
        optimizer,
        schedule,
    )
    if ckpt_path is not None:
        torch.rand(7), random.random(), np.random.random()  # what a process did before its run
    trace = next((c.trace for c in callbacks if isinstance(c, SaveEverywhere)), Trace(str(folder / name)))
    trainer = pl.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=[trace, Draws(), ExactResume(), *averages, *callbacks],
        enable_checkpointing=any(isinstance(c, RunCheckpoint) for c in callbacks),
        log_every_n_steps=1,
        num_sanity_val_steps=2,
        **QUIET,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_a_wsd_run_extended_before_it_comes_down_is_the_longer_run(corpus: Path, tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, "schedule": ScheduleConfig(warmup_steps=1, shape="wsd")}
    whole = fit(corpus, tmp_path, "whole", max_steps=8, **options)
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "short")))
    fit(corpus, tmp_path, "short", saver, max_steps=6, **options)  # comes down from step 3 on
    for step, is_same in ((3, True), (5, False)):
        ckpt_path = tmp_path / f"batch_end-{step}.ckpt"
        longer = fit(corpus, tmp_path, f"from {step}", ckpt_path=ckpt_path, max_steps=8, **options)
        assert (longer == whole) == is_same


PLANS = {
    "by steps": {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2},
    "each epoch": {"max_epochs": 2},
    "in an epoch's middle": {"val_check_interval": 0.5, "max_epochs": 2},
    "no validation": {"limit_val_batches": 0, "max_epochs": 2},
    "to a step": {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_steps": 6},
    "limited epochs": {"limit_train_batches": 3, "max_epochs": 3},
    "with Muon": {"max_epochs": 2, "optimizer": OptimizerConfig(learning_rate=0.01, name="muon")},
    "with Muon and averaged weights": {
        "max_epochs": 2,
        "limit_val_batches": 0,  # one of averaged weights is in tests/faults/test_signals.py
        "optimizer": OptimizerConfig(learning_rate=0.01, name="muon"),
        "averaged": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_resumed_from_any_moment_the_run_is_the_same(
    plan: str, accumulate: int, corpus: Path, tmp_path: Path
) -> None:
    options = dict(PLANS[plan])
    if accumulate > 1:
        options |= {"accumulate_grad_batches": accumulate, "batch_size": 9}
        for name in ("val_check_interval", "limit_train_batches"):
            if isinstance(options.get(name), int):
                options[name] *= accumulate
    whole = fit(corpus, tmp_path, "whole", **options)
    expected = read_trace(tmp_path / "whole")
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "saving")))
    assert fit(corpus, tmp_path, "saving", saver, **options) == whole, "saving changes the run"
    assert read_trace(tmp_path / "saving") == expected
    assert len(saver.saved) >= 5
    if plan not in ("limited epochs", "to a step"):
        assert {row["step"] for row in expected if row["at"].startswith("epoch end")} == {4, 8}
    for number, (name, done) in enumerate(saver.saved.items()):
        if plan == "to a step" and name.startswith("epoch_end"):
            continue  # Lightning ends that epoch again; no checkpoint of ours is of this moment
        if "averaged" in options and name == "epoch_end-8.ckpt":
            continue  # nothing is left to train, after which Lightning would hand over the averages
        workers = 2 if number % 10 == 5 else 0
        resumed = fit(
            corpus, tmp_path, f"from {name}", ckpt_path=tmp_path / name, num_workers=workers, **options
        )
        assert read_trace(tmp_path / f"from {name}") == expected[done:], name
        assert resumed == whole, name


def test_a_last_step_is_validated_if_this_run_asks_for_it_and_no_step_follows(
    corpus: Path, tmp_path: Path
) -> None:
    plan = PLANS["to a step"]
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "saving")))
    whole = fit(corpus, tmp_path, "saving", saver, **plan)
    *_, validation = read_trace(tmp_path / "saving")
    for name, options, rows in (
        ("as before", {}, [validation]),
        ("at other steps", {"val_check_interval": 4}, []),
        ("never", {"limit_val_batches": 0}, []),
    ):
        path = tmp_path / "batch_end-6.ckpt"
        assert fit(corpus, tmp_path, name, ckpt_path=path, **{**plan, **options}) == whole, name
        assert read_trace(tmp_path / name) == rows, name


def test_a_run_that_averages_no_more_goes_on_from_what_was_trained(corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 0}
    whole = fit(corpus, tmp_path, "whole", **options)  # which averages do not change
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "averaging")))
    assert fit(corpus, tmp_path, "averaging", saver, averaged=True, **options) != whole
    with pytest.warns(UserWarning, match="the averages stay behind"):
        resumed = fit(corpus, tmp_path, "resumed", ckpt_path=tmp_path / "batch_end-2.ckpt", **options)
    assert resumed == whole


def test_a_checkpoint_of_which_a_part_alone_would_be_restored_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 2, "limit_val_batches": 0}
    fit(corpus, tmp_path, "saving", SaveEverywhere(tmp_path, Trace(str(tmp_path / "saving"))), **options)
    whole = torch.load(tmp_path / "batch_end-2.ckpt", weights_only=True)
    optimizers, (schedule,) = whole["optimizer_states"], whole["lr_schedulers"]
    (state,) = optimizers
    maximizing = {**state, "param_groups": [{**group, "maximize": True} for group in state["param_groups"]]}
    of_others = {**state, "state": {**state["state"], 0: {**state["state"][0], "exp_avg": torch.zeros(3)}}}
    lacking = {name: value for name, value in schedule.items() if name != "last_epoch"}
    path = tmp_path / "changed.ckpt"
    for changes, problem in (
        ({"optimizer_states": []}, "holds the states of 0 optimizers, and this run has 1"),
        ({"optimizer_states": optimizers * 2}, "holds the states of 2 optimizers, and this run has 1"),
        ({"optimizer_states": [maximizing]}, "holds maximize=True in group 0 of the optimizer, which has"),
        ({"optimizer_states": [of_others]}, "holds a state of the optimizer that does not fit: .*exp_avg"),
        ({"lr_schedulers": []}, "holds 0 of this run's schedules of the learning rate"),
        ({"lr_schedulers": [lacking]}, "lacks last_epoch of the learning rate's schedule"),
    ):
        torch.save({**whole, **changes}, path)
        with pytest.raises(UserError, match=f"^ckpt_path={path} {problem}.*; go on with it as it was"):
            fit(corpus, tmp_path, "refused", ckpt_path=path, **options)


def test_weights_that_lightning_averages_by_epochs_go_on_until_it_begins(
    corpus: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 6, "max_epochs": 6, "limit_val_batches": 0}
    averaging = partial(pl.callbacks.StochasticWeightAveraging, 0.1, swa_epoch_start=2)
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "saving")))
    whole = fit(corpus, tmp_path, "saving", saver, averaging(), **options)
    early, late = (tmp_path / f"batch_end-{step}.ckpt" for step in (3, 6))
    assert fit(corpus, tmp_path, "resumed", averaging(), ckpt_path=early, **options) == whole
    line = f"^ckpt_path={late} was saved when StochasticWeightAveraging had begun, .*; name an earlier one"
    with pytest.raises(UserError, match=line):
        fit(corpus, tmp_path, "refused", averaging(), ckpt_path=late, **{**options, "max_steps": 8})


def test_a_callback_that_is_another_now_is_named(corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "val_check_interval": 1}
    stopping = partial(pl.callbacks.EarlyStopping, "val/loss", patience=9)
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "saving")))
    fit(corpus, tmp_path, "saving", saver, stopping(), **options)
    path = tmp_path / "batch_end-2.ckpt"
    line = "EarlyStopping.*'max'} begins anew: the checkpoint's run had \"EarlyStopping.*'min'}"
    with pytest.warns(UserWarning, match=line):
        fit(corpus, tmp_path, "other", stopping(mode="max"), ckpt_path=path, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*begins anew")
        fit(corpus, tmp_path, "same", stopping(), ckpt_path=path, **options)
        fit(corpus, tmp_path, "none", ckpt_path=path, **options)


@pytest.mark.slow
def test_without_the_callback_dropout_differs(corpus: Path, tmp_path: Path) -> None:
    options = {"max_epochs": 2}
    saver = SaveEverywhere(tmp_path, Trace(str(tmp_path / "saving")))
    whole = fit(corpus, tmp_path, "saving", saver, **options)
    path = tmp_path / "batch_end-3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["resume"]
    torch.save(checkpoint, path)
    assert fit(corpus, tmp_path, "resumed", ckpt_path=path, **options) != whole
