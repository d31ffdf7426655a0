"""Readers: every suffix, every error, and pieces that a tokenizer cannot tell from whole documents."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from gpt_lightning.data import documents, unpacking
from gpt_lightning.data.documents import read_pieces, source_bytes
from gpt_lightning.data.tokenizer import train_bpe
from gpt_lightning.exit_codes import UserError


def read(path: Path | str, text_key: str = "text", separator: str | None = None) -> list[str]:
    """Whole documents, joined from their pieces."""
    found, text = [], ""
    for piece in read_pieces(str(path), lambda n: None, text_key=text_key, document_separator=separator):
        text += piece.text
        if piece.ends_document:
            found.append(text)
            text = ""
    assert text == "", "the last piece must end its document"
    return found


def pack(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_json_lines_packed_or_not(tmp_path: Path, suffix: str) -> None:
    text = "\ufeffFirst line\r\nsecond é 鲁迅 🙂\n"
    assert read(pack(tmp_path / f"a.txt{suffix}", text.encode())) == [text[1:]]
    rows = ["one", "", "two\nlines", "  \n"]
    lines = "\n".join(json.dumps({"text": row, "n": 1}) for row in rows) + "\n\n"
    assert read(pack(tmp_path / f"a.jsonl{suffix}", lines.encode())) == ["one", "two\nlines"]


def test_frames_of_zst_follow_each_other_and_may_need_a_large_window(tmp_path: Path) -> None:
    text = "\ufeffeach character 鲁迅 🙂 in a frame of its own\n" * 3
    frames = b"".join(zstandard.compress(bytes([byte])) for byte in text.encode())
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert read(pack(tmp_path / "a.txt", frames + skippable).rename(tmp_path / "a.txt.zst")) == [text[1:]]
    # As `zstd --long=28` packs what it reads from a pipe.
    large = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=1)
    packer = zstandard.ZstdCompressor(compression_params=large).compressobj()
    (tmp_path / "b.txt.zst").write_bytes(packer.compress(b"one text") + packer.flush())
    assert read(tmp_path / "b.txt.zst") == ["one text"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_without_text_has_no_document(tmp_path: Path, suffix: str) -> None:
    assert read(pack(tmp_path / f"a.txt{suffix}", b"")) == []
    path = pack(tmp_path / f"b.txt{suffix}", b"one")
    path.write_bytes(path.read_bytes() + (tmp_path / f"a.txt{suffix}").read_bytes())
    assert read(path) == ["one"]


def test_parquet_column(tmp_path: Path) -> None:
    rows = [f"row {index}" for index in range(200)] + ["", None]
    parquet.write_table(pyarrow.table({"body": rows, "n": list(range(202))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="body") == rows[:200]


@pytest.mark.parametrize(
    "kind",
    [
        *(pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(6)),
        *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()),
    ],
)
@pytest.mark.parametrize("is_categories", [False, True])
def test_parquet_text_may_be_kept_as_bytes_or_categories(
    tmp_path: Path, kind: pyarrow.DataType, is_categories: bool
) -> None:
    rows = ["\u9c81\u8fc5".encode(), b"second", None, b"second"]
    column = pyarrow.array(rows, pyarrow.binary()).cast(kind)
    if is_categories and "view" not in str(kind):
        column = column.dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["\u9c81\u8fc5", "second", "second"]


def damaged_parquet(path: Path, at: int, **options: Any) -> None:
    parquet.write_table(pyarrow.table({"text": [f"a text {n}" for n in range(1000)]}), path, **options)
    content = bytearray(path.read_bytes())
    content[at : at + 100] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["snappy", "gzip", "none"])
def test_a_damaged_page_of_parquet_is_named(tmp_path: Path, compression: str) -> None:
    damaged_parquet(tmp_path / "a.parquet", 200, compression=compression, write_page_checksum=True)
    with pytest.raises(UserError, match=r"a.parquet is damaged \(.*\); copy"):
        read(tmp_path / "a.parquet")
    damaged_parquet(tmp_path / "b.parquet", -300)
    with pytest.raises(UserError, match=r"b.parquet is damaged \(.*\); copy"):
        read(tmp_path / "b.parquet")


def test_separator_also_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one", "two\n", "three " * 5, "4"]
    path = pack(tmp_path / "a.txt", "<SEP>".join([texts[0], "", *texts[1:]]).encode())
    for chunk in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(unpacking, "_CHUNK_BYTES", chunk)
        assert read(path, separator="<SEP>") == texts


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    rows = [f"row {index}" * 50 for index in range(300)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    lines = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    pack(tmp_path / "a.jsonl.gz", lines)
    pack(tmp_path / "a.txt", lines)
    for path in tmp_path.iterdir():
        told: list[int] = []
        list(read_pieces(str(path), told.append, text_key="text", document_separator=None))
        assert sum(told) == pytest.approx(source_bytes(str(path)), abs=20)


def mixed_text(line_end: str) -> str:
    """Prose, code and CJK with every kind of gap a pre-tokenizer treats specially."""
    draw = random.Random(5)
    words = ["don't", "we'll", "x=1", "...", "鲁迅", "。", "42", "naïve", "🙂", '"quoted"', "a-b"]
    gaps = [" ", " ", " ", "  ", line_end, line_end * 2, line_end + "    ", "\t", " " + line_end]
    return "".join(draw.choice(words) + draw.choice(gaps) for _ in range(6000))


@pytest.mark.parametrize("text", [mixed_text("\n"), mixed_text("\r\n"), mixed_text(" ")])
def test_ids_of_pieces_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    tokenizer = train_bpe([text], 700)
    path = pack(tmp_path / "a.txt", text.encode())
    monkeypatch.setattr(unpacking, "_CHUNK_BYTES", 501)
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 300)
    pieces = list(read_pieces(str(path), lambda n: None, text_key="text", document_separator=None))
    assert len(pieces) > 50 and "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    joined = [index for ids in tokenizer.encode_batch([piece.text for piece in pieces]) for index in ids]
    assert joined == tokenizer.encode(text)


def test_long_documents_come_in_bounded_pieces(tmp_path: Path) -> None:
    book = "The quick brown fox jumps.\nOver the lazy dog, it said.\n" * 20_000
    lines = json.dumps({"text": book}) + "\n" + json.dumps({"text": "b"})
    path = pack(tmp_path / "a.jsonl", lines.encode())
    pieces = list(read_pieces(str(path), lambda n: None, text_key="text", document_separator=None))
    assert max(len(piece.text) for piece in pieces) <= 1 << 17
    assert read(path) == [book, "b"]


def test_text_without_any_safe_place_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 10)
    monkeypatch.setattr(unpacking, "_CHUNK_BYTES", 16)
    endless = "A1" * 500
    assert read(pack(tmp_path / "a.txt", endless.encode())) == [endless]
    pieces = read_pieces(
        str(pack(tmp_path / "b.txt", (endless + "x yz." * 30).encode())),
        lambda n: None,
        text_key="text",
        document_separator=None,
    )
    assert [len(piece.text) for piece in pieces][:2] == [1001, 10]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_no_piece_is_longer_than_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(documents, "_LONGEST_PIECE", 1000)
    monkeypatch.setattr(unpacking, "_CHUNK_BYTES", 64)
    text = "ACGT" * 2000 + "AC GT " * 50 + "TTTT" * 2100
    content = text if suffix == ".txt" else json.dumps({"text": text})
    path = pack(tmp_path / f"a{suffix}", content.encode())
    pieces = list(read_pieces(str(path), lambda n: None, text_key="text", document_separator=None))
    assert "".join(piece.text for piece in pieces) == text
    lengths = [len(piece.text) for piece in pieces]
    assert max(lengths) <= 1000 + 64 and lengths[:8] == [1000] * 8 and len(lengths) < 22


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    yield "a.txt", "ab é".encode()[:-1], "a.txt is not UTF-8 at byte 3; convert"
    yield "b.txt", b"x" * 300_000 + b"\xff" + b"y", "b.txt is not UTF-8 at byte 300000; convert"
    broken_at_a_border = b"x" * (unpacking._CHUNK_BYTES - 1) + b"\xc3("
    yield "border.txt", broken_at_a_border, f"is not UTF-8 at byte {unpacking._CHUNK_BYTES - 1}; convert"
    yield "c.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "c.jsonl is not UTF-8 at byte 25; convert"
    yield "d.jsonl", b'{"text": "ok"}\n\n{"text": \n', "d.jsonl, line 3 is not JSON .*; each line must be"
    digits = b'{"text": "ok", "n": ' + b"7" * 5000 + b"}"
    yield "digits.jsonl", digits, "digits.jsonl, line 1 is not JSON .*digits.*; each line must"
    yield "deep.jsonl", b"[" * 100_000, "deep.jsonl, line 1 is not JSON .*; each line must be"
    yield "e.jsonl", b'{"body": "ok"}\n', "e.jsonl, line 1 has no key data.text_key=text; it has: body"
    yield "f.jsonl", b"[1]", "f.jsonl, line 1 has no key data.text_key=text; it has: list"
    yield "g.jsonl", b'{"text": 3}', "g.jsonl, line 1: data.text_key=text is not text but int; choose"
    yield "h.jsonl", b'{"text": "a\\ud800"}', "h.jsonl, line 1 holds half of a surrogate pair .*; mend"
    yield "i.txt.gz", gzip.compress(b"x" * 1000)[:-9], "i.txt.gz is damaged .*; copy"
    yield "j.txt.gz", b"no gzip", "j.txt.gz is damaged .*; copy"
    yield "k.txt.zst", b"no zstd here", "k.txt.zst is damaged .*; copy"
    packed = gzip.compress(b"x" * 1000)
    yield "two.txt.gz", packed + packed[:-9], "two.txt.gz is damaged .*; copy"
    yield "none.txt.gz", b"", "none.txt.gz is damaged .it is empty.; copy"
    lines = "".join(f'{{"text": "row {n}"}}\n' for n in range(40_000)).encode()
    packed = zstandard.compress(lines)
    for name in ("cut.txt.zst", "cut.jsonl.zst"):
        for n_bytes in (3, 7, len(packed) // 4, len(packed) - 1):
            yield name, packed[:n_bytes], f"{name} is damaged .it ends within a frame.; copy"
    yield "two.jsonl.zst", packed + packed[:-1], "two.jsonl.zst is damaged .it ends within"
    yield "none.txt.zst", b"", "none.txt.zst is damaged .it is empty.; copy"
    yield "more.txt.zst", packed + b"and more", "more.txt.zst is damaged .*; copy"
    yield "l.parquet", b"no parquet", "l.parquet is damaged .*; copy"


@pytest.mark.parametrize(("name", "content", "message"), list(bad_files()), ids=lambda value: str(value)[:9])
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_parquet_errors_name_the_column(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column data.text_key=text; it has: n, body"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="data.text_key=n is int64, not text; choose"):
        read(tmp_path / "a.parquet", text_key="n")
    parquet.write_table(pyarrow.table({"text": [b"a", b"b", b"\xff"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet, row 3: data.text_key=text is not UTF-8; choose"):
        read(tmp_path / "b.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet has two columns data.text_key=text; rename"):
        read(tmp_path / "c.parquet")
