"""NaN and infinity end a run before the step that would take them into the weights, or leave the step out."""

from pathlib import Path

import pytest
import torch

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from tests.faults.harness import Process, run, weights_hash
from tests.faults.runs import TOPOLOGIES, callback, newest_last, write_run
from tests.faults.trace import differences, read_trace

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def assert_finite(folder: Path) -> None:
    paths = list(folder.glob("checkpoints/*/*.ckpt"))
    assert paths
    for path in paths:
        checkpoint = Checkpoint.open(path).contents
        tensors = list(checkpoint["state_dict"].values())
        for entry in checkpoint["optimizer_states"][0]["state"].values():
            tensors += entry.values()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors), path


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_run_ends_before_the_step(what: str, value: str, tmp_path: Path) -> None:
    poison = [callback("Poison", steps=[8], what=what, value=value)]
    words = write_run(tmp_path, "run", checkpoint={"every_n_train_steps": 1}, trainer={"callbacks": poison})
    code, output = run(words, tmp_path)
    assert code == 3, output
    assert f"error: step 8: the {what} is not finite (samples 56-63); the step was not taken" in output
    assert "Traceback" not in output
    assert_finite(tmp_path)
    assert Checkpoint.open(newest_last(tmp_path, "run")).step == 7
    assert read_trace(tmp_path / "run")[-1]["step"] == 7


def test_the_micro_batch_is_named_and_all_ranks_end(tmp_path: Path) -> None:
    ranks, _, options = TOPOLOGIES["tp 2 x dp 2"]
    poison = [callback("Poison", steps=[8], rank=3)]
    trainer = {**options, "accumulate_grad_batches": 2, "callbacks": poison}
    words = write_run(tmp_path, "run", data={"batch_size": 2}, trainer=trainer)
    process = Process(words, tmp_path, ranks=ranks)
    assert process.exit_codes() == [3] * ranks, process.output()
    # Rank 3 is of the second replica, which takes every other sample of a micro-batch of four.
    assert "step 8: the loss is not finite (samples 57, 59, 61, 63)" in process.output()
    assert_finite(tmp_path)


def test_steps_are_left_out_by_option_and_counted(tmp_path: Path) -> None:
    guard = {"max_skipped_steps": 2}
    poison = [callback("Poison", steps=[8, 12])]
    words = write_run(tmp_path, "whole", non_finite=guard, trainer={"callbacks": poison})
    code, output = run(words, tmp_path)
    assert code == 0, output
    for number, step in enumerate((8, 12), start=1):
        assert f"step {step}: the loss is not finite" in output
        assert f"left out, {number} of at most 2" in output
    assert_finite(tmp_path)
    assert Checkpoint.open(newest_last(tmp_path, "whole")).step == 40
    # The count goes on with the run, and the run is the same when it is killed between the two.
    for moment in ("batch_end 10", None):
        kill = [callback("KillAt", moment=moment)] if moment else []
        words = write_run(tmp_path, "run", non_finite=guard, trainer={"callbacks": [*poison, *kill]})
        code, output = run(words, tmp_path, log="run.log")
    assert "left out, 2 of at most 2" in output
    assert differences(tmp_path / "run", tmp_path / "whole") == []
    assert weights_hash(newest_last(tmp_path, "run")) == weights_hash(newest_last(tmp_path, "whole"))
    words = write_run(tmp_path, "third", non_finite={"max_skipped_steps": 1}, trainer={"callbacks": poison})
    assert run(words, tmp_path)[0] == 3


def test_a_step_that_is_left_out_changes_no_weight(tmp_path: Path) -> None:
    poison = [callback("Poison", steps=[8])]
    checkpoint = {"every_n_train_steps": 1, "monitor": None, "save_top_k": -1}
    trainer = {"callbacks": poison, "max_steps": 9}
    guard = {"max_skipped_steps": 1}
    words = write_run(tmp_path, "run", non_finite=guard, checkpoint=checkpoint, trainer=trainer)
    code, output = run(words, tmp_path)
    assert code == 0, output
    folder = tmp_path / "checkpoints" / "run"
    seven, eight, nine = (folder / f"step00000{step}.ckpt" for step in (7, 8, 9))
    assert weights_hash(seven) == weights_hash(eight) != weights_hash(nine)
    states = [Checkpoint.open(path).contents["optimizer_states"][0]["state"] for path in (seven, eight)]
    for index, entry in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in entry.items())


def test_weights_that_overflow_are_not_written(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 3e38, "weight_decay": 10.0}
    schedule = {"warmup_steps": 0, "min_lr_ratio": 1.0}
    config = {"max_position_embeddings": 64, "n_layers": 1, "n_heads": 2, "d_model": 32}
    model = {"config": config, "optimizer": optimizer, "schedule": schedule}
    words = write_run(tmp_path, "run", model=model, checkpoint={"every_n_train_steps": 1})
    code, output = run(words, tmp_path)
    assert code == 3, output
    assert not list(tmp_path.glob("checkpoints/*/*.ckpt")) and "no checkpoint is written of it" in output
