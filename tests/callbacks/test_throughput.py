"""Speed and shares by a clock that the test moves, against hand counts, on one rank and on several."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import gpt_lightning.training.trainer as training_trainer
from gpt_lightning.callbacks import throughput
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import GPTTrainer
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow
PEAK = 1e6  # of a device
# Blocks 4 * 8 * 8 + 2 * 8 * 32, head 8 * 16, six times each; attention 12 * 8 wide * 8 long.
FLOPS_PER_TOKEN = 6 * (256 + 512 + 128) + 768


class Clock:
    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Timed(GPTLightningModule):
    """A micro-batch takes 2 s, waiting for it 1 s, a validation 999 + 1 s, a checkpoint 500 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(GPTConfig(16, 8, n_layers=1, n_heads=2, d_model=8))
        self.clock = clock

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        self.clock.seconds += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.clock.seconds += 999

    def on_validation_epoch_end(self) -> None:
        pass

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.seconds += 500


class Batches(torch.utils.data.Dataset):
    """Of 16 targets, 12 of which are scored."""

    def __init__(self, clock: Clock, step_tokens: int) -> None:
        self.clock, self.step_tokens = clock, step_tokens

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> TokenBatch:
        self.clock.seconds += 1
        targets = torch.full((2, 8), -100)
        targets.view(-1)[:12] = 1
        return TokenBatch(torch.ones(2, 8, dtype=torch.long), targets, None, step_tokens=self.step_tokens)


class Record(pl.Callback):
    """What is known at logging steps, by step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % 3 == 0 and trainer.global_step not in (0, *self.at):
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.at[trainer.global_step] = {
                name.removeprefix("throughput/"): value for name, value in values.items()
            }


def fit(
    folder: Path,
    *,
    resume_from: Path | None = None,
    replicas: int = 1,
    kind: type[pl.Trainer] = GPTTrainer,
    peaks: tuple[float, ...] = (),
    **options: Any,
) -> Record:
    """Each look at the peak takes 7 s, and finds the next of these, at last PEAK."""
    left = [*peaks]

    def peak_flops(device: torch.device, precision: str) -> float:
        clock.seconds += 7
        return left.pop(0) if left else PEAK

    clock, record = Clock(), Record()
    step_tokens = 12 * replicas * options.get("accumulate_grad_batches", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_trainer, "time", clock)
        patch.setattr(throughput, "peak_flops", peak_flops)
        trainer = kind(
            accelerator="cpu",
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            limit_val_batches=1,
            log_every_n_steps=3,
            callbacks=[
                Throughput(),
                record,
                pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_steps": 9, "val_check_interval": 2, **options},
        )
        training, validation = (
            DataLoader(Batches(clock, step_tokens), batch_size=None) for _ in range(2)
        )
        trainer.fit(Timed(clock), training, validation, ckpt_path=resume_from, weights_only=True)
    return record


# Three steps each; a validation follows the second, fourth … batch, a checkpoint the second, fourth … step.
@pytest.mark.parametrize(
    "accumulate, validations, saves", [(1, (1, 1, 2), (1, 1, 2)), (2, (2, 3, 3), (1, 1, 2))]
)
def test_validation_and_saving_have_shares_of_their_own(
    tmp_path: Path, accumulate: int, validations: tuple[int, ...], saves: tuple[int, ...]
) -> None:
    record = fit(tmp_path, accumulate_grad_batches=accumulate)
    assert list(record.at) == [3, 6, 9]
    for found, n_validations, n_saves in zip(record.at.values(), validations, saves):
        total = 9 * accumulate + 1000 * n_validations + 500 * n_saves
        assert found["tokens_per_second"] == pytest.approx(12 / 3)
        assert found["step_seconds"] == pytest.approx(3 * accumulate)
        assert found["mfu"] == pytest.approx(4 * FLOPS_PER_TOKEN / PEAK)
        assert found["data_share"] == pytest.approx(3 * accumulate / total)
        assert found["step_share"] == pytest.approx(6 * accumulate / total)
        assert found["validation_share"] == pytest.approx(1000 * n_validations / total)
        assert found["checkpoint_share"] == pytest.approx(500 * n_saves / total)
        assert found["other_share"] == 0
        assert 0.01 < found["peak_memory_gib"] < 1000


def test_a_peak_that_a_busy_machine_has_hidden_is_raised_and_no_share_is_above_all(tmp_path: Path) -> None:
    done = 4 * FLOPS_PER_TOKEN
    record = fit(tmp_path, val_check_interval=50, peaks=(done / 10, done / 5, 2 * done, done / 8))
    # At first the steps themselves do more than was measured; then more is found, which stays.
    assert [found["mfu"] for found in record.at.values()] == [pytest.approx(share) for share in (1, 0.5, 0.5)]
    assert all(found["tokens_per_second"] == pytest.approx(4) for found in record.at.values())
    assert sum(found["other_share"] for found in record.at.values()) == 0


def test_a_trainer_that_tells_of_less_is_told_so_and_its_waiting_and_saving_count(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="which count as other_share; make a .*GPTTrainer"):
        found = fit(tmp_path, kind=pl.Trainer, max_steps=3).at[3]
    assert found["data_share"] == found["checkpoint_share"] == 0
    # The fetch after the validation is taken for a part of it.
    assert found["tokens_per_second"] == pytest.approx(36 / (9 + 500 - 1))


def test_a_checkpoint_may_be_saved_where_nothing_was_trained(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = GPTTrainer(accelerator="cpu", limit_val_batches=1, callbacks=[Throughput()], **quiet)
    clock = Clock()
    trainer.validate(Timed(clock), DataLoader(Batches(clock, 12), batch_size=None), verbose=False)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    assert (tmp_path / "some.ckpt").exists()


def test_a_resumed_run_counts_its_own_steps(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=4)
    record = fit(tmp_path, resume_from=tmp_path / "step=4.ckpt", max_steps=6)
    assert list(record.at) == [6]
    assert record.at[6]["tokens_per_second"] == pytest.approx(12 / 3)
    assert record.at[6]["step_seconds"] == pytest.approx(3)


def fit_in_parallel(folder: str, size: int) -> dict[int, dict[str, float]]:
    strategy = TensorParallelDDPStrategy(size)
    world = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    return fit(Path(folder), max_steps=3, val_check_interval=50, replicas=2 // size, **world).at


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_peers_share_the_work_and_replicas_add_to_it(tmp_path: Path, tensor_parallel_size: int) -> None:
    for found in run_ranks(fit_in_parallel, 2, str(tmp_path), tensor_parallel_size):
        tokens_per_second = 4 * 2 // tensor_parallel_size
        assert found[3]["tokens_per_second"] == pytest.approx(tokens_per_second)
        assert found[3]["mfu"] == pytest.approx(tokens_per_second * FLOPS_PER_TOKEN / (2 * PEAK))


def test_queued_steps_are_finished_before_a_validation_or_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[None] = []  # of 10 s each
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: waits.append(None))
    monkeypatch.setattr(Clock, "perf_counter", lambda clock: clock.seconds + 10 * len(waits))
    record = fit(tmp_path, max_steps=3)
    assert len(waits) == 2  # for one validation and one save, after the second step
    total = 9 + 20 + 1000 + 500
    assert record.at[3]["tokens_per_second"] == pytest.approx(36 / (9 + 20))
    assert record.at[3]["validation_share"] == pytest.approx(1000 / total)
    assert record.at[3]["checkpoint_share"] == pytest.approx(500 / total)
