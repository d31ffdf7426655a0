"""A run that goes on must find the text that it was trained and validated on, wherever that lies."""

import os
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data.corpus_identity import text_difference
from gpt_lightning.data.datamodule import TextDataModule

TEXTS = {"a.txt": "one cat sees a dog. " * 40, "b.txt": "two dogs see the house. " * 40}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", TEXTS)


def write_texts(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def datamodule(folder: Path, cache: str = "cache", **options: Any) -> TextDataModule:
    settings = {"train_files": str(folder), "tokenizer": "bytes", "seq_len": 16, "val_fraction": 0.2}
    return TextDataModule(**{**settings, "cache_dir": str(folder.parent / cache), **options})


def state_of(module: TextDataModule) -> dict[str, Any]:
    module.setup("fit")
    return module.state_dict()


def resumed(module: TextDataModule, state: dict[str, Any]) -> TextDataModule:
    module.resume_text(state)
    module.prepare()
    return module


def refusal(module: TextDataModule, state: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        resumed(module, state)
    message = str(error.value)
    assert "\n" not in message and "train anew" in message
    return message


def test_files_that_moved_or_were_touched_are_the_same(folder: Path, tmp_path: Path) -> None:
    state = state_of(datamodule(folder))
    os.utime(folder / "a.txt", (1, 1))
    resumed(datamodule(folder), state)
    moved = folder.rename(tmp_path / "elsewhere")
    resumed(datamodule(moved, "other"), state)
    (moved / "a.txt").rename(moved / "aa.txt")
    resumed(datamodule(moved), state)


@pytest.mark.parametrize("cache", ["cache", "empty"])
def test_a_file_that_changed_is_named_before_anything_is_written(
    cache: str, folder: Path, tmp_path: Path
) -> None:
    state = state_of(datamodule(folder))
    (folder / "b.txt").write_text(TEXTS["b.txt"].replace("house", "horse"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert "data.train_files: b.txt has changed" in refusal(datamodule(folder, cache), state)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")} == before
    assert not (tmp_path / "empty").exists()


def test_files_that_came_went_or_changed_places_are_named(folder: Path) -> None:
    state = state_of(datamodule(folder))
    (folder / "c.txt").write_text("three")
    assert "c.txt was not among them" in refusal(datamodule(folder), state)
    (folder / "c.txt").unlink()
    (folder / "a.txt").rename(folder / "z.txt")
    assert "the order of the files has changed" in refusal(datamodule(folder), state)
    (folder / "z.txt").unlink()
    assert "a.txt is missing" in refusal(datamodule(folder), state)


def test_validation_files_count_and_test_files_do_not(folder: Path, tmp_path: Path) -> None:
    held_out = write_texts(tmp_path / "held_out", {"val.txt": "val " * 40, "test.txt": "test " * 40})
    files = {"val_files": str(held_out / "val.txt"), "test_files": str(held_out / "test.txt")}
    state = state_of(datamodule(folder, **files))
    (held_out / "test.txt").write_text("another test " * 40)
    resumed(datamodule(folder, **files), state)
    (held_out / "val.txt").write_text("another val " * 40)
    assert "data.val_files: val.txt has changed" in refusal(datamodule(folder, **files), state)


def test_documents_must_be_cut_alike(folder: Path) -> None:
    state = state_of(datamodule(folder))
    message = refusal(datamodule(folder, document_separator="."), state)
    assert "data.document_separator='.' was None" in message


def test_the_built_in_text_is_that_of_one_python() -> None:
    now = {"train_files": [["python:docs", "Python 3.13"]], "val_files": []}
    saved = {"train_files": [["python:docs", "Python 3.11"]], "val_files": []}
    assert text_difference(saved, now) == "data.train_files: python:docs has changed"


def test_loading_a_state_refuses_before_and_after_the_text_is_read(folder: Path) -> None:
    state = state_of(datamodule(folder, tokenizer="bpe:300"))
    (folder / "a.txt").write_text("another text altogether. " * 40)
    early, late = datamodule(folder, tokenizer="bpe:300"), datamodule(folder, tokenizer="bpe:300")
    early.load_state_dict(state)
    with pytest.raises(ValueError, match="a.txt has changed"):
        early.setup("fit")
    late.setup("fit")
    with pytest.raises(ValueError, match="a.txt has changed"):
        late.load_state_dict(state)


def test_a_state_without_text_is_taken(folder: Path) -> None:
    state = state_of(datamodule(folder))
    del state["text"]
    (folder / "a.txt").write_text("another text altogether. " * 40)
    resumed(datamodule(folder), state).load_state_dict(state)


def test_judging_on_text_that_may_be_known_is_warned_of(folder: Path, tmp_path: Path) -> None:
    state = state_of(datamodule(folder))
    same = datamodule(folder)
    same.prepare()
    assert same.text_warning(state, "validate") is None
    (folder / "a.txt").write_text("another text altogether. " * 40)
    other = datamodule(folder)
    other.prepare()
    for verb in ("validate", "test"):
        assert "a.txt has changed" in (other.text_warning(state, verb) or "")
    (tmp_path / "test.txt").write_text("a text of its own. " * 40)
    own = datamodule(folder, test_files=str(tmp_path / "test.txt"))
    own.prepare()
    assert own.text_warning(state, "test") is None
    assert own.text_warning(state, "validate") is not None


def test_a_datamodule_is_not_made_from_a_checkpoint() -> None:
    with pytest.raises(ValueError, match="holds no TextDataModule"):
        TextDataModule.load_from_checkpoint("x.ckpt")
