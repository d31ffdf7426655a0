"""The words of a sweep: what is refused before anything is written, and a real sweep that is killed."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.__main__ import main
from gpt_lightning.sweep.search import UNMEASURED, Outcome

ROOT = Path(__file__).parent.parent.parent
RATE = "model.optimizer.learning_rate"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is varied"),
        (["--vary", "model.optimizer.learning_rat=1e-3..1e-2"], "mean --model.optimizer.learning_rate"),
        (["--vary", "learning_rate=1e-3,1e-2"], "unrecognized arguments: --vary learning_rate\ndid you mean"),
        (["--vary", "model.config.n_layers=2,four"], "model.config.n_layers=four does not fit; give int"),
        (["--vary", f"{RATE}=1e-2..1e-3"], "the first number must be below the second"),
        (["--vary", f"{RATE}=-1.0..-0.5"], f"{RATE}=-1.0 is not above 0"),
        (["--vary", "model.config.n_heads=3,5"], "n_heads=3"),
        (["--vary", f"{RATE}=1e-3..1e-2", f"--{RATE}=0.1"], f"{RATE} is varied, and given too"),
        (["--vary", f"{RATE}=1e-3..1e-2", "--trials", "0"], "trials=0 is below 1"),
        (["--vary", "run_name=a,b"], "is for the sweep to choose"),
        (["--vary", f"{RATE}=1e-3..1e-2", "--trainer.logger", "false"], "judged by their curves"),
        (
            ["--vary", f"{RATE}=1e-3,1e-2", "--trainer.val_check_interval=40", "--trainer.max_steps", "30"],
            "trainer.val_check_interval=40 is above trainer.max_steps=30, and trials need a val/loss; lower",
        ),
        (["--vary", f"{RATE}=1e-3..1e-2", "--run_name", "a/b"], "not a plain folder name"),
        (["--vary", f"{RATE}=1e-3..1e-2", "--max_steps", "5"], "did you mean --trainer.max_steps"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["sweep", *words])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert not [*tmp_path.iterdir()]


def test_one_of_the_combinations_has_to_be_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("gpt_lightning.cli.sweep.search", lambda sweep, *_: asked.append(sweep) or [])
    with pytest.raises(SystemExit):  # since no trial came to its end
        main(["sweep", "--vary", "model.config.n_heads=3,4", "--vary", "model.config.d_model=128,96"])
    assert len(asked) == 1


def test_trials_that_ended_unmeasured_are_not_said_to_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    found = [Outcome(0, {RATE: "0.001"}, UNMEASURED), Outcome(1, {RATE: "0.01"}, "diverged")]
    monkeypatch.setattr("gpt_lightning.cli.sweep.search", lambda *_: found)
    with pytest.raises(SystemExit) as exit:
        main(["sweep", "--vary", f"{RATE}=0.001,0.01"])
    said = capsys.readouterr()
    assert exit.value.code == 2 and "0.001  ended without a val/loss" in said.out
    assert "error: no trial has a val/loss, though some came to their end; have them" in said.err


def test_no_name_is_the_name_by_default_as_of_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr("gpt_lightning.cli.sweep.search", lambda sweep, *_: asked.append(sweep) or [])
    for name in ("~", "null"):
        with pytest.raises(SystemExit):  # since no trial came to its end
            main(["sweep", "--vary", f"{RATE}=1e-3,1e-2", f"--run_name={name}"])
    assert {sweep.folder.name for sweep in asked} == {"quickstart-sweep"}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_best_command_repeats_the_best_trial(
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "--config", str(tiny_config()), "--vary", f"{RATE}=0.001,1e9,0.02", "--trials", "3"]
    program = [sys.executable, "-m", "gpt_lightning", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("trial 1 of 3: finished"):
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    ended = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "trial 1 of 3" not in ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert [row[0] for row in rows] == ["trial", "3", "1", "2"]
    assert rows[3][1:3] == ["1e9", "diverged:"]
    logs = [(tmp_path / "checkpoints" / "tiny-sweep" / f"trial0{n}.log").read_text() for n in (1, 3)]
    assert [text.count("training to step") for text in logs] == [1, 1]
    sweep_folder = tmp_path / "checkpoints" / "tiny-sweep"
    assert (sweep_folder / "losses.png").exists() == (sweep_folder / "losses.html").exists()

    command = shlex.split(ended.stderr.strip().splitlines()[-1])
    main(command[command.index("fit") :])
    losses = {}
    for run in ("tiny-sweep-best", "tiny-sweep-trial03"):
        events = EventAccumulator(str(tmp_path / "checkpoints" / run / "logs"))
        events.Reload()
        losses[run] = [event.value for event in events.Scalars("val/loss")]
    assert losses["tiny-sweep-best"] == losses["tiny-sweep-trial03"]
    assert f"{min(losses['tiny-sweep-best']):.4f}" == rows[1][1]
    assert re.search(r"generate --ckpt_path checkpoints/tiny-sweep-trial03/last.ckpt", ended.stderr)
