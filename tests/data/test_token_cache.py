"""The cache: holds exactly the text, is reused while that is true, and is rebuilt when it is not."""

import json
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data import documents, encoding, token_cache, token_files, tokenizer_cache
from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.token_cache import TokenSplit, prepare_tokens
from gpt_lightning.data.tokenizer import load_tokenizer
from gpt_lightning.data.tokenizer_cache import prepare_tokenizer

BYTES = load_tokenizer("bytes")


def write_documents(path: Path, n_documents: int = 40) -> Path:
    """Each document is made of a character of its own."""
    rows = [{"text": chr(0x4E00 + index) * (5 + index % 7)} for index in range(n_documents)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def corpus(
    train: Path, val: tuple[Path, ...] = (), test: tuple[Path, ...] = (), val_fraction: float = 0.2
) -> Corpus:
    return Corpus(
        train_files=(str(train),),
        val_files=tuple(map(str, val)),
        test_files=tuple(map(str, test)),
        val_fraction=val_fraction,
        seed=0,
        text_key="text",
        document_separator=None,
    )


def documents_of(split: TokenSplit) -> list[str]:
    starts = split.document_starts.tolist()
    assert starts[0] == 0 and starts[-1] == len(split.tokens) == split.n_tokens
    found = []
    for start, end in zip(starts, starts[1:], strict=False):
        *ids, eos = split.tokens[start:end].tolist()
        assert eos == 256 and 256 not in ids
        found.append(bytes(ids).decode())
    assert len(found) == split.n_documents
    assert sum(len(text.encode()) for text in found) == split.n_bytes
    return found


def building_reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    reasons = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    caplog.clear()
    return reasons


@pytest.fixture(autouse=True)
def encode_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process would wait for the threads that encode in its parent, if any test began them."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def hear_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gpt_lightning")


@pytest.mark.parametrize("separator, occurs", [("\n\n", True), ("three", True), ("\\n\\n", False)])
def test_a_separator_that_occurs_nowhere_is_told_whenever_the_text_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, separator: str, occurs: bool
) -> None:
    (first := tmp_path / "a.txt").write_text("one\n\ntwo")
    (other := tmp_path / "b.txt").write_text("two\n\nthree")
    separated = replace(corpus(first, val=(other, write_documents(tmp_path / "c.jsonl"))), val_fraction=0.0)
    for _ in range(2):
        caplog.clear()
        prepare_tokens(replace(separated, document_separator=separator), BYTES, str(tmp_path / "cache"))
        line = f"warning: data.document_separator={separator!r} stands in no .txt file, and each is one"
        assert (line in caplog.text) == (not occurs)
        assert ("a line break is $'\\n' in a shell" in caplog.text) == (not occurs)


def test_windows_line_ends_and_empty_rows_are_told_whenever_the_text_is_opened_and_text_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first := tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (other := tmp_path / "b.txt").write_bytes(b"three\nfour\r\n")
    (rows := tmp_path / "c.jsonl").write_bytes(
        b'{"text": null}\r\n{"text": "five"}\r\n\r\n{"text": ""}\r\n{"text": " \\n"}\r\n'
    )
    text = replace(corpus(first, val=(other, rows)), val_fraction=0.0)
    for _ in range(2):
        caplog.clear()
        splits = prepare_tokens(text, BYTES, str(tmp_path / "cache"))
        assert "warning: 1 file has Windows line ends, so the model learns to write \\r;" in caplog.text
        assert "warning: 3 rows hold no text under data.text_key=text; they are left out" in caplog.text
    assert documents_of(splits["train"]) == ["one\r\ntwo\r\n"]
    assert documents_of(splits["val"]) == ["three\nfour\r\n", "five"]
    caplog.clear()
    prepare_tokens(replace(text, train_files=(str(other),), val_files=()), BYTES, str(tmp_path / "cache"))
    assert "warning" not in caplog.text


