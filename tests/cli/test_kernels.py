"""Holds `kernels` to what it measures, keeps and says."""

import json
import re
from pathlib import Path

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.kernels.choose import PIN, kernels_of
from tests.cli.test_generate import write_checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(PIN)
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    return tmp_path


@pytest.mark.parametrize("dtype, words", [("float32", []), ("int8", ["--quantize", "int8", "--rows", "3"])])
def test_what_it_says_is_kept(
    folder: Path, dtype: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["kernels", *words])
    *lines, last = capsys.readouterr().out.splitlines()
    (path,) = (folder / "cache" / "gpt_lightning").glob("kernels-*.json")
    kept = json.loads(path.read_text())
    sums = dict.fromkeys(kernels_of(dtype).keys() - {"plain"}, 0.0)
    for line in lines:
        (found,) = re.findall(r"^(\d+) of (.*): (.*)$", line)
        count, shape, figures = found
        assert figures == ", ".join(f"{name} {value * 1e6:,.0f} us" for name, value in kept[shape].items())
        assert f"row{'s' if '--rows' in words else ''}, {dtype}" in shape
        for name, value in kept.pop(shape).items():
            sums[name] += int(count) * value
    assert not kept
    taken = last.removeprefix("generate and predict take: ")
    assert sums[taken] <= 1.03 * min(sums.values())


def test_a_pinned_kernel_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(PIN, "linear")
    main(["kernels"])
    assert capsys.readouterr().out.endswith(" take: linear\n")


def test_an_unknown_pinned_kernel_is_refused_before_anything_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PIN, "linear, quick")
    with pytest.raises(SystemExit) as ended:
        main(["kernels"])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out and not (folder / "cache").exists()
    assert f"error: {PIN}=linear, quick: no kernel is called quick; name some of linear" in shown.err


def test_a_folder_that_cannot_be_written_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cache").write_text("a file in the folder's place")
    with pytest.raises(SystemExit) as ended:
        main(["kernels"])
    assert ended.value.code == 2
    assert "cache folder cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rows", "0"], "rows=0 is below 1"),
        (["--rows", "10000000000"], "rows=10000000000 is above 65536; give how many"),
        (["--device", "cuda"], "device=cuda has one kernel"),
        (["--quantize", "int3"], "generation.quantize='int3' is unknown"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["kernels", *words])
    assert exit.value.code == 2 and message in capsys.readouterr().err
