"""Holds a file of questions to what a reader takes it for; what is no question is refused by its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.evaluation.items import read_items

GOOD = {"question": "Two and two are", "choices": ["four", "five"], "answer": 0}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_the_answer_is_an_index_or_the_text_of_one_choice(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "answer": "five"}, {**GOOD, "question": "", "id": 7, "answer": 1})
    items = read_items(path)
    assert [item.answer for item in items] == [0, 1, 1]
    assert [item.question for item in items] == ["Two and two are", "Two and two are", ""]
    assert items[2].place == f"{path}, line 3"


def test_an_index_tells_choices_of_one_text_apart(tmp_path: Path) -> None:
    alike = {**GOOD, "choices": ["four", "five", "four"]}
    (item,) = read_items(write(tmp_path, {**alike, "answer": 2}))
    assert item.answer == 2
    with pytest.raises(ValueError, match="text of 2 of the choices; give an index from 0 to 2"):
        read_items(write(tmp_path, {**alike, "answer": "four"}))


def test_lines_end_where_editors_end_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = json.dumps({**GOOD, "question": "a\u2028b\x0c"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())
    assert [item.place for item in read_items(path)] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    "row, problem",
    [
        ([1, 2], "is no JSON object"),
        ({"question": "a", "choices": ["b", "c"]}, "has no answer"),
        ({**GOOD, "question": 5}, "question=5 is no text"),
        ({**GOOD, "question": " \n"}, "nothing but space"),
        ({**GOOD, "choices": "four"}, "is no list of two or more"),
        ({**GOOD, "choices": ["four"]}, "is no list of two or more"),
        ({**GOOD, "choices": ["four", 5]}, r"choices\[1\]=5 is no text"),
        ({**GOOD, "choices": ["four", ""]}, r"choices\[1\]='' holds no text"),
        ({**GOOD, "choices": ["four", "\ud800"]}, "is not UTF-8"),
        ({**GOOD, "answer": 2}, "answer=2 is no index of 2 choices; give an index from 0 to 1"),
        ({**GOOD, "answer": -1}, "answer=-1 is no index"),
        ({**GOOD, "answer": True}, "answer=True is no index"),
        ({**GOOD, "answer": 1.0}, "answer=1.0 is no index"),
        ({**GOOD, "answer": None}, "answer=None is no index"),
        ({**GOOD, "answer": "0"}, "answer='0' is the text of none of the choices"),
        ({**GOOD, "answer": "A"}, "answer='A' is the text of none of the choices"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_file_and_line(row: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mine.jsonl, line 2.*{problem}"):
        read_items(write(tmp_path, GOOD, row))


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_items(tmp_path / "none.jsonl")
    path = tmp_path / "mine.jsonl"
    contents = {b"\n \n": "holds no question", b'"\xff"': "is not UTF-8", b"{": "line 1 is not JSON"}
    for content, problem in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            read_items(path)
