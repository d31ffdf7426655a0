"""What is trained on is not held out: files are refused, documents counted and, if wanted, dropped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.cli.main import main
from gpt_lightning.data import overlap, token_cache
from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.documents import Piece
from gpt_lightning.data.tokenizer import load_tokenizer
from gpt_lightning.exit_codes import UserError

ROWS = [f"row {index} of the text" for index in range(100)]


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return path


def datamodule(folder: Path, **options: Any) -> TextDataModule:
    settings = {"tokenizer": "bytes", "seq_len": 16, "cache_dir": str(folder / "cache")}
    return TextDataModule(**settings, **options)


@pytest.mark.parametrize("option", ["val_files", "test_files"])
def test_a_trained_file_is_refused_under_another_name(tmp_path: Path, option: str) -> None:
    for name in ("empty.txt", "none.txt"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("one text " * 20)
    (tmp_path / "other.txt").write_text("1 text   " * 20)
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("a.txt")
    train = [str(tmp_path / name) for name in ("none.txt", "other.txt", "a.txt")]
    for name in ("b.txt", "c.txt"):
        expected = f"data.{option}=.*/{name} has the same text as .*/a.txt of data.train_files; remove one"
        with pytest.raises(UserError, match=expected):
            datamodule(tmp_path, train_files=train, **{option: str(tmp_path / name)}).prepare()
    assert not (tmp_path / "cache").exists()
    held_out = [str(tmp_path / "empty.txt"), str(tmp_path / "b.txt")]
    datamodule(tmp_path, train_files=train[:2], **{option: held_out}).prepare()


def test_repeated_documents_are_counted_and_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "a.jsonl", ROWS * 20)
    splits = datamodule(tmp_path, train_files=str(source)).prepare()
    train, val = splits["train"], splits["val"]
    assert val.n_repeated == val.n_documents > 150
    for _ in range(2):  # also of a cache that is there
        capfd.readouterr()
        options = ["--data.train_files", str(source), "--data.tokenizer", "bytes", "--data.seq_len", "16"]
        main(["prepare", *options, "--data.cache_dir", str(tmp_path / "cache")])
        n = val.n_documents
        lines = capfd.readouterr().err.splitlines()
        assert f"val: {val.n_tokens:,} tokens in {n} documents, {n} of them also in train" in lines
        counted = f"{2000 - n:,} documents, {1900 - n:,} of them repeat another"
        assert f"train: {train.n_tokens:,} tokens in {counted}" in lines


@pytest.mark.parametrize("documents_at_a_time", [1 << 20, 7])
def test_documents_of_given_files_are_compared_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents_at_a_time: int
) -> None:
    monkeypatch.setattr(overlap, "_DOCUMENTS_AT_A_TIME", documents_at_a_time)
    train = write_rows(tmp_path / "a.jsonl", ROWS)
    val = write_rows(tmp_path / "b.jsonl", [ROWS[3], "new", ROWS[99] + " ", ROWS[50], ROWS[3]])
    test = write_rows(tmp_path / "c.jsonl", ["new"])
    options = {"train_files": str(train), "val_files": str(val), "test_files": str(test)}
    splits = datamodule(tmp_path, **options).prepare()
    assert {name: split.n_repeated for name, split in splits.items()} == {"train": 0, "val": 3, "test": 0}
    kept = datamodule(tmp_path, **options, drop_repeated=True).prepare()
    assert {name: split.n_documents for name, split in kept.items()} == {"train": 100, "val": 2, "test": 1}
    assert {name: split.n_repeated for name, split in kept.items()} == {"train": 0, "val": 0, "test": 0}
    assert bytes(kept["val"].tokens[:3].tolist()) == b"new"
    assert kept["val"].n_bytes == len("new" + ROWS[99] + " ")
    assert kept["train"].tokens.tolist() == splits["train"].tokens.tolist()


@pytest.mark.parametrize("documents_at_a_time", [1 << 20, 177, 7])
def test_training_documents_that_repeat_another_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents_at_a_time: int
) -> None:
    monkeypatch.setattr(overlap, "_DOCUMENTS_AT_A_TIME", documents_at_a_time)
    rows = ROWS[:40] + ROWS[:1] * 60 + ROWS[30:] + [ROWS[2] + " "]
    source = write_rows(tmp_path / "a.jsonl", rows)
    train = datamodule(tmp_path, train_files=str(source), val_fraction=0.0).prepare()["train"]
    assert train.n_repeated == len(rows) - len(set(rows)) == 70


def test_dropping_leaves_something_or_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", ROWS * 20)
    module = datamodule(tmp_path, train_files=str(source), drop_repeated=True)
    with pytest.raises(UserError, match="data.drop_repeated=true leaves nothing of val: its .* all in train"):
        module.prepare()
    assert not (tmp_path / "cache").exists()
    some = write_rows(tmp_path / "b.jsonl", ROWS[:50] * 10 + ROWS[50:])
    val = datamodule(tmp_path, train_files=str(some), drop_repeated=True).prepare()["val"]
    assert val.n_repeated == 0 and 0 < val.n_documents < 20


def test_a_document_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    digests = overlap.DocumentDigests(tmp_path)
    marked = [("train", Piece("abc", False)), ("train", Piece("def", True)), ("val", Piece("ab", False))]
    marked += [("val", Piece("cdef", True)), ("val", Piece("abc", True))]
    assert list(digests.noted(marked)) == marked
    assert {name: found.tolist() for name, found in digests.repeated().items()} == {"val": [True, False]}
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_an_earlier_version_keeps_its_name(tmp_path: Path) -> None:
    """The folder's name is made of the settings: a new one that is left out must not change it."""
    source = write_rows(tmp_path / "a.jsonl", ROWS)
    corpus = Corpus((str(source),), (), (), 0.1, 42, "text", None)
    old = token_cache.prepare_tokens(corpus, load_tokenizer("bytes"), str(tmp_path / "cache"))
    new = datamodule(tmp_path, train_files=str(source)).prepare()
    assert new["train"].folder == old["train"].folder
