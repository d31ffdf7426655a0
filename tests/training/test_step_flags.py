"""Ranks stop at the same step, by one message a step, whichever callbacks they have, on any device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from gpt_lightning.callbacks import finite_guard
from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.orderly_stop import OrderlyStop, Stopped
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.training import step_flags
from gpt_lightning.training.step_flags import STEPS_LATER, Readout
from gpt_lightning.training.trainer import GPTTrainer
from tests.distributed import run_ranks
from tests.faults.trace import SignalAt
from tests.parallel.runs import Run, build

SIGNALLED = 3  # the step in which rank 1 alone hears a signal
Callbacks = Callable[[], list[pl.Callback]]
ORDERS: dict[str, Callbacks] = {
    "both": lambda: [FiniteGuard(), OrderlyStop()],
    "in the other order": lambda: [OrderlyStop(), FiniteGuard()],
    "the stop alone": lambda: [OrderlyStop()],
}


class Messages(pl.Callback):
    """Counts the reductions over all ranks, but those of DDP's reducer."""

    def __init__(self) -> None:
        self.of_step: dict[int, int] = {}
        self._count = 0
        self._reduce = dist.all_reduce

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        setattr(dist, "all_reduce", self._counted)

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        self._count += 1
        return self._reduce(*args, **kwargs)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # All that the step before has sent; the step that ends the run agrees on a checkpoint, too.
        self.of_step[trainer.global_step], self._count = self._count, 0

    def on_exception(self, *_: Any) -> None:
        setattr(dist, "all_reduce", self._reduce)


def stop(corpus: Path, folder: Path, runs_ahead: bool) -> dict[str, Any]:
    """Runs in a rank: at which step each order of callbacks has ended, with what, and its messages a step."""
    if runs_ahead:
        setattr(step_flags, "RUN_AHEAD_OF", ("cpu",))
        setattr(finite_guard, "DEVICES_THAT_SKIP", ("cpu",))
    ends = {}
    for name, callbacks in ORDERS.items():
        module, datamodule = build(corpus, Run(dp=2))
        messages, path = Messages(), folder / name.replace(" ", "_")
        saver = RunCheckpoint(str(path), monitor=None)
        signal = SignalAt(f"batch {SIGNALLED}", "SIGTERM", rank=1)
        trainer = GPTTrainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_steps=9,
            limit_val_batches=0,
            log_every_n_steps=100,
            callbacks=[messages, signal, saver, *callbacks()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        with pytest.raises(Stopped) as ended:
            trainer.fit(module, datamodule)
        saved = Checkpoint.open(path / "last.ckpt").step
        counts = {count for step, count in messages.of_step.items() if step > 0}
        ends[name] = (trainer.global_step, saved, ended.value.exit_code, counts)
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_all_ranks_stop_at_the_same_step(runs_ahead: bool, corpus: Path, tmp_path: Path) -> None:
    step = SIGNALLED + (STEPS_LATER if runs_ahead else 0)
    for ends in run_ranks(stop, 2, corpus, tmp_path, runs_ahead):
        assert ends == dict.fromkeys(ORDERS, (step, step, 143, {1}))


def test_numbers_of_a_device_come_later_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [torch.tensor(float(code)) for code in (1, 2, 3, 4)]
    assert [Readout()(code) for code in codes] == [1, 2, 3, 4]
    monkeypatch.setattr(step_flags, "RUN_AHEAD_OF", ("cpu",))
    readout = Readout()
    assert [readout(code) for code in codes] == [0] * STEPS_LATER + [1, 2]
