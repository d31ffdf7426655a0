"""Holds `evaluate` to its table, its file of items, and one line for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from tests.cli.test_generate import write_checkpoint

Run = Callable[..., tuple[str, str, int]]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "The cat sees the", "choices": ["dog.", "naïve king"], "answer": "dog."},
    {"question": "从前有一个", "choices": ["国王", "The cat"], "answer": 1},
    {"question": "", "choices": ["The", "从"], "answer": 0},
    {"question": "The cat", "choices": ["sees", "dog", "the"], "answer": 2},
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The verb, in a folder with a checkpoint: standard output, the messages, the exit code."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")

    def run(*words: str) -> tuple[str, str, int]:
        code = 0
        try:
            main(["evaluate", "--device", "cpu", *words])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return *capsys.readouterr(), code

    return run


def write(path: Path, rows: list[dict[str, Any]] = QUESTIONS) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path.name


def test_the_table_is_the_mean_of_the_items(run: Run, tmp_path: Path) -> None:
    names = write(tmp_path / "mine.jsonl"), write(tmp_path / "other one.jsonl", QUESTIONS[:2])
    out, err, code = run("--tasks", ",".join(names), "--output", "items.jsonl")
    assert code == 0 and err.splitlines() == ["checkpoint: checkpoints/run/last.ckpt", "items: items.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["question"] for row in rows] == [row["question"] for row in [*QUESTIONS, *QUESTIONS[:2]]]
    assert [row["answer"] for row in rows[:4]] == [0, 1, 0, 2]
    head, first, second = out.splitlines()
    assert head.split() == ["task", "items", "acc", "acc_norm"]
    for line, name, own in ((first, "mine", rows[:4]), (second, "other one", rows[4:])):
        assert line.startswith(name) and f" {len(own)} " in line
        means = [sum(row[figure] for row in own) / len(own) for figure in ("acc", "acc_norm")]
        assert line.replace(name, "").split()[1::2] == [f"{mean:.4f}" for mean in means]


def test_acc_norm_divides_by_characters(run: Run, tmp_path: Path) -> None:
    """Here of a long choice and a short one, in a script of three bytes a character."""
    write(tmp_path / "mine.jsonl", [{"question": "从", "choices": ["前有一个国王前有", "国"], "answer": 0}])
    run("--tasks", "mine.jsonl", "--output", "items.jsonl")
    row = json.loads((tmp_path / "items.jsonl").read_text(encoding="utf-8"))
    long, short = row["log_probabilities"]
    assert long < short and long / 8 > short  # the characters turn the order round, by which acc_norm goes
    assert (row["acc"], row["acc_norm"]) == (0, 1)


def test_options_change_no_figure(run: Run, tmp_path: Path) -> None:
    name = write(tmp_path / "mine.jsonl")
    out = run("--tasks", name)[0]
    assert run("--tasks", f"[{name}]", "--batch_tokens", "1")[0] == out
    assert " 2 " in run("--tasks", name, "--limit", "2")[0]


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--tasks", "none.jsonl"], "tasks=none.jsonl does not exist; check the path"),
        (["--tasks", " , "], "names none"),
        (["--tasks", "mine.jsonl,./mine.jsonl"], "has two tasks of the name mine; rename one file"),
        (["--tasks", "bad.jsonl"], "bad.jsonl, line 2: answer=5 is no index of 2 choices; give an index"),
        (["--tasks", "long.jsonl"], "long.jsonl, line 1: choices[1]: its length of"),
        (["--tasks", "mine.jsonl", "--output", "none/items.jsonl"], "is no file that can be written"),
        (["--tasks", "mine.jsonl", "--output", ""], "is no file that can be written"),
        (["--tasks", "mine.jsonl", "--limit", "0"], "limit=0 is below 1"),
        (["--tasks", "mine.jsonl", "--batch_tokens", "0"], "batch_tokens=0 is below 1"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], problem: str, run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl")
    write(tmp_path / "bad.jsonl", [QUESTIONS[0], {**QUESTIONS[0], "answer": 5}])
    write(tmp_path / "long.jsonl", [{**QUESTIONS[0], "choices": ["dog.", "dog. " * 30]}])
    out, err, code = run(*words)
    assert code == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and problem in last
    assert not (tmp_path / "items.jsonl").exists()
