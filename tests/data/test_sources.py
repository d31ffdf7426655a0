"""Sources: names, globs and folders become files, and what is not read is said."""

import logging
import re
from pathlib import Path

import pytest

from gpt_lightning.data.sources import SUFFIXES, resolve_sources


def test_sources_expand_in_order_without_repeats(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.jsonl.gz", "sub/d.md", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "sub/c.jsonl.gz"))
    assert resolve_sources([str(tmp_path)], "data.train_files") == [a, b, c]
    assert resolve_sources([b, str(tmp_path / "*.txt")], "data.train_files") == [b, a]
    assert resolve_sources([str(tmp_path / "**" / "*.gz"), "python:docs"], "x") == [c, "python:docs"]


def test_a_folder_is_no_pattern_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x[1]/a.txt", "x[1]/sub*/b.txt", "x1/other.txt", "x[1]/subs/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    folder = tmp_path / "x[1]"
    monkeypatch.chdir(folder)
    for pattern in ("*.txt", str(folder / "*.txt"), "../x[1]/[ab].txt"):
        assert resolve_sources([pattern], "data.train_files") == [str(folder / "a.txt")]
    assert resolve_sources(["sub*/*.txt"], "data.train_files") == [str(folder / "sub*" / "b.txt")]
    assert resolve_sources(["../x[12]/*.txt"], "data.train_files") == [str(tmp_path / "x1" / "other.txt")]
    with pytest.raises(ValueError, match="none.txt does not exist; check"):
        resolve_sources(["none.txt"], "data.train_files")


def test_source_errors_name_option_value_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {
        r"data.train_files=\[] names no file; give": [],
        r"data.train_files='' names no file; give": [""],
        r"data.val_files=.*/none.txt does not exist; check": [str(tmp_path / "none.txt")],
        r"data.val_files=.*/a.pdf has no known suffix; use one of .txt": [str(tmp_path / "a.pdf")],
        r"data.val_files=.*/empty matches no file that ends in": [str(tmp_path / "empty")],
        r"data.val_files=.*\*.txt matches no file that ends in": [str(tmp_path / "*.txt")],
        r"data.val_files=.* matches no file that ends in .*.jsonl.zst, but 1 .pdf$": [str(tmp_path)],
    }
    for given in ("a，b.txt", "【a.txt, b.txt】", "“a.txt”", '["a.txt"，"b.txt"]'):
        cases[rf"data.val_files={re.escape(given)} .*; it holds .*, which are no signs of a list"] = [given]
    for message, patterns in cases.items():
        with pytest.raises(ValueError, match=message):
            resolve_sources(patterns, message.partition("=")[0])


def test_what_a_folder_or_glob_leaves_out_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gpt_lightning")
    (folder := tmp_path / "texts").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "d.txt").write_text("x")
    for name in ("a.txt", "B.TXT", "B2.TXT", "c.JSONL.GZ", "notes", ".hidden.md", "sub/e.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "link").symlink_to(elsewhere)
    kinds = "2 .TXT, 1 .JSONL.GZ, 1 .md, 1 linked folder, 1 without an ending"
    for _ in range(2):
        assert resolve_sources([str(folder)], "data.train_files") == [str(folder / "a.txt")]
    line = f"data.train_files={folder}: 6 of 7 files are not read: {kinds} (read are {' '.join(SUFFIXES)})"
    assert [record.getMessage() for record in caplog.records] == [line]
    caplog.clear()
    resolve_sources([str(folder / "[aBc]*")], "data.val_files")
    assert "3 of 4 files are not read: 2 .TXT, 1 .JSONL.GZ (" in caplog.text
    caplog.clear()
    resolve_sources([str(folder / "*.txt"), str(folder / "a.txt")], "data.val_files")
    assert caplog.records == []
    for number in range(9):
        (elsewhere / f"part.{number}").write_text("x")
    resolve_sources([str(elsewhere)], "data.val_files")
    assert "9 of 10 files are not read: 1 .0, 1 .1, 1 .2, 1 .3, 1 .4, 4 others (" in caplog.text
