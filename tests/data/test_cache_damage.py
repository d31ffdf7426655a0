"""A cache that is not as it was written is noticed, and built anew."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data.token_cache import prepare_tokens
from gpt_lightning.data.tokenizer_cache import prepare_tokenizer
from gpt_lightning.exit_codes import UserError
from tests.data.test_token_cache import BYTES, building_reasons, corpus, documents_of, write_documents


@pytest.fixture(autouse=True)
def hear_info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="gpt_lightning")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # another test of this process may fork


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def _describe_fewer_tokens(path: Path) -> None:
    n_tokens = json.loads(path.read_text())["built"]["train"]["n_tokens"]
    path.write_text(path.read_text().replace(f'"n_tokens": {n_tokens}', f'"n_tokens": {n_tokens - 100}'))


DAMAGES = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit": _flip_a_bit,
    "gone": Path.unlink,
}
OF_META = {
    "another count": _describe_fewer_tokens,
    "deep": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[1]"),
    "a text": lambda path: path.write_text('{"files": {"meta.json": "x"}, "sources": 3}'),
}
OTHER_FILES = ("train.documents.bin", "val.tokens.bin", "train.tokens.bin.digests")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("train.tokens.bin", damage) for damage in DAMAGES),
        *((name, damage) for name in OTHER_FILES for damage in ("bit", "gone")),
        *(("meta.json", damage) for damage in {**DAMAGES, **OF_META}),
    ],
)
def test_damage_is_found_and_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), str(tmp_path / "cache")
    split = prepare_tokens(corpus(source), BYTES, cache)["train"]
    expected = documents_of(split)
    {**DAMAGES, **OF_META}[damage](split.folder / name)
    caplog.clear()
    assert documents_of(prepare_tokens(corpus(source), BYTES, cache)["train"]) == expected
    (reason,) = building_reasons(caplog)
    assert reason in (f"{name.removesuffix('.digests')} is damaged", f"{name} is damaged", "it is damaged")


def test_a_damaged_tokenizer_is_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), str(tmp_path / "cache")
    trained = prepare_tokenizer([corpus(source)], 300, cache)
    (path,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    path.write_text(path.read_text().replace('"id": 0', '"id": 1'))
    caplog.clear()
    assert prepare_tokenizer([corpus(source)], 300, cache).fingerprint == trained.fingerprint
    assert building_reasons(caplog) == ["tokenizer.json is damaged"]


def test_what_an_earlier_version_kept_opens_unless_it_contradicts_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = write_documents(tmp_path / "a.jsonl"), str(tmp_path / "cache")
    split = prepare_tokens(corpus(source), BYTES, cache)["train"]
    expected = documents_of(split)
    meta = json.loads((split.folder / "meta.json").read_text())
    del meta["digest"]
    for name in [name for name in meta["files"] if name.endswith(".digests")]:
        del meta["files"][name]
        (split.folder / name).unlink()
    (split.folder / "meta.json").write_text(json.dumps(meta, indent=2))
    caplog.clear()
    old = prepare_tokens(corpus(source), BYTES, cache)["train"]
    old.check(np.array([0, 7]), 16, documents=True)
    assert documents_of(old) == expected and building_reasons(caplog) == []
    _describe_fewer_tokens(split.folder / "meta.json")
    with pytest.raises(UserError, match="does not hold the .* tokens it tells of; remove that folder"):
        prepare_tokens(corpus(source), BYTES, cache)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="of Linux")
def test_all_of_a_cache_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    file_of = lambda descriptor: Path(f"/proc/self/fd/{descriptor}").resolve()  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(file_of(descriptor)))
    source = write_documents(tmp_path / "a.jsonl")
    folder = prepare_tokens(corpus(source), BYTES, str(tmp_path / "cache"))["train"].folder
    unfinished = folder.with_name(f".{folder.name}.tmp")
    assert {unfinished / path.name for path in folder.iterdir()} | {unfinished, folder.parent} <= set(flushed)
    flushed.clear()
    os.utime(source, (1, 1))
    prepare_tokens(corpus(source), BYTES, str(tmp_path / "cache"))
    assert folder in flushed and any(path.name.startswith(".meta.json") for path in flushed)