def test_splits_hold_every_document_once(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    splits = prepare_tokens(corpus(source), BYTES, str(tmp_path / "cache"))
    train, val = documents_of(splits["train"]), documents_of(splits["val"])
    expected = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    assert sorted(train + val) == sorted(expected) and train and val
    assert not set("".join(train)) & set("".join(val))
    again = prepare_tokens(corpus(source), BYTES, str(tmp_path / "other"))
    assert documents_of(again["val"]) == val and documents_of(again["train"]) == train


def test_given_files_are_the_splits(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file in files:
        file.write_text(file.name * 9)
    a, b, c = files
    splits = prepare_tokens(corpus(a, val=(b,), test=(c,)), BYTES, str(tmp_path / "cache"))
    assert {name: documents_of(split) for name, split in splits.items()} == {
        "train": ["a.txt" * 9],
        "val": ["b.txt" * 9],
        "test": ["c.txt" * 9],
    }
    assert list(prepare_tokens(corpus(a, val_fraction=0.0), BYTES, str(tmp_path / "cache"))) == ["train"]


def test_large_vocabularies_get_wider_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    narrow = prepare_tokens(corpus(source), BYTES, str(tmp_path / "narrow"))["train"]
    tokenizer = load_tokenizer("bytes")
    monkeypatch.setattr(tokenizer, "vocab_size", 65537)
    wide = prepare_tokens(corpus(source), tokenizer, str(tmp_path / "wide"))["train"]
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)
    assert narrow.tokens.tolist() == wide.tokens.tolist()


def test_small_batches_write_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    whole = prepare_tokens(corpus(source), BYTES, str(tmp_path / "one"))
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 17)
    parts = prepare_tokens(corpus(source), BYTES, str(tmp_path / "two"))
    assert {name: documents_of(split) for name, split in parts.items()} == {
        name: documents_of(split) for name, split in whole.items()
    }


