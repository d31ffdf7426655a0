"""A run leaves a page that needs no network, and `report` makes one of any runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Program
from tests.report.pages import Page

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
    assert re.search(r"data\.tokenizer bpe:300", text) and re.search(r"train \d+ [\d,]+ \d\d\.\d %", text)
    assert page.fetches() == [] and page.handlers() == [] and len(page.scripts) == 4

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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "RUN=.*nothing is no folder; name a run"),
        (["empty"], "RUN=.*empty holds no events"),
        ([], "holds no run that logged; run `gpt-lightning fit`"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(
    tmp_path: Path, program: Program, capfd: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    (tmp_path / "checkpoints" / "empty").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        program("report", *words)
    assert end.value.code == 2 and re.search(line, capfd.readouterr().err)
    assert not [*tmp_path.rglob("*.html")]
