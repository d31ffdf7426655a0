"""Holds a fit with evaluations to one without, bit for bit, and what it logs to what the verb finds."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.__main__ import main

Config = Callable[..., Path]
DROPOUT = {"max_position_embeddings": 16, "n_layers": 2, "n_heads": 2, "d_model": 16, "dropout": 0.2}
QUESTIONS = [
    {"question": "The cat sees a", "choices": ["red", "house", "garden"], "answer": "red"},
    {"question": "A dog finds the old river", "choices": ["and", "under it", "with"], "answer": 1},
    {"question": "", "choices": ["the", "a"], "answer": 0},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return path


def fit(config: Path, name: str, *words: str) -> Path:
    main(["fit", "--config", str(config), "--run_name", name, *words])
    return config.parent / "checkpoints" / name


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.startswith("throughput/")
    }


def trained(folder: Path) -> Any:
    contents = torch.load(folder / "last.ckpt", weights_only=True)
    return [contents[key] for key in ("state_dict", "optimizer_states", "resume", "TextDataModule")]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for part, other_part in zip(one, other):
            assert_same(part, other_part)
    else:
        assert one == other


@pytest.fixture
def dropping(tiny_config: Config) -> Path:
    """A run that draws random numbers at every step."""
    return tiny_config(model={"config": DROPOUT}, trainer={"accumulate_grad_batches": 2})


def test_a_run_with_evaluations_is_the_run_without(dropping: Path, questions: Path) -> None:
    plain = fit(dropping, "plain")
    asked = fit(dropping, "asked", "--evaluate.tasks", str(questions), "--evaluate.every_n_steps", "2")
    assert_same(trained(asked), trained(plain))
    logged = curves(asked)
    for name in ("eval/mine/acc", "eval/mine/acc_norm"):
        assert [step for step, _ in logged.pop(name)] == [2, 4, 6]
    assert logged == curves(plain)


def test_a_resumed_run_evaluates_as_the_run_that_was_never_stopped(dropping: Path, questions: Path) -> None:
    words = ("--evaluate.tasks", str(questions), "--evaluate.every_n_steps", "1")
    whole = fit(dropping, "whole", *words, "--checkpoint.save_top_k", "-1")
    again = fit(dropping, "again", *words, "--ckpt_path", str(whole / "step000003.ckpt"))
    assert_same(trained(again), trained(whole))
    after = {name: [each for each in values if each[0] > 3] for name, values in curves(whole).items()}
    assert curves(again) == after and len(after["eval/mine/acc"]) == 3


def test_after_each_validation_by_default_and_as_the_verb_finds(
    tiny_config: Config, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit(tiny_config(), "run", "--evaluate.tasks", str(questions))
    logged = curves(folder)
    assert [step for step, _ in logged["eval/mine/acc"]] == [3, 6]
    capsys.readouterr()
    output = folder / "items.jsonl"
    words = ["--ckpt_path", str(folder / "last.ckpt"), "--tasks", str(questions), "--output", str(output)]
    main(["evaluate", "--device", "cpu", *words])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for name in ("acc", "acc_norm"):
        mean = sum(row[name] for row in rows) / len(QUESTIONS)
        assert logged[f"eval/mine/{name}"][-1][1] == pytest.approx(mean)


def test_a_run_without_validations_evaluates_at_its_end(tiny_config: Config, questions: Path) -> None:
    folder = fit(tiny_config(trainer={"limit_val_batches": 0}), "run", "--evaluate.tasks", str(questions))
    assert [step for step, _ in curves(folder)["eval/mine/acc"]] == [6]


def test_every_logger_has_the_figures(tiny_config: Config, questions: Path, tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    fit(tiny_config(trainer={"logger": logger}), "run", "--evaluate.tasks", str(questions))
    (path,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["step"] for row in rows if row.get("eval/mine/acc")] == ["3", "6"]


def test_a_checkpoint_may_be_kept_by_its_answers(tiny_config: Config, questions: Path) -> None:
    words = ("--checkpoint.monitor", "eval/mine/acc_norm", "--checkpoint.mode", "max")
    folder = fit(tiny_config(), "run", "--evaluate.tasks", str(questions), *words)
    values = curves(folder)["eval/mine/acc_norm"]
    best = max(values, key=lambda each: each[1])[0]
    assert [path.name for path in folder.glob("step*.ckpt")] == [f"step{best:06d}.ckpt"]


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--evaluate.tasks", "none.jsonl"], "tasks=none.jsonl does not exist"),
        (["--evaluate.tasks", ""], "evaluate.tasks='' names nothing"),
        (["--evaluate.every_n_steps", "0"], "evaluate.every_n_steps=0 is below 1"),
        (["--evaluate.limit", "0"], "evaluate.limit=0 is below 1"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    words: list[str], problem: str, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    with pytest.raises(SystemExit) as exit:
        fit(config, "run", *words)
    assert exit.value.code == 2
    assert problem in capsys.readouterr().err
    assert not (config.parent / "checkpoints").exists()


def test_no_file_of_options_names_a_task_that_can_hold_code(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "own.yaml"
    task.write_text(yaml.safe_dump({"task": "own"}))
    with pytest.raises(SystemExit) as exit:
        fit(tiny_config(evaluate={"tasks": [str(task)]}), "run")
    assert exit.value.code == 2
    assert "only the command line may name it" in capsys.readouterr().err
