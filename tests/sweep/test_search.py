"""Sweeps of processes that stand in for fits: each trial once, to its end, whatever comes between."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gpt_lightning.exit_codes import UserError
from gpt_lightning.sweep import process
from gpt_lightning.sweep.process import Signals, SweepStopped
from gpt_lightning.sweep.search import Outcome, Sweep, open_sweep, search
from gpt_lightning.sweep.space import read_varied
from gpt_lightning.sweep.table import save_plot, table

pytest.importorskip("optuna")
FIT = Path(__file__).with_name("fit.py")
N_STEPS = 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lays the events of runs ready: that of x comes down from x + 1 to x + 1/4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "POLL_SECONDS", 0.02)
    for x in ("0", "1", "2", "3", "4", "9", "nan"):
        for step in range(1, N_STEPS + 1):
            loss = 7.0 if x == "nan" else float(x) + 1 / step
            event = Event(step=step, wall_time=step)
            event.summary.CopyFrom(Summary(value=[Summary.Value(tag="val/loss", simple_value=loss)]))
            with open(f"events-{x}-{step}", "wb") as file:
                RecordWriter(file).write(event.SerializeToString())
    return tmp_path


def sweep_of(*vary: str, trials: int = 12) -> Sweep:
    program = (sys.executable, "-S", str(FIT))
    return Sweep(Path("checkpoints/s"), read_varied(vary), ("--trainer.max_steps", "4"), program, trials)


def run(sweep: Sweep, tell: Callable[[str], None] = lambda line: None) -> list[Outcome]:
    open_sweep(sweep)
    with Signals() as signals:
        return search(sweep, signals, tell)


def started() -> list[str]:
    return Path("started.txt").read_text().split()


def test_each_combination_is_tried_once_and_the_best_is_first() -> None:
    found = run(sweep_of("x=2,0,1"))
    assert [(each.values["x"], each.loss, each.step) for each in found] == [
        ("0", 0.25, 4),
        ("1", 1.25, 4),
        ("2", 2.25, 4),
    ]
    assert started() == ["s-trial01", "s-trial02", "s-trial03"]
    again = run(sweep_of("x=2,0,1"))
    assert again == found and len(started()) == 3


def test_what_fails_is_recorded_and_the_sweep_goes_on() -> None:
    found = run(sweep_of("x=bad,nan,1"))
    assert [each.state for each in found] == ["finished", "diverged", "refused"]
    assert found[2].note == "x=bad does not fit; give a number"
    lines = table(found, read_varied(["x=bad,nan,1"])).splitlines()
    assert lines[0].split() == ["trial", "val/loss", "at", "step", "x"]
    assert lines[1].split() == ["3", "1.2500", "4", "1"] and "the loss is nan" in lines[2]


def test_what_measured_nothing_has_ended_and_not_failed() -> None:
    for step in range(1, N_STEPS + 1):
        Path(f"events-none-{step}").touch()
    lines: list[str] = []
    found = run(sweep_of("x=none,1"), lines.append)
    assert [(each.values["x"], each.state) for each in found] == [
        ("1", "finished"),
        ("none", "ended without a val/loss"),
    ]
    assert "trial 1 of 2: ended without a val/loss" in lines


def test_what_diverged_is_no_result_when_it_is_proposed_again() -> None:
    optuna = pytest.importorskip("optuna")
    found = run(sweep_of("x=nan,1", "y=1.00001..1.00002", trials=8))  # of a y that is 1 in words
    assert len(started()) == 2 and [each.state for each in found].count("repeated") == 6
    study = optuna.load_study(study_name="sweep", storage="sqlite:///checkpoints/s/trials.db")
    results = {(trial.params["x"], trial.state.name, trial.value) for trial in study.trials}
    assert results == {("1", "COMPLETE", 1.25), ("nan", "PRUNED", 7.0), ("nan", "PRUNED", None)}


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_goes_on_where_it_was(number: signal.Signals, exit_code: int) -> None:
    Path("wait-0").touch()

    def stop(line: str) -> None:
        if line.startswith("  step 2:") and "val/loss 0.5" in line:
            os.kill(os.getpid(), number)

    with pytest.raises(SweepStopped) as stopped:
        run(sweep_of("x=2,0,1"), stop)
    assert stopped.value.exit_code == exit_code
    assert Path("checkpoints/s-trial02/stopped.txt").read_text() == number.name
    found = run(sweep_of("x=2,0,1"))
    best = [(each.values["x"], each.loss, each.step) for each in found[:2]]
    assert best == [("0", 0.25, 4), ("1", 1.25, 4)]
    assert started() == ["s-trial01", "s-trial02", "s-trial02", "s-trial03"]


def test_what_is_worse_than_others_at_its_step_is_given_up_in_order() -> None:
    Path("wait-9").touch()
    found = run(sweep_of("x=1,2,3,9"))
    assert [each.state for each in found] == ["finished"] * 3 + ["given up"]
    assert found[3].values == {"x": "9"} and found[3].step is not None and found[3].step <= 2
    assert Path("checkpoints/s-trial04/stopped.txt").read_text() == "SIGTERM"


@pytest.mark.slow
def test_proposals_are_the_same_whether_or_not_the_sweep_was_stopped() -> None:
    # None is given up: whether one is seen to fall behind before it ends is a matter of time.
    at_once = run(replace(sweep_of("x=0..4", trials=5), gives_up=False))
    assert len(at_once) == 5 and {each.values["x"] for each in at_once} <= {*"01234"}
    shutil.rmtree("checkpoints")
    for trials in (1, 3, 5):
        in_parts = run(replace(sweep_of("x=0..4", trials=trials), gives_up=False))
    assert in_parts == at_once


def test_other_words_and_other_trials_are_refused() -> None:
    run(sweep_of("x=0,1"))
    with pytest.raises(UserError, match="begun by other words"):
        open_sweep(sweep_of("x=0,2"))
    shutil.rmtree("checkpoints/s")
    with pytest.raises(UserError, match="trial of another sweep"):
        open_sweep(sweep_of("x=0,1"))
    assert not Path("checkpoints/s").exists()


@pytest.mark.slow
def test_plots_are_written_without_a_network(tmp_path: Path) -> None:
    varied = read_varied(["model.optimizer.learning_rate=1e-3..1e-1", "n=2,4"])
    found = [
        Outcome(number, {"model.optimizer.learning_rate": rate, "n": n}, state, loss, 4)
        for number, (rate, n, state, loss) in enumerate(
            [("0.001", "2", "finished", 4.0), ("0.01", "2", "finished", 3.0), ("0.1", "4", "given up", 5.0)]
        )
    ]
    save_plot(found, varied, [tmp_path / "losses.html", tmp_path / "losses.png"])
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "losses.html").read_text()
    assert "learning_rate" in page and 'src="http' not in page
