"""A killed run, resumed, is the run that was never killed: sample ids, the loss's bits, rates, weights."""

import signal
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from tests.faults.harness import Process, run, weights_hash
from tests.faults.runs import BATCHES_PER_EPOCH, MAX_STEPS, TOPOLOGIES, callback, newest_last, write_run
from tests.faults.trace import differences, read_trace

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# In mid-epoch, when the checkpoint is saved and its validation is not begun, at an epoch's last batch, at its
# end, on the next one's first batch, in the middle of a validation, before the last validation of all.
MOMENTS = (
    "batch_end 7",
    "validation_start 15",
    f"batch_end {BATCHES_PER_EPOCH}",
    f"epoch_end {BATCHES_PER_EPOCH}",
    f"batch_end {BATCHES_PER_EPOCH + 1}",
    "in_validation 25",
    f"validation_start {MAX_STEPS}",
)


def run_whole(folder: Path, **sections: Any) -> str:
    ranks = sections.pop("ranks", 1)
    code, output = run(write_run(folder, "whole", **sections), folder, ranks=ranks)
    assert code == 0, output
    ends = [row["step"] for row in read_trace(folder / "whole") if row["at"].startswith("epoch end")]
    steps = sections.get("trainer", {}).get("max_steps", MAX_STEPS)
    assert ends == list(range(BATCHES_PER_EPOCH, steps, BATCHES_PER_EPOCH)) != []
    return weights_hash(newest_last(folder, "whole"))


def assert_same(folder: Path, name: str, whole: str, ranks: int = 1) -> None:
    for rank in range(ranks):
        assert differences(folder / name, folder / "whole", rank) == []
    assert weights_hash(newest_last(folder, name)) == whole


def merged(*sections: dict[str, Any]) -> dict[str, Any]:
    keys = {key for section in sections for key in section}
    return {key: {k: v for s in sections for k, v in s.get(key, {}).items()} for key in keys}


