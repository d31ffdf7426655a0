"""Killed and resumed, Lightning sees the samples that it would have seen: run with real trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch

pytestmark = pytest.mark.slow

SEQ_LEN, BATCH_SIZE = 8, 2
N_WINDOWS = 13  # 7 batches of 2 an epoch, the last of one


class Recorder(LightningModule):
    """Learns nothing, and remembers the targets of each batch."""

    def __init__(self, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.ask_for_steps = ask_for_steps

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.targets.tolist())
        return self.weight * 1.0

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # sets up the training data before the counters are restored
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """A checkpoint in each hook in which one may be saved, with the position it stands for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[str, tuple[int, int]] = {}

    def save(self, trainer: Trainer, hook: str) -> None:
        name = f"{hook}-{trainer.global_step}"
        trainer.save_checkpoint(self.folder / name)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.saved[name] = (trainer.global_step, data.consumed_samples)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "epoch_end")

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "epoch_start")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    # Characters that occur once, so that a window's targets tell its place; 3 bytes each, and an eos.
    path.write_text("".join(chr(0x4E00 + 37 * index) for index in range(33)))
    return path


def data_of(source: Path, batch_size: int = BATCH_SIZE, num_workers: int = 0) -> TextDataModule:
    return TextDataModule(
        train_files=str(source),
        val_files=str(source.with_name("val.txt")),
        tokenizer="bytes",
        seq_len=SEQ_LEN,
        batch_size=batch_size,
        num_workers=num_workers,
        cache_dir=str(source.parent / "cache"),
    )


class StepCounter(Recorder):
    """Counts, for each optimizer step, the targets of its micro-batches, beside what they say of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, list[int | None]]] = []
        self._scored, self._told = 0, list[int | None]()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        self._scored += int((batch.targets != -100).sum())
        self._told.append(batch.step_tokens)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps.append((self._scored, self._told))
        self._scored, self._told = 0, []


def fit(
    data: TextDataModule,
    ckpt_path: Path | None = None,
    ask: bool = False,
    module: Any = None,
    **options: Any,
) -> Any:
    data.val_files and Path(str(data.val_files)).write_text("held out text")
    module = module or Recorder(ask)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0}
    options = {"accelerator": "cpu", **quiet, **options}
    Trainer(**options).fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    return module


def rows_of(seen: list[list[list[int]]]) -> list[list[int]]:
    return [row for batch in seen for row in batch if any(target != -100 for target in row)]


def same_order(resumed: list[Any], expected: list[Any], name: str) -> bool:
    # Lightning counts an epoch as done that a checkpoint of on_train_epoch_start only began, and so ends an
    # epoch early; it saves none there itself. The order goes on all the same.
    return resumed == (expected[: len(resumed)] if name.startswith("epoch_start") else expected)


def expected_position(step: int) -> int:
    return step // 7 * N_WINDOWS + step % 7 * BATCH_SIZE


@pytest.mark.parametrize("limits", [{"max_steps": 17}, {"max_epochs": 3}], ids=["steps", "epochs"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_from_any_checkpoint_of_any_hook_the_samples_are_the_same(
    source: Path, tmp_path: Path, limits: dict[str, int], num_workers: int
) -> None:
    whole = fit(data_of(source), **limits, val_check_interval=3).seen
    assert len(whole) == limits.get("max_steps", 21)
    epoch = rows_of(whole[:7])
    assert len(epoch) == N_WINDOWS and len({tuple(row) for row in epoch}) == N_WINDOWS
    saver = SaveEverywhere(tmp_path)
    fit(data_of(source), **limits, val_check_interval=3, callbacks=[saver])
    assert len(saver.saved) > 25
    for name, (step, position) in saver.saved.items():
        assert position == expected_position(step), name
        if num_workers and step not in (3, 7, 8, 14):
            continue
        for ask in (False, True):
            data = data_of(source, num_workers=num_workers)
            resumed = fit(data, tmp_path / name, ask, **limits, val_check_interval=3).seen
            assert same_order(resumed, whole[step:], name), f"{name}, asked for steps: {ask}"


@pytest.mark.parametrize(("step", "batch_size"), [(3, 1), (3, 4), (5, 3), (7, 4)])
def test_another_batch_size_continues_the_order_and_ends_the_epoch_on_time(
    source: Path, tmp_path: Path, step: int, batch_size: int
) -> None:
    whole = rows_of(fit(data_of(source), max_epochs=4).seen)
    assert len(whole) == 4 * N_WINDOWS
    saver = SaveEverywhere(tmp_path)
    fit(data_of(source), max_steps=step, callbacks=[saver])
    resumed = fit(data_of(source, batch_size), tmp_path / f"batch_end-{step}", max_epochs=4)
    assert rows_of(resumed.seen) == whole[expected_position(step) :]


def test_limited_epochs_go_on_in_the_order(source: Path, tmp_path: Path) -> None:
    whole = rows_of(fit(data_of(source), max_epochs=2).seen)
    saver = SaveEverywhere(tmp_path)
    limits = {"limit_train_batches": 4, "max_epochs": 3}
    assert rows_of(fit(data_of(source), callbacks=[saver], **limits).seen) == whole[: expected_position(12)]
    for name, (step, _) in saver.saved.items():
        resumed = rows_of(fit(data_of(source), tmp_path / name, **limits).seen)
        assert same_order(resumed, whole[expected_position(step) : expected_position(12)], name), name


def test_a_new_trainer_with_the_same_datamodule_begins_anew(source: Path, tmp_path: Path) -> None:
    data = data_of(source)
    saver = SaveEverywhere(tmp_path)
    first = fit(data, max_steps=9, callbacks=[saver]).seen
    assert fit(data, tmp_path / "batch_end-9", max_steps=11).seen != first[:2]
    assert fit(data, max_steps=9).seen == first


def test_a_resume_in_mid_epoch_gives_no_warning(source: Path, tmp_path: Path, recwarn: Any) -> None:
    saver = SaveEverywhere(tmp_path)
    fit(data_of(source), max_steps=3, callbacks=[saver])
    fit(data_of(source), tmp_path / "batch_end-3", max_steps=5)
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


class WriteDown(Callback):
    """Two processes tell what they saw by files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        torch.save(module.seen, self.folder / f"rank{trainer.global_rank}")


