"""Runs the program with tensor parallelism: its own launcher and torchrun, every verb, what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.__main__ import main
from tests.cli.conftest import Program, Said
from tests.log import untimed
from tests.shapes import SHARED

pytestmark = pytest.mark.slow
Config = Callable[..., Path]
SIZES = {"max_position_embeddings": 16, "n_layers": 2, "d_model": 16}
ONE_PROCESS = ["--trainer.strategy", "auto", "--trainer.devices", "1"]
PROMPTS = json.dumps([f"The {word}" for word in "cat dog house garden river".split()])


def strategy(tp: int, devices: int, **options: object) -> list[str]:
    words = [
        "--trainer.strategy",
        "gpt_lightning.TensorParallelDDPStrategy",
        "--trainer.devices",
        str(devices),
    ]
    for name, value in {"tensor_parallel_size": tp, **options}.items():
        words += [f"--trainer.strategy.{name}", str(value).lower()]
    return words


def launch(folder: Path, *words: str, torchrun: int = 0) -> None:
    """Runs the program in a new interpreter for each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torchrun)]
    command = [sys.executable, *(launcher if torchrun else []), "-m", "gpt_lightning", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # several ranks share the cores
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def scalars(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def assert_equal_curves(folder: Path, one: str, other: str) -> None:
    for name, tolerance in (("train/loss", 2e-6), ("val/loss", 1e-6), ("train/grad_norm", 1e-5)):
        expected = scalars(folder / one, name)
        assert scalars(folder / other, name) == pytest.approx(expected, abs=tolerance), name


def test_either_launcher_runs_what_one_process_runs(
    program: Program, tiny_config: Config, tmp_path: Path
) -> None:
    fit = ["fit", "--config", str(tiny_config(trainer={"gradient_clip_val": 0.5})), "--run_name"]
    program(*fit, "one")
    launch(tmp_path, *fit, "two", *strategy(2, 2))
    folder = tmp_path / "checkpoints"
    assert_equal_curves(folder, "one", "two")
    predict = ["predict", "--ckpt_path", str(folder / "two" / "last.ckpt"), "--data.prompts", PROMPTS]
    program(*predict, "--output", "one.jsonl", *ONE_PROCESS)
    launch(tmp_path, *predict, "--output", "two.jsonl", *strategy(1, 2))
    launch(tmp_path, *predict, "--output", "torchrun.jsonl", *strategy(2, 2), torchrun=2)
    for name in ("two.jsonl", "torchrun.jsonl"):
        assert (tmp_path / name).read_text() == (tmp_path / "one.jsonl").read_text()


def test_every_verb_gives_the_numbers_of_one_process(
    program: Program, tiny_config: Config, tmp_path: Path
) -> None:
    config = str(tiny_config(trainer={"gradient_clip_val": 0.5}))
    fit = ["fit", "--config", config, "--run_name"]
    program(*fit, "one", "--data.batch_size", "8")
    done = program(*fit, "four", *strategy(2, 4), ranks=4)
    assert done.err.count("step 6: train/loss") == 1 and "sync_dist" not in done.err
    (count,) = (line.split(";")[0] for line in untimed(done.err).splitlines() if line.startswith("model of "))
    program(*fit, "sequence", *strategy(2, 4, sequence_parallel=True), ranks=4)
    folder = tmp_path / "checkpoints"
    assert_equal_curves(folder, "one", "four")
    assert_equal_curves(folder, "one", "sequence")

    checkpoint = ["--ckpt_path", str(folder / "four" / "last.ckpt")]
    (many,) = validation_lines(program("validate", *checkpoint, ranks=4))  # with the saved strategy
    (test,) = validation_lines(program("test", *checkpoint, ranks=4))
    (one,) = validation_lines(program("validate", *checkpoint, "--config", config))
    assert many == pytest.approx(one, rel=1e-7) and test == pytest.approx(one, rel=1e-7)

    words = ["predict", *checkpoint, "--data.prompts", PROMPTS]
    alone = program(*words, "--output", "one.jsonl", *ONE_PROCESS)
    together = program(*words, "--output", "four.jsonl", *strategy(2, 4), ranks=4)
    program(*words, "--output", "two.jsonl", *strategy(2, 2), ranks=2)
    for name in ("four.jsonl", "two.jsonl"):
        assert (tmp_path / name).read_text() == (tmp_path / "one.jsonl").read_text()
    assert alone.out == together.out

    resumed = program(*fit, "one", "--ckpt_path", "last", "--trainer.max_steps", "7")
    assert count in resumed.err, "the parameters of one part were shown"


def test_replicas_that_share_give_the_numbers_of_one_process(
    program: Program, tiny_config: Config, tmp_path: Path
) -> None:
    config = str(tiny_config(trainer={"gradient_clip_val": 0.5}))
    fit = ["fit", "--config", config, "--run_name"]
    program(*fit, "one", "--data.batch_size", "8")
    program(*fit, "shared", *strategy(1, 2, shard_replicas="full"), ranks=2)
    folder = tmp_path / "checkpoints"
    assert_equal_curves(folder, "one", "shared")
    checkpoint = ["--ckpt_path", str(folder / "shared" / "last.ckpt")]
    (many,) = validation_lines(program("validate", *checkpoint, ranks=2))  # with the saved strategy
    (one,) = validation_lines(program("validate", *checkpoint, "--config", config))
    assert many == pytest.approx(one, rel=1e-7)
    words = ["predict", *checkpoint, "--data.prompts", PROMPTS]
    program(*words, "--output", "one.jsonl", *ONE_PROCESS)
    program(*words, "--output", "two.jsonl", ranks=2)
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def validation_lines(done: Said) -> list[float]:
    return [float(line.split("│")[2]) for line in done.out.splitlines() if "/loss" in line]


@pytest.mark.parametrize("optimizer, shape", [("adamw", {"n_heads": 4}), ("muon", SHARED)])
def test_a_sharded_run_is_resumed_and_consolidated(
    optimizer: str,
    shape: dict[str, Any],
    program: Program,
    tiny_config: Config,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = {"config": {**SIZES, **shape}, "optimizer": {"name": optimizer}}
    config = str(tiny_config(model=model))
    program("fit", "--config", config, *strategy(2, 2, save_sharded=True), ranks=2)
    folder = tmp_path / "checkpoints" / "tiny"
    assert (folder / "last.ckpt").is_dir()
    resume = ["--ckpt_path", "last", "--trainer.max_steps", "8"]
    done = program("fit", "--config", config, *strategy(4, 4, save_sharded=True), *resume, ranks=4)
    assert f"resuming: {folder / 'last.ckpt'}" in done.err
    with pytest.raises(SystemExit) as exit:
        program("predict", "--ckpt_path", str(folder / "last.ckpt"), "--data.prompts", "The")
    assert exit.value.code == 2 and "gpt-lightning consolidate" in capfd.readouterr().err
    program("consolidate", "--ckpt_path", str(folder / "last.ckpt"), "--output", "whole.ckpt")
    program("predict", "--ckpt_path", "whole.ckpt", "--data.prompts", PROMPTS, "--output", "one.jsonl")
    words = ["predict", "--ckpt_path", str(folder / "last.ckpt"), "--data.prompts", PROMPTS]
    program(*words, "--output", "two.jsonl", *strategy(2, 2), ranks=2)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (
            strategy(2, 3),
            "trainer.devices=3 a node is not divisible by trainer.strategy.tensor_parallel_size=2",
        ),
        (
            strategy(4, 4),
            "model.config.n_heads=2 is not divisible by trainer.strategy.tensor_parallel_size=4",
        ),
        (
            [*strategy(4, 4), "--model.config.n_heads", "4", "--model.config.n_kv_heads", "2"],
            "model.config.n_kv_heads=2 is not divisible by trainer.strategy.tensor_parallel_size=4",
        ),
        ([*strategy(2, 2), "--model.config.d_ff", "61"], "model.config.d_ff=61 is not divisible"),
        (
            [*strategy(2, 2, sequence_parallel=True), "--data.seq_len", "15"],
            "data.seq_len=15 is not divisible by trainer.strategy.tensor_parallel_size=2",
        ),
        (strategy(0, 2), "trainer.strategy.tensor_parallel_size=0 is below 1"),
        (
            [*strategy(2, 2, save_sharded=True), "--trainer.callbacks+=EMAWeightAveraging"],
            "trainer.callbacks: EMAWeightAveraging keeps averages in one file",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: list[str],
    message: str,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(tiny_config()), *words])
    captured = capsys.readouterr().err
    assert exit.value.code == 2
    assert captured.splitlines()[-1].startswith(f"error: {message}"), captured
    assert "Traceback" not in captured and not (tmp_path / "checkpoints").exists()