@pytest.mark.parametrize(
    "accumulate, workers", [(1, (0,)), (4, (2,)), (1, (0, 2, 1))], ids=["0", "2, accumulated", "changing"]
)
def test_killed_at_every_kind_of_moment(accumulate: int, workers: tuple[int, ...], tmp_path: Path) -> None:
    settings = {
        "data": {"batch_size": 8 // accumulate},
        "trainer": {"accumulate_grad_batches": accumulate},
        # Written at every step, so that the moments are those of a checkpoint.
        "checkpoint": {"every_n_train_steps": 1},
    }
    whole = run_whole(tmp_path, **settings)
    for number, moment in enumerate([*MOMENTS, None]):
        kill = [callback("KillAt", moment=moment, saved_first=True)] if moment else []
        data = {"num_workers": workers[number % len(workers)]}
        words = write_run(tmp_path, "run", **merged(settings, {"data": data, "trainer": {"callbacks": kill}}))
        code, output = run(words, tmp_path)
        assert code == (-signal.SIGKILL if moment else 0), output
        assert ("resuming: " in output) == (number > 0)
    assert_same(tmp_path, "run", whole)


@pytest.mark.parametrize(
    "topology, precision",
    [("ddp 2", "32-true"), ("ddp 2", "bf16-mixed"), ("tp 2", "32-true"), ("tp 2 x dp 2", "bf16-mixed")],
)
def test_several_ranks_killed_together(topology: str, precision: str, tmp_path: Path) -> None:
    ranks, data_parallel, options = TOPOLOGIES[topology]
    accumulate, workers = (2, 1) if precision == "bf16-mixed" else (1, 0)
    trainer = {**options, "precision": precision, "accumulate_grad_batches": accumulate, "max_steps": 22}
    data = {"batch_size": 8 // data_parallel // accumulate, "num_workers": workers}
    settings = {"data": data, "trainer": trainer}
    whole = run_whole(tmp_path, ranks=ranks, **settings)
    for moment in ("batch_end 8", "validation_start 15", None):  # and the epoch ends after these
        kill = [callback("KillAt", moment=moment)] if moment else []
        words = write_run(tmp_path, "run", **merged(settings, {"trainer": {"callbacks": kill}}))
        codes = Process(words, tmp_path, ranks=ranks).exit_codes()
        assert (-signal.SIGKILL in codes) if moment else codes == [0] * ranks
    assert_same(tmp_path, "run", whole, ranks)


def samples_of(folder: Path, name: str, ranks: int = 1) -> dict[int, list[int]]:
    """Sample ids by optimizer step, over all ranks that read different ones."""
    found: dict[int, set[int]] = {}
    for rank in range(ranks):
        for row in read_trace(folder / name, rank):
            if row["at"].startswith("batch"):
                found.setdefault(row["step"], set()).update(i for i in row["samples"] if i >= 0)
    return {step: sorted(ids) for step, ids in found.items()}


def test_at_another_topology_the_order_is_the_same_and_the_losses_agree(tmp_path: Path) -> None:
    model = {"config": {"max_position_embeddings": 64, "n_layers": 1, "n_heads": 2, "d_model": 32}}
    code, output = run(write_run(tmp_path, "whole", model=model), tmp_path)
    assert code == 0, output
    expected = samples_of(tmp_path, "whole")
    moments = ("batch_end 10", "batch_end 20", "batch_end 30", None)
    for moment, topology in zip(moments, (None, "tp 2 x dp 2", "ddp 2", None), strict=True):
        ranks, data_parallel, options = TOPOLOGIES[topology] if topology else (1, 1, {})
        kill = [callback("KillAt", moment=moment)] if moment else []
        settings = {"data": {"batch_size": 8 // data_parallel}, "trainer": {**options, "callbacks": kill}}
        words = write_run(tmp_path, "run", model=model, **settings)
        Process(words, tmp_path, ranks=ranks).exit_codes()
    assert samples_of(tmp_path, "run", 4) == expected
    last = {row["at"]: float.fromhex(row["loss"]) for row in read_trace(tmp_path / "run") if "loss" in row}
    for row in read_trace(tmp_path / "whole"):
        if row["at"].startswith("validation"):
            assert last[row["at"]] == pytest.approx(float.fromhex(row["loss"]), rel=1e-4), row["at"]


def test_with_another_batch_the_counter_goes_on_and_a_line_says_so(tmp_path: Path) -> None:
    stop = [callback("SignalAt", moment="batch 10", name="SIGTERM")]
    code, output = run(write_run(tmp_path, "run", trainer={"callbacks": stop}), tmp_path)
    assert code == 143, output
    words = write_run(tmp_path, "run", data={"batch_size": 3}, trainer={"accumulate_grad_batches": 4})
    code, output = run(words, tmp_path, log="second.log")
    assert code == 0, output
    assert "takes 12 samples now, and took 8 before: the order goes on at sample 80" in output
    seen = [i for _, ids in sorted(samples_of(tmp_path, "run").items()) for i in ids]
    assert seen == list(range(len(seen)))


def test_last_starts_fresh_only_where_there_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": 3, "limit_val_batches": 0})
    code, output = run(words, tmp_path)
    assert code == 0 and "no checkpoint in checkpoints/run yet: starting from scratch" in output
    code, output = run([*words, "--trainer.max_steps", "4"], tmp_path, log="second.log")
    assert code == 0 and "resuming: checkpoints/run/last.ckpt" in output
    for path in (tmp_path / "checkpoints" / "run").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    code, output = run([*words, "--trainer.max_steps", "5"], tmp_path, log="third.log")
    assert code == 2 and "no checkpoint is whole" in output.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "third.log"])


def test_an_older_checkpoint_goes_on_in_a_folder_of_its_own(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": 10}, checkpoint={"save_top_k": -1})
    code, output = run(words, tmp_path)
    assert code == 0, output
    folder = tmp_path / "checkpoints" / "run"
    kept = {path.name: weights_hash(path) for path in folder.glob("*.ckpt")}
    code, output = run([*words, "--ckpt_path", str(folder / "step000005.ckpt")], tmp_path, log="second.log")
    assert code == 0, output
    assert {path.name: weights_hash(path) for path in folder.glob("*.ckpt")} == kept
    assert Checkpoint.open(folder.with_name("run-2") / "last.ckpt").step == 10


@pytest.mark.parametrize("other", ["--trainer.limit_val_batches=0", "--trainer.val_check_interval=7"])
def test_with_another_schedule_too_the_run_ends_at_its_last_step(other: str, tmp_path: Path) -> None:
    kill = [callback("KillAt", moment="validation_start 10", saved_first=True)]
    code, output = run(write_run(tmp_path, "run", trainer={"max_steps": 10, "callbacks": kill}), tmp_path)
    assert code == -signal.SIGKILL, output
    code, output = run([*write_run(tmp_path, "run", trainer={"max_steps": 10}), other], tmp_path)
    assert code == 0, output
    assert Checkpoint.open(newest_last(tmp_path, "run")).step == 10
    assert read_trace(tmp_path / "run")[-1]["at"] == "batch 10"