def test_two_real_ranks_share_the_batches_of_one(source: Path, tmp_path: Path) -> None:
    whole = fit(data_of(source, batch_size=4), max_epochs=2).seen
    fit(
        data_of(source, batch_size=2, num_workers=1),
        max_epochs=2,
        callbacks=[WriteDown(tmp_path)],
        strategy="ddp_fork",
        devices=2,
    )
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == 8
    for first, second, together in zip(*ranks, whole, strict=True):
        assert sorted(rows_of([first, second])) == sorted(rows_of([together]))


def told_and_counted(*ranks: StepCounter) -> tuple[list[int], list[int]]:
    """What all micro-batches of a step were told, and the targets counted in them; by step."""
    told, counted = [], []
    for steps in zip(*(rank.steps for rank in ranks), strict=True):
        (every,) = {number for _, numbers in steps for number in numbers}
        assert all(len(numbers) == len(steps[0][1]) for _, numbers in steps)
        told.append(every)
        counted.append(sum(scored for scored, _ in steps))
    return told, counted


# 13 windows, the one of the last four targets of 100 anywhere among them.
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "accumulate, limits",
    [
        (1, {"max_epochs": 3}),
        (3, {"max_epochs": 3}),  # the last steps have batches of padding only
        (3, {"max_epochs": 5, "limit_train_batches": 4}),  # the last step of an epoch is of one batch
        (2, {"max_epochs": 5, "limit_train_batches": 0.8}),  # 6 of 8
        (3, {"max_epochs": 3, "overfit_batches": 4}),
    ],
)
def test_a_batch_tells_how_many_targets_its_optimizer_step_scores(
    source: Path, accumulate: int, limits: dict[str, Any], num_workers: int
) -> None:
    data = data_of(source, num_workers=num_workers)
    counter = fit(data, module=StepCounter(), accumulate_grad_batches=accumulate, **limits)
    told, counted = told_and_counted(counter)
    assert told == counted and len(set(told)) > 1
    if len(limits) == 1:
        assert sum(told) == 3 * 100


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 5}, {"limit_train_batches": 0.7}])
@pytest.mark.parametrize("batch_size, accumulate", [(2, 2), (2, 3), (4, 1), (1, 4)])
def test_so_it_does_after_a_resume_in_the_middle_with_other_batches_too(
    source: Path, tmp_path: Path, batch_size: int, accumulate: int, limits: dict[str, Any]
) -> None:
    saver, limits = SaveEverywhere(tmp_path), {"max_epochs": 4, **limits}
    fit(data_of(source), callbacks=[saver], accumulate_grad_batches=2, **limits)
    assert len(saver.saved) > 10
    for name in list(saver.saved)[::3]:
        data = data_of(source, batch_size)
        counter = fit(
            data, tmp_path / name, module=StepCounter(), accumulate_grad_batches=accumulate, **limits
        )
        told, counted = told_and_counted(counter)
        assert told == counted, name


class KeepSteps(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        torch.save(module.steps, self.folder / f"rank{trainer.global_rank}")


def on_two_ranks(data: TextDataModule, folder: Path, **options: Any) -> tuple[list[int], list[int]]:
    fit(data, module=StepCounter(), strategy="ddp_fork", devices=2, callbacks=[KeepSteps(folder)], **options)
    ranks = [StepCounter() for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank.steps = torch.load(folder / f"rank{number}")
    return told_and_counted(*ranks)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_so_it_does_on_two_ranks(source: Path, tmp_path: Path, accumulate: int) -> None:
    told, counted = on_two_ranks(data_of(source), tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    assert told == counted and sum(told) == 2 * 100


@pytest.mark.parametrize("limit", [1.0, 3, 0.7])
@pytest.mark.parametrize("name", ["batch_end-2", "validation_end-5"])
def test_so_it_does_on_two_ranks_that_go_on_with_what_one_began(
    source: Path, tmp_path: Path, name: str, limit: float
) -> None:
    options: dict[str, Any] = {"max_epochs": 5, "limit_train_batches": limit}
    saver = SaveEverywhere(tmp_path)
    fit(data_of(source), callbacks=[saver], accumulate_grad_batches=2, val_check_interval=2, **options)
    path = next(tmp_path / saved for saved in saver.saved if saved >= name)
    data = data_of(source, batch_size=1, num_workers=1)
    told, counted = on_two_ranks(data, tmp_path, ckpt_path=path, accumulate_grad_batches=4, **options)
    assert told == counted and len(told) > 1


def test_predictions_of_a_trainer_are_in_prompt_order(source: Path) -> None:
    class Echo(Recorder):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    data = TextDataModule(train_files="/none.txt", tokenizer="bytes", prompts=["a", "b", "c"], batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    share: Any
    (share,) = trainer.predict(Echo(), datamodule=data)
    assert share.prompts == ["a", "b", "c"]
    assert share.token_ids == [[97], [98], [99]]


def test_some_batches_can_be_overfitted(source: Path) -> None:
    seen = fit(data_of(source), overfit_batches=2, max_steps=6).seen
    assert seen[0] != seen[1] and seen[:2] * 3 == seen
