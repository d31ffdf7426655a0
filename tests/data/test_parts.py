"""Several processes make together the cache that one makes alone; a killed one costs a part."""

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data import parts
from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.parts import OthersAtWork, SharedWork, cut_in_parts
from gpt_lightning.data.token_cache import TokenSplit, prepare_tokens
from gpt_lightning.data.tokenizer import load_tokenizer
from gpt_lightning.exit_codes import UserError

BYTES = load_tokenizer("bytes")
Counted = Callable[[], int]


@pytest.fixture(autouse=True)
def with_small_parts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # A forked process would wait for the threads of its parent.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(parts, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(parts, "_JOINED_TOKENS", 101)
    caplog.set_level(logging.INFO, logger="gpt_lightning")


@pytest.fixture
def n_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts the parts that any process has tokenized to the end."""
    tokenize, log = SharedWork._tokenize, tmp_path / "tokenized"

    def noted(self: SharedWork, *args: Any) -> dict[str, Any]:
        built = tokenize(self, *args)
        with open(log, "a") as file:
            file.write(".")
        return built

    monkeypatch.setattr(SharedWork, "_tokenize", noted)
    return lambda: len(log.read_text()) if log.exists() else 0


def text_of(number: int, n_words: int) -> str:
    return " ".join(f"wörd{number}_{index % 97}" for index in range(n_words))


def many_files(folder: Path) -> dict[str, Any]:
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(text_of(number, 1 + number * 7 % 60))
    return {}


def one_file(folder: Path) -> dict[str, Any]:
    (folder / "book.txt").write_text("\n".join(text_of(number, 30) for number in range(60)))
    return {}


def two_books(folder: Path) -> dict[str, Any]:
    """Too few to hold out a whole one, so the end of each is."""
    for number in range(2):
        (folder / f"{number}.txt").write_text("\n".join(text_of(number, 30) for _ in range(60)))
    return {}


def rows(folder: Path) -> dict[str, Any]:
    """Some rows are empty, some repeat others, and one file holds none at all."""
    texts = [text_of(number % 23, number % 13) for number in range(200)]
    for number in range(7):
        own = texts[number * 30 : (number + 1) * 30] if number != 3 else []
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    return {}


def rows_less_repeated(folder: Path) -> dict[str, Any]:
    return {**rows(folder), "drop_repeated": True}


def one_large_file(folder: Path) -> dict[str, Any]:
    """Beside small ones; some rows are longer than a part, and some lines empty."""
    rows(folder)
    texts = [text_of(number, 300 if number % 31 == 0 else number % 17) for number in range(300)]
    lines = (json.dumps({"text": text}) + "\n" * (1 + number % 3) for number, text in enumerate(texts))
    (folder / "30.jsonl").write_text("".join(lines))
    return {"drop_repeated": True}


def one_large_separated(folder: Path) -> dict[str, Any]:
    """Of which some separators overlap."""
    texts = [text_of(number % 40, 1 + number % 13) + "-" * (number % 5) for number in range(300)]
    (folder / "all.txt").write_text("\ufeff" + "\n--".join(texts) + "\n-")
    return {"document_separator": "--"}


def one_large_table(folder: Path) -> dict[str, Any]:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [text_of(number, number % 17) or None for number in range(300)]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "all.parquet", row_group_size=23)
    return {}


def separated(folder: Path) -> dict[str, Any]:
    for number in range(9):
        documents = [text_of(number * index, 4 + index) for index in range(20)]
        (folder / f"{number}.txt").write_text("\n---\n".join(documents))
    return {"document_separator": "\n---\n"}


def files_to_hold_out(folder: Path) -> dict[str, Any]:
    many_files(folder)
    for name in ("val_files", "test_files"):
        (folder / name).mkdir()
        for number in range(5):
            (folder / name / f"{number}.txt").write_text(text_of(number, 20) + name * number)
    return {name: str(folder / name) for name in ("val_files", "test_files")}


MORE = [many_files, one_file, two_books, rows_less_repeated, separated, files_to_hold_out]
CUT = [one_large_file, one_large_separated, one_large_table]
KINDS = [rows, *(pytest.param(make, marks=pytest.mark.slow) for make in MORE)]


def corpus_of(folder: Path, options: dict[str, Any]) -> Corpus:
    patterns = {"train_files": str(folder / "*.*"), "val_files": None, "test_files": None}
    settings = {"val_fraction": 0.2, "seed": 3, "text_key": "text", "document_separator": None}
    patterns |= {name: options[name] for name in patterns if name in options}
    return Corpus.find(patterns, **settings | {name: options[name] for name in settings if name in options})


def made(folder: Path, make: Callable[[Path], dict[str, Any]]) -> tuple[Corpus, dict[str, Any]]:
    folder.mkdir()
    options = make(folder)
    return corpus_of(folder, options), {"drop_repeated": options.get("drop_repeated", False)}


def contents(splits: dict[str, TokenSplit]) -> dict[str, Any]:
    """All that a cache holds: the bytes of its files, and what it remembers."""
    files = {path.name: path.read_bytes() for path in splits["train"].folder.iterdir()}
    return {**files, "meta.json": json.loads(files["meta.json"])}


def started(count: int, *args: Any, **options: Any) -> list[Any]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare_tokens, args=args, kwargs=options) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return processes


@pytest.mark.parametrize("make", KINDS)
def test_three_processes_make_the_cache_of_one(
    tmp_path: Path, n_tokenized: Counted, make: Callable[[Path], dict[str, Any]]
) -> None:
    corpus, options = made(tmp_path / "text", make)
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone"), **options))
    assert "val.tokens.bin" in alone and n_tokenized() == 0
    together = tmp_path / "together"
    processes = started(3, corpus, BYTES, str(together), **options, others="wait")
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert n_tokenized() == len(cut_in_parts(corpus))
    assert not [path for path in together.iterdir() if path.name.endswith(".parts")]
    assert contents(prepare_tokens(corpus, BYTES, str(together), **options)) == alone
    assert n_tokenized() == len(cut_in_parts(corpus))


@pytest.mark.parametrize("make", CUT)
def test_a_large_file_is_cut_and_gives_the_cache_of_the_whole(
    tmp_path: Path, n_tokenized: Counted, make: Callable[[Path], dict[str, Any]]
) -> None:
    corpus, options = made(tmp_path / "text", make)
    parts = cut_in_parts(corpus)
    assert len([part for part in parts if part.stretches[-1].within is not None]) > 5
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone"), **options))
    shared = prepare_tokens(corpus, BYTES, str(tmp_path / "shared"), **options, others="wait")
    assert n_tokenized() == len(parts) and contents(shared) == alone


def test_parts_are_whole_files_in_order_and_about_even(tmp_path: Path) -> None:
    corpus, _ = made(tmp_path / "text", files_to_hold_out)
    found = cut_in_parts(corpus)
    assert [file for part in found for file in part.files] == [*corpus.sources]
    assert list(dict.fromkeys(part.split for part in found)) == ["train", "val", "test"]
    sizes = [[os.path.getsize(file) for file in part.files] for part in found if part.split == "train"]
    assert len(sizes) > 5 and all(sum(of_part[:-1]) < 1000 for of_part in sizes)


def test_a_killed_process_costs_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokenized: Counted
) -> None:
    corpus, _ = made(tmp_path / "text", many_files)
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone")))
    cache = str(tmp_path / "cache")
    tokenize = SharedWork._tokenize

    def killed_at_the_fourth(self: SharedWork, part: Any, folder: Path) -> dict[str, Any]:
        built = tokenize(self, part, folder)
        if part.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return built

    with monkeypatch.context() as patch:
        patch.setattr(SharedWork, "_tokenize", killed_at_the_fourth)
        [process] = started(1, corpus, BYTES, cache, others="wait")
    assert process.exitcode == -signal.SIGKILL and n_tokenized() == 4
    # Whoever opens the cache next goes on, not knowing of others.
    assert contents(prepare_tokens(corpus, BYTES, cache)) == alone
    assert n_tokenized() == len(cut_in_parts(corpus)) + 1


def leave(corpus: Corpus, cache: str, log: Path) -> None:
    """Is a process that does what it can, and notes what it says if it leaves."""
    try:
        prepare_tokens(corpus, BYTES, cache, others="leave")
    except OthersAtWork as work:
        log.write_text(str(work))


def run_another(*args: Any) -> None:
    another = multiprocessing.get_context("fork").Process(target=leave, args=args)
    another.start()
    another.join()
    assert another.exitcode == 0


def test_one_that_finds_others_at_work_leaves_and_the_last_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokenized: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    corpus, _ = made(tmp_path / "text", many_files)
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone")))
    cache, said, n_parts = str(tmp_path / "cache"), tmp_path / "said", len(cut_in_parts(corpus))
    tokenize = SharedWork._tokenize

    def beside_another(self: SharedWork, part: Any, folder: Path) -> dict[str, Any]:
        if part.number == 2:
            run_another(corpus, cache, said)
        return tokenize(self, part, folder)

    monkeypatch.setattr(SharedWork, "_tokenize", beside_another)
    assert contents(prepare_tokens(corpus, BYTES, cache, others="leave")) == alone
    rest = "other processes are at the rest, and the last one to finish joins them"
    assert said.read_text() == f"parts made here: {n_parts - 3} of {n_parts}; {rest}"
    assert f"parts to join: {n_parts}, made here: 3" in caplog.text
    assert n_tokenized() == n_parts


def test_what_others_have_joined_meanwhile_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokenized: Counted
) -> None:
    corpus, _ = made(tmp_path / "text", rows)
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone")))
    cache, said, waiting = str(tmp_path / "cache"), tmp_path / "said", ["tokens", "sizes"]
    make_all = SharedWork._make_all

    def after_another(self: SharedWork, kind: str, *, waits: bool) -> None:
        if kind in waiting:
            waiting.clear()
            run_another(corpus, cache, said)
        make_all(self, kind, waits=waits)

    monkeypatch.setattr(SharedWork, "_make_all", after_another)
    assert contents(prepare_tokens(corpus, BYTES, cache, others="leave")) == alone
    assert not said.exists() and n_tokenized() == len(cut_in_parts(corpus))
    assert len([path for path in Path(cache).iterdir() if path.is_dir()]) == 1


def test_after_a_mistake_in_the_text_what_is_made_stays(tmp_path: Path, n_tokenized: Counted) -> None:
    corpus, _ = made(tmp_path / "text", rows)
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone")))
    last, cache = Path(corpus.sources[-1]), str(tmp_path / "cache")
    good = last.read_bytes()
    last.write_bytes(good + b"[")
    with pytest.raises(ValueError, match="is not JSON"):
        prepare_tokens(corpus, BYTES, cache, others="wait")
    last.write_bytes(good)
    again = contents(prepare_tokens(corpus, BYTES, cache, others="wait"))
    # But for the source's time, in meta.json.
    assert {**again, "meta.json": None} == {**alone, "meta.json": None}
    assert n_tokenized() == len(cut_in_parts(corpus))


def test_a_file_that_changes_between_two_tries_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokenized: Counted
) -> None:
    corpus, _ = made(tmp_path / "text", many_files)
    cache, tokenize = str(tmp_path / "cache"), SharedWork._tokenize

    def stopped(self: SharedWork, part: Any, folder: Path) -> dict[str, Any]:
        if part.number == 4:
            raise KeyboardInterrupt
        return tokenize(self, part, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SharedWork, "_tokenize", stopped)
        prepare_tokens(corpus, BYTES, cache, others="wait")
    assert n_tokenized() == 4
    Path(corpus.sources[0]).write_text("other text")
    alone = contents(prepare_tokens(corpus, BYTES, str(tmp_path / "alone")))
    assert contents(prepare_tokens(corpus, BYTES, cache, others="wait")) == alone


def test_too_little_text_leaves_no_parts(tmp_path: Path) -> None:
    corpus, _ = made(tmp_path / "text", many_files)

    def refuse(n_tokens: int) -> None:
        raise UserError(f"only {n_tokens}")

    with pytest.raises(UserError, match="only"):
        prepare_tokens(corpus, BYTES, str(tmp_path / "cache"), refuse, others="wait")
    assert list((tmp_path / "cache").iterdir()) == []
