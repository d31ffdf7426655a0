"""A device that leaves refused steps out, unwatched, ends where one ends that is read at every step."""

import logging
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_lightning.callbacks import finite_guard
from gpt_lightning.callbacks.finite_guard import FiniteGuard, NonFiniteError
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.progress import StepProgressBar
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig
from gpt_lightning.training.trainer import GPTTrainer
from tests.faults.trace import Poison

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU taken for a device whose results the host would wait for."""
    monkeypatch.setattr(finite_guard, "DEVICES_THAT_SKIP", ("cpu",))


class States(pl.Callback):
    """The weights and moments after each step."""

    def __init__(self) -> None:
        self.after: dict[int, list[torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state_dict()["state"].values()
        tensors = [*pl_module.state_dict().values(), *(value for entry in state for value in entry.values())]
        self.after[trainer.global_step] = [tensor.clone() for tensor in tensors]


def fit(
    corpus: Path,
    folder: Path,
    callbacks: list[pl.Callback],
    kind: type[pl.Trainer] = GPTTrainer,
    optimizer: str = "adamw",
    **options: Any,
) -> pl.Trainer:
    settings = {"tokenizer": "bytes", "seq_len": 16, "batch_size": 2, "cache_dir": str(folder / "cache")}
    datamodule = TextDataModule(train_files=[str(corpus)], **settings)  # type: ignore[arg-type]
    torch.manual_seed(1)
    config = GPTConfig(datamodule.vocab_size, 16, n_layers=1, n_heads=2, d_model=16)
    module = GPTLightningModule(config, OptimizerConfig(name=optimizer))
    trainer = kind(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=callbacks,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, **options},
    )
    trainer.fit(module, datamodule)
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_left_out_steps_change_nothing_and_are_told(
    what: str,
    optimizer: str,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    found = []
    for kind in ("read every step", "on_device"):
        if kind == "on_device":
            request.getfixturevalue(kind)
        states, guard = States(), FiniteGuard(max_skipped_steps=2)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gpt_lightning"):
            callbacks = [Poison([4, 7], what=what), guard, states]
            trainer = fit(corpus, tmp_path, callbacks, optimizer=optimizer, log_every_n_steps=5)
        assert guard.skipped_steps == 2 and not hasattr(trainer.optimizers[0], "found_inf")
        assert_same(states.after[3], states.after[4])
        assert not torch.equal(states.after[4][0], states.after[5][0])
        found.append((states.after, [record.getMessage() for record in caplog.records]))
    (there, told_there), (here, told_here) = found
    assert told_here == told_there
    assert told_here[0] == f"step 4: the {what} is not finite (samples 6-7); left out, 1 of at most 2"
    for step in range(1, STEPS + 1):
        assert_same(here[step], there[step])


def assert_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("skipped", [0, 1])
def test_no_step_is_taken_after_the_refused_one(
    skipped: int, corpus: Path, tmp_path: Path, on_device: None
) -> None:
    states = States()
    guard, poison = FiniteGuard(skipped), Poison([2, 4] if skipped else [4])
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is not finite \(samples 6-7\); the step was"):
        fit(corpus, tmp_path, [poison, guard, states], log_every_n_steps=10)
    assert sorted(states.after) == list(range(1, 10))  # the host saw it at the logging step
    for step in range(4, 10):
        assert_same(states.after[3], states.after[step])


def test_it_is_seen_before_a_checkpoint_and_counted_in_it(
    corpus: Path, tmp_path: Path, on_device: None
) -> None:
    saves = RunCheckpoint(dirpath=str(tmp_path), every_n_train_steps=3, save_top_k=-1, monitor=None)
    guard = FiniteGuard(max_skipped_steps=1)
    with pytest.raises(NonFiniteError, match="step 7"):
        fit(
            corpus,
            tmp_path,
            [Poison([5, 7]), guard, saves],
            log_every_n_steps=100,
            enable_checkpointing=True,
        )
    assert sorted(path.name for path in tmp_path.glob("step*.ckpt")) == ["step000003.ckpt", "step000006.ckpt"]
    checkpoint = Checkpoint.open(tmp_path / "step000006.ckpt").contents
    assert checkpoint["callbacks"]["FiniteGuard"] == {"skipped_steps": 1}
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())


def test_weights_alone_are_looked_at_too(corpus: Path, tmp_path: Path, on_device: None) -> None:
    saves = pl.callbacks.ModelCheckpoint(
        tmp_path, save_weights_only=True, every_n_train_steps=1, save_top_k=-1
    )
    with pytest.raises(NonFiniteError, match="step 4"):
        fit(corpus, tmp_path, [Poison([4]), FiniteGuard(), saves], enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_it_is_seen_at_once_with_a_trainer_that_tells_of_no_checkpoint(
    corpus: Path, tmp_path: Path, on_device: None
) -> None:
    states = States()
    with pytest.raises(NonFiniteError, match="step 4"):
        fit(corpus, tmp_path, [Poison([4]), FiniteGuard(), states], kind=pl.Trainer, log_every_n_steps=10)
    assert sorted(states.after) == [1, 2, 3]


class Reads(TorchDispatchMode):
    """Where a tensor's value was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append("".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))

    def noting(self, method: Any) -> Any:
        def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append("".join(traceback.format_stack(limit=12)))
            return method(tensor, *args, **kwargs)

        return noted


class ReadsByStep(pl.Callback):
    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.of: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.of.setdefault(trainer.global_step, []).extend(self.reads.found)  # since the last step's batch
        self.reads.found.clear()


@pytest.mark.parametrize("accumulate, optimizer", [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_between_logging_steps_nothing_is_read(
    accumulate: int,
    optimizer: str,
    corpus: Path,
    tmp_path: Path,
    on_device: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = Reads()
    for name in ("tolist", "cpu", "numpy"):  # of a tensor on the host PyTorch dispatches nothing for them
        monkeypatch.setattr(torch.Tensor, name, reads.noting(getattr(torch.Tensor, name)))
    by_step = ReadsByStep(reads)
    callbacks = [StepProgressBar(), FiniteGuard(), Throughput(), by_step, OrderlyStop()]
    with reads:
        fit(
            corpus,
            tmp_path,
            callbacks,
            optimizer=optimizer,
            log_every_n_steps=4,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            enable_progress_bar=True,
            logger=True,
        )
    assert by_step.of[4] and by_step.of[8]  # where they are logged
    others = [stack for step in range(1, STEPS) if step % 4 for stack in by_step.of[step]]
    assert not others, others[0]
