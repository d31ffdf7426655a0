"""Reads documents from text files: .txt, .jsonl and .parquet, the first two also as .gz or .zst.

A document arrives as one or more pieces, so that a book or a dump of any size streams through flat memory.
Pieces are cut only where a byte-level BPE cannot notice: the ids of the pieces, joined, are the whole's. For
tokenizers that could notice, `encoding` joins the pieces again.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from gpt_lightning.data.python_docs import SOURCE_NAME, python_documents
from gpt_lightning.exit_codes import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")

_CHUNK_BYTES = 1 << 18
_PIECE_CHARACTERS = 1 << 17
# Control characters are space to Python, and to some tokenizers nothing.
_LETTER_THEN_SPACE = re.compile(r"[^\W\d_](?=[^\S\x0b\x0c\x1c-\x1f\x85])")


class Piece(NamedTuple):
    """Holds a part of a document, the last one if `ends_document`."""

    text: str
    ends_document: bool


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def resolve_sources(patterns: list[str], option: str) -> list[str]:
    """Lists the files behind file names, globs and folders; `python:docs` stands for itself.

    The order is that of the patterns, sorted within each, without repeats.
    """
    if not patterns:
        raise UserError(f"{option}=[] names no file; give a file, a folder, a glob or {SOURCE_NAME}")
    found: dict[str, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_resolve(pattern, option)))
    return list(found)


def _resolve(pattern: str, option: str) -> list[str]:
    if pattern == SOURCE_NAME:
        return [SOURCE_NAME]
    path = os.path.abspath(os.path.expanduser(pattern))
    matches = [path] if os.path.exists(path) else glob(path, recursive=True)
    if os.path.isfile(path) and not path.endswith(SUFFIXES):
        raise UserError(f"{option}={pattern} has no known suffix; use one of {' '.join(SUFFIXES)}")
    if not matches and not has_magic(path):
        raise UserError(f"{option}={pattern} does not exist; check the path, seen from {os.getcwd()}")
    files = sorted({file for match in matches for file in _files_under(Path(match))})
    if not files:
        raise UserError(f"{option}={pattern} matches no file that ends in one of {' '.join(SUFFIXES)}")
    return files


def _files_under(path: Path) -> Iterator[str]:
    """Yields the file itself, or the files in a folder that are not hidden in it."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.is_file() and file.name.endswith(SUFFIXES):
            yield str(file)


def source_bytes(source: str) -> int:
    """Returns what the `on_bytes` calls of `read_pieces` add up to: bytes on disk."""
    return sum(map(len, python_documents())) if source == SOURCE_NAME else os.path.getsize(source)


def read_pieces(
    source: str, on_bytes: Callable[[int], None], *, text_key: str, document_separator: str | None
) -> Iterator[Piece]:
    """Streams the documents of one source; documents of nothing but whitespace are skipped.

    `on_bytes` hears how many more bytes of the source were read.
    """
    if source == SOURCE_NAME:
        for document in python_documents():
            yield from _pieces([Piece(document, ends_document=True)])
            on_bytes(len(document))
    elif source.endswith(".parquet"):
        yield from _pieces(_parquet_documents(source, text_key, on_bytes))
    elif source.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from _pieces(_jsonl_documents(source, text_key, on_bytes))
    elif document_separator is None:
        yield from _pieces(Piece(text, ends_document=False) for text in _decoded(source, on_bytes))
    else:
        yield from _pieces(_separated(_decoded(source, on_bytes), document_separator))


def _pieces(parts: Iterable[Piece]) -> Iterator[Piece]:
    """Regroups parts into pieces of even size, cut where it is safe; drops empty documents."""
    text, inside_document, searched = "", False, 0
    for part in chain(parts, [Piece("", ends_document=True)]):
        text += part.text
        start = 0
        while len(text) > (limit := max(start + _PIECE_CHARACTERS, searched)):
            cut = _safe_cut(text, start, limit)
            if cut is None:  # look again when more text is there, but only at what is new
                searched = len(text)
                break
            yield Piece(text[start:cut], ends_document=False)
            start, inside_document = cut, True
        if start:
            text, searched = text[start:], 0
        if part.ends_document:
            if inside_document or text.strip():
                yield Piece(text, ends_document=True)
            text, inside_document, searched = "", False, 0


