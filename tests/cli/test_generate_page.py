"""`generate --show html` writes a page whose figures are those of `predict`."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Program
from tests.cli.test_generate import write_checkpoint
from tests.report.pages import Page

GENERATION = ["--generation.max_new_tokens", "40", "--generation.num_samples", "2"]


def test_the_page_tells_what_predict_tells(tmp_path: Path, program: Program) -> None:
    write_checkpoint(path := tmp_path / "checkpoints" / "run" / "last.ckpt")
    said = program("generate", "--prompt", "The old cat", "--show", "html", *GENERATION)
    assert f"page: {path.parent.relative_to(tmp_path) / 'generated.html'}" in said.err
    program("predict", "--data.prompts", "The old cat", "--generation.logprobs", "true", *GENERATION)
    lines = (path.parent / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    page = Page(path.parent / "generated.html")
    tokens = [attributes for tag, attributes in page.elements if attributes.get("tabindex") == "0"]
    given = [attributes for attributes in tokens if "prompt" in (attributes["class"] or "")]
    assert len(given) == sum(row["prompt_tokens"] for row in rows)
    bits = [float((each["style"] or "").removeprefix("--bits:")) for each in tokens if each not in given]
    expected = [-logprob / math.log(2) for row in rows for logprob in row["logprobs"]]
    assert bits == pytest.approx(expected, abs=0.006)
    assert page.scripts == [] and page.fetches() == []


def test_the_page_lies_where_it_is_asked_for(tmp_path: Path, program: Program) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    words = ["--prompt", "<script>", "--generation.max_new_tokens", "2"]
    program("generate", *words, "--show", "html", "--output", "mine.html")
    assert Page(tmp_path / "mine.html").scripts == []


def test_the_folder_of_a_page_is_made_and_a_bad_place_is_told_before_any_text(
    tmp_path: Path, program: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    words = ["--prompt", "a", "--generation.max_new_tokens", "2", "--show", "html", "--output"]
    program("generate", *words, "pages/new/mine.html")
    assert Page(tmp_path / "pages" / "new" / "mine.html").scripts == []
    capfd.readouterr()
    for place in ("pages", "pages/new/mine.html/other.html"):
        with pytest.raises(SystemExit) as end:
            program("generate", *words, place)
        said = capfd.readouterr()
        assert end.value.code == 2 and f"output={place}" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--show", "html"], "show=html .*give --prompt"),
        (["--prompt", "a", "--output", "a.html"], "output=a.html .*--show html"),
    ],
)
def test_what_has_no_page_is_refused(
    tmp_path: Path, program: Program, capfd: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        program("generate", *words)
    assert end.value.code == 2 and re.search(line, capfd.readouterr().err)
