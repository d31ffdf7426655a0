"""Signals end a run in order, on all ranks, with a checkpoint from which it goes on as if uninterrupted."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from tests.faults.harness import TRAINING, Process, run, weights_hash
from tests.faults.runs import TOPOLOGIES, callback, newest_last, write_run
from tests.faults.trace import differences, read_trace

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def run_whole(folder: Path, ranks: int = 1, **sections: Any) -> str:
    code, output = run(write_run(folder, "whole", **sections), folder, ranks=ranks)
    assert code == 0, output
    return weights_hash(newest_last(folder, "whole"))


def finish(folder: Path, whole: str, ranks: int = 1, **sections: Any) -> None:
    """Go on with the run to its end, and compare it with the whole one."""
    code, output = run(write_run(folder, "run", **sections), folder, ranks=ranks)
    assert code == 0, output
    for rank in range(ranks):
        found = read_trace(folder / "run", rank)
        assert len(found) == len({row["at"] for row in found}), "something was done twice"
        assert differences(folder / "run", folder / "whole", rank) == []
    assert weights_hash(newest_last(folder, "run")) == whole


@pytest.mark.parametrize("moment", ["batch 26", "validation 5"], ids=["in a step", "in a validation"])
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_step(name: str, code: int, moment: str, tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": 4, "max_steps": 12}
    settings = {"data": {"batch_size": 2}, "trainer": trainer}
    whole = run_whole(tmp_path, **settings)
    stop = [callback("SignalAt", moment=moment, name=name)]
    stopped = {**settings, "trainer": {**trainer, "callbacks": stop}}
    ended, output = run(write_run(tmp_path, "run", **stopped), tmp_path)
    assert ended == code, output
    step = 7 if moment == "batch 26" else 5
    assert f"stopped by a signal at step {step}; go on with --ckpt_path checkpoints/run/last.ckpt" in output
    assert "Traceback" not in output
    assert Checkpoint.open(tmp_path / "checkpoints" / "run" / "last.ckpt").step == step
    finish(tmp_path, whole, **settings)


def test_a_stop_inside_a_validation_of_averaged_weights_saves_the_training(tmp_path: Path) -> None:
    """And another ModelCheckpoint, which is the first of the Trainer's, takes nothing away."""
    lightning = "lightning.pytorch.callbacks"
    others = [
        {"class_path": f"{lightning}.EMAWeightAveraging", "init_args": {"decay": 0.9}},
        {"class_path": f"{lightning}.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "theirs")}},
    ]
    whole = run_whole(tmp_path, trainer={"callbacks": others})
    stop = callback("SignalAt", moment="validation 5", name="SIGTERM")
    code, output = run(write_run(tmp_path, "run", trainer={"callbacks": [*others, stop]}), tmp_path)
    assert code == 143, output
    assert "stopped by a signal at step 5; go on with --ckpt_path checkpoints/run/last.ckpt" in output
    finish(tmp_path, whole, trainer={"callbacks": others})


@pytest.mark.parametrize(
    "topology, rank", [("ddp 2", 0), ("ddp 2", 1), ("tp 2", 1), ("tp 2 x dp 2", 2)]
)
def test_a_signal_to_one_rank_ends_them_all(topology: str, rank: int, tmp_path: Path) -> None:
    ranks, data_parallel, options = TOPOLOGIES[topology]
    trainer = {**options, "max_steps": 14}
    settings = {"data": {"batch_size": 8 // data_parallel, "num_workers": 1}, "trainer": trainer}
    whole = run_whole(tmp_path, ranks, **settings)
    stop = [callback("SignalAt", moment="batch 8", name="SIGTERM", rank=rank)]
    words = write_run(tmp_path, "run", data=settings["data"], trainer={**trainer, "callbacks": stop})
    process = Process(words, tmp_path, ranks=ranks)
    process.wait_until(lambda: process.phase == TRAINING)
    begun = time.monotonic()
    assert process.exit_codes() == [143] * ranks, process.output()
    assert time.monotonic() - begun < 30
    finish(tmp_path, whole, ranks, **settings)


def test_a_signal_to_the_whole_job_spares_the_workers(tmp_path: Path) -> None:
    settings = {"data": {"num_workers": 2}}
    whole = run_whole(tmp_path, **settings)
    stop = [callback("SignalAt", moment="batch 8", name="SIGTERM", workers_too=True)]
    code, output = run(write_run(tmp_path, "run", trainer={"callbacks": stop}, **settings), tmp_path)
    assert code == 143, output
    finish(tmp_path, whole, **settings)


def test_a_second_interrupt_ends_at_once_and_tears_nothing(tmp_path: Path) -> None:
    whole = run_whole(tmp_path)
    twice = [callback("SignalAt", moment="batch 8", name="SIGINT", times=2)]
    code, output = run(write_run(tmp_path, "run", trainer={"callbacks": twice}), tmp_path)
    assert code == 130, output
    assert Checkpoint.open(tmp_path / "checkpoints" / "run" / "last.ckpt").step == 6
    code, output = run(write_run(tmp_path, "run"), tmp_path)
    assert code == 0 and differences(tmp_path / "run", tmp_path / "whole") == []
    assert weights_hash(newest_last(tmp_path, "run")) == whole


def test_a_signal_before_the_first_step_is_done_is_heeded_after_it(tmp_path: Path) -> None:
    process = Process(write_run(tmp_path, "run", trainer={"num_sanity_val_steps": 2}), tmp_path)
    assert process.wait_until(lambda: "model of" in process.output() or process.phase == TRAINING)
    process.send(signal.SIGTERM)
    assert process.exit_codes() == [143], process.output()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_before_training_ends_them_all(rank: int, tmp_path: Path) -> None:
    stop = [callback("SignalAt", moment="validation 0", name="SIGTERM", rank=rank)]
    trainer = {**TOPOLOGIES["ddp 2"][2], "num_sanity_val_steps": 2, "callbacks": stop}
    process = Process(write_run(tmp_path, "run", trainer=trainer), tmp_path, ranks=2)
    assert process.exit_codes() == [143, 143], process.output()
    assert process.output().count("stopped by a signal before the first step; nothing is saved") == 1
    assert process.output().count("SIGTERM: ending before the first step") == (rank == 0)
    assert not [*tmp_path.rglob("*.ckpt*")]


def test_a_job_that_goes_on_has_all_of_its_time_limit_again(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": -1, "max_epochs": -1, "limit_val_batches": 0})
    steps = [0]
    for number in range(2):
        code, output = run([*words, "--trainer.max_time", "00:00:00:02"], tmp_path, log=f"{number}.log")
        assert code == 0, output
        steps.append(Checkpoint.open(newest_last(tmp_path, "run")).step)
    assert steps[0] < steps[1] < steps[2]


def test_the_time_limit_ends_at_a_step_with_a_checkpoint(tmp_path: Path) -> None:
    settings = {"data": {"batch_size": 2}, "trainer": {"accumulate_grad_batches": 4}}
    whole = run_whole(tmp_path, **settings)
    # The time is over as soon as the first batch is trained, in the middle of a step.
    limit = {**settings["trainer"], "callbacks": [callback("TimeIsOver", batch=26)]}
    code, output = run(write_run(tmp_path, "run", data=settings["data"], trainer=limit), tmp_path)
    assert code == 0, output
    assert Checkpoint.open(tmp_path / "checkpoints" / "run" / "last.ckpt").step == 7
    code, output = run(write_run(tmp_path, "run", **settings), tmp_path)
    assert code == 0, output
    # The stop itself validates, which the whole run did not.
    extra = [f"{d}" for d in differences(tmp_path / "run", tmp_path / "whole") if "validation 7" not in d]
    assert [d for d in extra if "epoch end" not in d] == []
    assert weights_hash(newest_last(tmp_path, "run")) == whole
