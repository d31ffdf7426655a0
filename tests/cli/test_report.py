"""A run leaves a page that needs no network, and `report` makes one of any runs."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.checkpoint import load_model
from gpt_lightning.cli.closing import leave_report, tell_how_to_go_on, tell_of_other_logger
from gpt_lightning.report.run import read_run
from tests.cli.conftest import Program
from tests.report.pages import Page
from tests.report.test_report import write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def rows_of(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


@pytest.mark.slow
def test_a_fit_leaves_its_report_and_old_runs_get_one(
    tmp_path: Path, program: Program, tiny_config: Callable[..., Path]
) -> None:
    config = str(tiny_config(samples={"prompts": [HOSTILE, "梦"]}))
    said = program("fit", "--config", config)
    folder = tmp_path / "checkpoints" / "tiny"
    assert f"report: {folder / 'report.html'}" in said.err
    page = Page(folder / "report.html")
    text = rows_of(page)
    assert "step 6" in text and "梦" in text and HOSTILE in text
    assert re.search(r"data\.tokenizer bpe:300", text) and re.search(r"of all( [\d.]+ %){2}", text)
    assert page.fetches() == [] and page.handlers() == [] and len(page.scripts) == 4

    # The notes are true of what was trained.
    run = read_run(folder, "tiny")
    assert [sample.prompt for sample in run.samples[6]] == [HOSTILE, "梦"]
    model, tokenizer = load_model(folder / "last.ckpt")
    assert sum(run.facts["parameters"].values()) == sum(each.numel() for each in model.parameters())
    assert sum(split["documents"] for split in run.facts["corpus"].values()) == 40
    assert run.facts["changed"]["data"]["tokenizer"] == "bpe:300" and "ckpt_path" not in run.facts["changed"]
    ids = [tokenizer.eos_token_id, *tokenizer.encode("".join(token.text for token in run.held_out))]
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    expected = [float(logprobs[place, ids[place + 1]]) for place in range(8)]
    assert [token.logprob for token in run.held_out[:8]] == pytest.approx(expected, abs=1e-3)

    # Another run; and both side by side, of the one only what every version has left.
    program("fit", "--config", config, "--run_name", "other", "--model.optimizer.learning_rate", "0.003")
    for file in ("config.yaml", "report.html"):
        (folder / file).unlink()
    said = program("report", "tiny", str(tmp_path / "checkpoints" / "other"), "--png", "slides")
    both = Page(tmp_path / "checkpoints" / "report.html")
    assert "2 runs, the best first" in rows_of(both)
    assert {path.name for path in (tmp_path / "slides").iterdir()} >= {"loss.png", "learning-rate.png"}
    assert (tmp_path / "slides" / "loss.png").read_bytes().startswith(b"\x89PNG")
    specs = json.loads(both.scripts[0])
    values = specs["loss"]["datasets"]["points"]
    assert {row["name"] for row in values} == {"tiny", "other"}
    assert {row["kind"] for row in values} == {"train", "val"}


def test_several_runs_are_a_table_in_the_terminal(tmp_path: Path, program: Program) -> None:
    for name, loss, rate in (("a", 4.0, 0.01), ("b\x1b[31m", 3.0, 0.003)):
        write_run(tmp_path / "checkpoints" / name, {10: loss}, model={"learning_rate": rate})
    said = program("report", "a", "b\x1b[31m")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0][0] == "run" and lines[0][-1] == "learning_rate"
    assert [(line[0], line[1], line[-1]) for line in lines[1:]] == [
        ("b\\x1b[31m", "3", "0.003"),  # the best first, and no name colours a terminal
        ("a", "4", "0.01"),
    ]
    assert program("report", "a").out == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "RUN=.*nothing is no folder; name a run"),
        (["empty", "othr"], "RUN=othr is no run in .*checkpoints; did you mean other\\?$"),
        (["empty"], "RUN=.*empty holds no events of TensorBoard, .*; name the folder of a run that logged$"),
        (["other"], "RUN=.*other holds no events of TensorBoard, .*; train without --trainer.logger, or"),
        ([], "holds no run that logged; run `gpt-lightning fit`"),
        (["\udce9/logged"], "^error: RUN=.*/logged has a name that is not UTF-8; rename it, or call"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(
    tmp_path: Path, program: Program, capfd: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    for name in ("empty", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "other" / "config.yaml").touch()
    write_run(tmp_path / "logged", {10: 3.0})
    os.mkdir(tmp_path / "\udce9")
    shutil.copytree(tmp_path / "logged", tmp_path / "\udce9" / "logged")
    with pytest.raises(SystemExit) as end:
        program("report", *words)
    assert end.value.code == 2 and re.search(line, capfd.readouterr().err, re.M)
    assert not [*tmp_path.rglob("*.html")]


@pytest.mark.parametrize("option", ["output", "png"])
def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, program: Program, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    write_run(tmp_path / "checkpoints" / "run", {10: 3.0})
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        program("report", "run", f"--{option}", "file/x")
    assert end.value.code == 2 and f"{option}=file/x cannot be written" in capfd.readouterr().err


def test_a_fault_in_the_report_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0})
    (folder / "report.html").mkdir()  # in whose place no file can be put
    leave_report(folder)
    said = capsys.readouterr().err
    assert said.startswith("warning: the report could not be written (") and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "altair", None)
    leave_report(folder)
    assert "altair" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_only_a_run_that_tensorboard_shows_is_said_to_be_watched_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: type[TensorBoardLogger | CSVLogger]
) -> None:
    savers: Any = {"checkpoint_callbacks": [], "checkpoint_callback": None}
    for place, shown in (("run", tmp_path), ("elsewhere", tmp_path / "elsewhere")):
        trainer: Any = SimpleNamespace(loggers=[kind(tmp_path / place)], **savers)
        tell_how_to_go_on(trainer, tmp_path / "run", TextSamples())
        said = capsys.readouterr().err.splitlines()
        assert (f"tensorboard --logdir {shown}" in said) is (kind is TensorBoardLogger)
        assert ("tensorboard" in str(said)) is (kind is TensorBoardLogger)


def test_loggers_of_which_no_report_comes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, elsewhere, csv = TensorBoardLogger(tmp_path), TensorBoardLogger("tb"), CSVLogger(tmp_path)
    tell_of_other_logger([csv, ours], tmp_path)
    assert capsys.readouterr().err == ""
    tell_of_other_logger(csv, tmp_path)
    assert "no report, and TensorBoard no curves" in capsys.readouterr().err
    tell_of_other_logger([csv, elsewhere], tmp_path)
    assert "no report, and TensorBoard its curves elsewhere" in capsys.readouterr().err


def test_samples_say_when_they_were_written_and_what_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = TextSamples(["Once", ""])
    samples.latest, samples.step = ["Once upon", "The Once"], 1200
    trainer: Any = SimpleNamespace(loggers=[], checkpoint_callbacks=[], checkpoint_callback=None)
    tell_how_to_go_on(trainer, tmp_path, samples)
    heading, *texts = filter(None, capsys.readouterr().out.splitlines())
    assert "step 1,200" in heading and texts == ["Once |  upon", " | The Once"]


def test_a_run_without_events_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_report(tmp_path)
    assert capsys.readouterr().err == "" and not [*tmp_path.iterdir()]