@pytest.mark.parametrize("n_characters", [17, 1 << 18])
def test_the_longest_document_is_known(
    n_characters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches it is in; an old cache does not say it, and is read, unless it is too large."""
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", n_characters)
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", n_characters)
    rows = [{"text": f"{index} and " * (1 + 3 * index % 10)} for index in range(10)]
    (source := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split in prepare_tokens(corpus(source), BYTES, str(tmp_path / "cache")).values():
        longest = 1 + max(len(text) for text in documents_of(split))
        old = replace(split, n_longest=None)
        assert split.n_longest == split.longest_document == old.longest_document == longest
        with monkeypatch.context() as context:
            context.setattr(token_cache, "_MOST_READ", 0)
            assert old.longest_document is None and split.longest_document == longest


def test_fresh_cache_is_reused_also_after_a_touch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), str(tmp_path / "cache")
    folder = prepare_tokens(corpus(source), BYTES, cache)["train"].folder
    inode = (folder / "train.tokens.bin").stat().st_ino
    assert building_reasons(caplog) == ["not built yet"]
    for _ in range(2):
        os.utime(source, (1, 1))
        prepare_tokens(corpus(source), BYTES, cache)
    assert building_reasons(caplog) == []
    assert (folder / "train.tokens.bin").stat().st_ino == inode
    recorded = json.loads((folder / "meta.json").read_text())["sources"][0]["stat"]
    assert recorded[1] == 1_000_000_000


def test_content_change_of_the_same_size_and_time_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = tmp_path / "a.txt", str(tmp_path / "cache")
    source.write_text("abcdefghij" * 9)
    os.utime(source, (1, 1))
    before = prepare_tokens(corpus(source), BYTES, cache)["train"]
    held = documents_of(before)
    source.write_text("abcdefghiJ" * 9)
    os.utime(source, (1, 1))
    after = prepare_tokens(corpus(source), BYTES, cache)["train"]
    assert "J" in documents_of(after)[0] and after.folder == before.folder
    assert documents_of(before) == held, "maps that are open must not change under a running training"
    reasons = building_reasons(caplog)
    assert len(reasons) == 2 and reasons[1].endswith("a.txt changed")


def test_other_settings_build_another_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), str(tmp_path / "cache")
    trained = prepare_tokenizer([corpus(source)], 300, cache)
    folders = {
        prepare_tokens(settings, tokenizer, cache)["train"].folder
        for settings in (corpus(source), corpus(source, val_fraction=0.3))
        for tokenizer in (BYTES, trained)
    }
    assert len(folders) == 4
    building_reasons(caplog)
    prepare_tokens(corpus(source), trained, cache)
    assert building_reasons(caplog) == []


def test_a_failed_or_killed_build_leaves_no_cache(tmp_path: Path) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), tmp_path / "cache"
    good = source.read_text()
    source.write_text(good + '\n{"text": 1}')
    with pytest.raises(ValueError, match="line 41"):
        prepare_tokens(corpus(source), BYTES, str(cache))
    assert not cache.exists() and tmp_path.exists()

    source.write_text(good)
    arguments = (source, str(cache))
    killed = multiprocessing.get_context("fork").Process(target=_die_while_building, args=arguments)
    killed.start()
    killed.join()
    left = [path.name for path in cache.iterdir() if path.is_dir()]
    assert killed.exitcode == 9 and len(left) == 1 and left[0].endswith(".tmp")
    assert len(documents_of(prepare_tokens(corpus(source), BYTES, str(cache))["train"])) > 20
    assert not any(path.name.endswith(".tmp") for path in cache.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_a_full_disk_is_told_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), tmp_path / "cache"
    start = token_files._SplitWriter.__init__

    def on_a_full_disk(self: Any, *args: Any) -> None:
        start(self, *args)
        self._tokens_file = open("/dev/full", "wb")

    monkeypatch.setattr(token_files._SplitWriter, "__init__", on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device") as error:
        prepare_tokens(corpus(source), BYTES, str(cache))
    assert str(error.value.filename).startswith(str(cache))
    assert not cache.exists()


def _die_while_building(source: Path, cache: str) -> None:
    token_files._SplitWriter.finish = lambda self: os._exit(9)  # type: ignore[method-assign]
    prepare_tokens(corpus(source), BYTES, cache)


def _build_and_count(source: Path, cache: str, log: Path) -> None:
    original = token_cache._write_tokens

    def counted(*args: object) -> object:
        with open(log, "a") as file:
            file.write("built\n")
        return original(*args)  # type: ignore[arg-type]

    token_cache._write_tokens = counted  # type: ignore[assignment]
    split = prepare_tokens(corpus(source), BYTES, cache)["train"]
    with open(log, "a") as file:
        file.write(f"{split.n_tokens} {int(split.tokens.sum())}\n")


def test_of_two_processes_one_builds(tmp_path: Path) -> None:
    source, log = write_documents(tmp_path / "a.jsonl", 3000), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    arguments = (source, str(tmp_path / "cache"), log)
    processes = [context.Process(target=_build_and_count, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = log.read_text().splitlines()
    assert lines.count("built") == 1 and len(lines) == 4 and len(set(lines)) == 2


def test_pickled_split_maps_the_file_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", 2000)
    split = prepare_tokens(corpus(source), BYTES, str(tmp_path / "cache"))["train"]
    pickled = pickle.dumps(split)
    assert len(pickled) < 1000 < split.n_tokens
    assert pickle.loads(pickled).tokens.tolist() == split.tokens.tolist()


def test_tokenizer_never_sees_held_out_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"common words {chr(0x4E00 + index)} " * 30 for index in range(30)]
    source, cache = tmp_path / "a.jsonl", str(tmp_path / "cache")
    source.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    tokenizer = prepare_tokenizer([corpus(source)], 2000, cache)
    splits = prepare_tokens(corpus(source), BYTES, cache)
    marks = {name: {text[13] for text in documents_of(split)} for name, split in splits.items()}
    assert marks["train"] and marks["val"]
    assert all(len(tokenizer.encode(f" {mark}")) == 1 for mark in marks["train"])
    assert all(len(tokenizer.encode(f" {mark}")) > 1 for mark in marks["val"])
    building_reasons(caplog)
    assert prepare_tokenizer([corpus(source)], 2000, cache).fingerprint == tokenizer.fingerprint
    assert building_reasons(caplog) == []
    assert prepare_tokenizer([corpus(source)], None, cache).vocab_size <= 512


def test_training_a_tokenizer_shows_what_it_does_also_when_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    @contextmanager
    def note(title: str, *_: object) -> Iterator[Callable[[int], None]]:
        shown.append(f"begins {title}")
        yield lambda n_bytes: None
        shown.append(f"ends {title}")

    monkeypatch.setattr(tokenizer_cache, "reading", note)
    monkeypatch.setattr(tokenizer_cache, "waiting", note)
    prepare_tokenizer([corpus(write_documents(tmp_path / "a.jsonl"))], 300, str(tmp_path / "cache"))
    reading, merging = "Reading text for the tokenizer", "Merging pairs into tokens"
    assert shown == [f"begins {reading}", f"ends {reading}", f"begins {merging}", f"ends {merging}"]


def test_cache_dir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = write_documents(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"data.cache_dir=.*file/x cannot be written \(.*\); choose"):
        prepare_tokens(corpus(source), BYTES, str(tmp_path / "file" / "x"))