def _safe_cut(text: str, start: int, limit: int) -> int | None:
    """Finds the last cut up to `limit`, else the first beyond it, that changes no token id on either side.

    Pre-tokenizers join whitespace with what follows it, or punctuation with the line break after it; none
    looks back. So a cut is safe after a line break that stands alone between two other characters, and, where
    a text has none (Windows line ends, one endless line), between a letter and whitespace.
    """
    cut = text.rfind("\n", start + 1, limit) + 1
    while cut > 0:
        if not text[cut - 2].isspace() and not text[cut].isspace():
            return cut
        cut = text.rfind("\n", start + 1, cut - 1) + 1
    near = [match.end() for match in _LETTER_THEN_SPACE.finditer(text, max(start, limit - 10_000), limit + 1)]
    if near:
        return near[-1]
    beyond = _LETTER_THEN_SPACE.search(text, limit - 1)
    return beyond.end() if beyond else None


def _separated(texts: Iterable[str], separator: str) -> Iterator[Piece]:
    """Cuts a stream of text at every separator, also at one that straddles two chunks."""
    rest = ""
    for text in texts:
        *documents, rest = (rest + text).split(separator)
        for document in documents:
            yield Piece(document, ends_document=True)
        # The end stays back, as it may be the beginning of a separator.
        kept = len(separator) - 1
        if len(rest) > kept:
            yield Piece(rest[: len(rest) - kept], ends_document=False)
            rest = rest[len(rest) - kept :]
    yield Piece(rest, ends_document=True)


def _decoded(path: str, on_bytes: Callable[[int], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for chunk in chain(_chunks(path, on_bytes), [b""]):
        held_back = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            problem = f"{path} is not UTF-8 at byte {position - held_back + error.start}"
            raise UserError(f"{problem}; convert it, e.g. with iconv -t UTF-8") from None
        yield text.removeprefix("\ufeff") if position == 0 else text
        position += len(chunk)


def _jsonl_documents(path: str, text_key: str, on_bytes: Callable[[int], None]) -> Iterator[Piece]:
    for number, line in enumerate(_lines(_decoded(path, on_bytes)), start=1):
        if line.strip():
            yield Piece(_json_text(line, text_key, f"{path}, line {number}"), ends_document=True)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields whole lines; parts of a long one wait in a list: adding up would be quadratic."""
    waiting: list[str] = []
    for text, ends_line in _separated(texts, "\n"):
        waiting.append(text)
        if ends_line:
            yield "".join(waiting)
            waiting = []


def json_row(line: str, place: str) -> Any:
    """Reads a line of a .jsonl file."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); each line must be one JSON object") from None


def _json_text(line: str, text_key: str, place: str) -> str:
    row = json_row(line, place)
    if not isinstance(row, dict) or text_key not in row:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place} has no key data.text_key={text_key}; it has: {keys}")
    text = row[text_key]
    if text is None:  # a row without text is an empty document
        return ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{place}: data.text_key={text_key} is not text but {kind}; choose another key")
    try:
        # Only an escape such as \ud800 can bring in half of a surrogate pair.
        if "\\u" in line:
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half of a surrogate pair (\\ud800 to \\udfff); mend it") from None
    return text


def _parquet_documents(path: str, text_key: str, on_bytes: Callable[[int], None]) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow; pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise _damaged(path, error) from None
    with file:
        names = file.schema_arrow.names
        if text_key not in names:
            raise UserError(f"{path} has no column data.text_key={text_key}; it has: {', '.join(names)}")
        kind = file.schema_arrow.field(text_key).type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise UserError(f"{path}: column data.text_key={text_key} is {kind}, not text; choose another")
        for batch in file.iter_batches(batch_size=64, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                yield Piece(text or "", ends_document=True)
            on_bytes(os.path.getsize(path) * batch.num_rows // file.metadata.num_rows)


def _chunks(path: str, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yields the unpacked bytes of a file, and tells how far into the packed file each chunk reaches."""
    told = 0
    with open(path, "rb") as packed:
        stream, damage = _unpacked(path, packed)
        while True:
            try:
                chunk = stream.read(_CHUNK_BYTES)
            except damage as error:
                raise _damaged(path, error) from None
            on_bytes(packed.tell() - told)
            told = packed.tell()
            if not chunk:
                break
            yield chunk


def _unpacked(path: str, packed: IO[bytes]) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    """Opens the file's content as a stream; names the errors by which that stream tells of damage."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=packed), (EOFError, zlib.error, gzip.BadGzipFile)  # type: ignore
    if not path.endswith(".zst"):
        return packed, ()
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs the package zstandard; pip install zstandard") from None
    reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
    return reader, (zstandard.ZstdError,)


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({str(error).splitlines()[0]}); copy or pack it again")
