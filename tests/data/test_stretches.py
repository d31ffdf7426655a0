"""A file that is cut holds the documents of the whole, each once and in order, wherever it is cut."""

import json
import random
from pathlib import Path

import pytest

from gpt_lightning.data.documents import read_pieces
from gpt_lightning.data.stretches import Stretch, cut_file
from gpt_lightning.exit_codes import UserError


def documents(stretch: Stretch, separator: str | None = None) -> list[str]:
    found = [""]
    how = {"text_key": "text", "document_separator": separator}
    for piece in read_pieces(stretch.source, lambda n: None, within=stretch.within, **how):  # type: ignore
        found[-1] += piece.text
        if piece.ends_document:
            found.append("")
    return found[:-1]


@pytest.mark.parametrize("separator", ["--", "\n\n", "aba", "é", "x"])
def test_documents_between_separators(separator: str, tmp_path: Path) -> None:
    """Among them separators that overlap: of three signs in a row the first two are one, read from there."""
    draw = random.Random(0)
    text = "".join(draw.choice([separator, separator[0], "b", "c ü", separator[-1]]) for _ in range(300))
    (path := tmp_path / "all.txt").write_text(f"\ufeff{text}", encoding="utf-8", newline="")
    whole = documents(Stretch(str(path)), separator)
    assert len(whole) > 10
    n_cuts = 0
    for n_bytes in range(7, 120):
        cut = cut_file(str(path), n_bytes, separator)
        assert [text for stretch, _ in cut for text in documents(stretch, separator)] == whole
        assert sum(size for _, size in cut) == path.stat().st_size
        n_cuts += len(cut)
    assert n_cuts > 300


def test_rows(tmp_path: Path) -> None:
    texts = [f"row {number} " * (number % 7) for number in range(90)]
    rows = [json.dumps({"text": text}) + "\n" * (1 + len(text) % 2) for text in texts]
    (path := tmp_path / "all.jsonl").write_text("".join(rows))
    whole = documents(Stretch(str(path)))
    for n_bytes in range(20, 500, 11):
        cut = cut_file(str(path), n_bytes, None)
        assert len(cut) > 3 and [text for stretch, _ in cut for text in documents(stretch)] == whole


def test_a_mistake_in_a_stretch_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "all.jsonl").write_text('{"text": "a"}\n' * 10 + "{\n")
    stretch, _ = cut_file(str(path), 40, None)[-1]
    assert stretch.within is not None
    with pytest.raises(UserError, match=rf"all.jsonl, from byte {stretch.within[0]} on, line \d is not JSON"):
        documents(stretch)


@pytest.mark.parametrize("name", ["all.txt", "all.jsonl.gz", "all.txt.zst"])
def test_one_document_and_packed_files_stay_whole(name: str, tmp_path: Path) -> None:
    (path := tmp_path / name).write_bytes(b"word " * 100)
    assert cut_file(str(path), 50, None) == [(Stretch(str(path)), 500)]
