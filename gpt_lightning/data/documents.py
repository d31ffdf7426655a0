"""Reads documents from text files: .txt, .jsonl and .parquet, the first two also as .gz or .zst.

A document arrives as one or more pieces, so that a book or a dump of any size streams through flat memory.
Pieces are cut only where a byte-level BPE cannot notice: the ids of the pieces, joined, are the whole's. A
million characters without such a place are cut anyway. For tokenizers that could notice, `encoding` joins the
pieces again.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from gpt_lightning.data.charset import NotUTF8, not_utf8
from gpt_lightning.data.parquet_text import parquet_texts
from gpt_lightning.data.python_docs import SOURCE_NAME, python_documents
from gpt_lightning.data.unpacking import unpacked_chunks
from gpt_lightning.exit_codes import UserError

_PIECE_CHARACTERS = 1 << 17
_LONGEST_PIECE = 1 << 20  # where nothing separates a text, which would fill the memory
# Control characters are space to Python, and to some tokenizers nothing.
_LETTER_THEN_SPACE = re.compile(r"[^\W\d_](?=[^\S\x0b\x0c\x1c-\x1f\x85])")


class Piece(NamedTuple):
    """Holds a part of a document, the last one if `ends_document`."""

    text: str
    ends_document: bool


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def has_half_character(text: str) -> bool:
    """Tells whether half of a surrogate pair is in a text, which then has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def source_bytes(source: str) -> int:
    """Returns what the `on_bytes` calls of `read_pieces` add up to: bytes on disk."""
    return sum(map(len, python_documents())) if source == SOURCE_NAME else os.path.getsize(source)


def read_pieces(
    source: str,
    on_bytes: Callable[[int], None],
    on_empty: Callable[[], object] = lambda: None,
    *,
    text_key: str,
    document_separator: str | None,
    within: tuple[int, int] | None = None,
) -> Iterator[Piece]:
    """Streams the documents of one source; documents of nothing but whitespace are skipped.

    `on_bytes` hears how many more bytes of the source were read, `on_empty` of each row that is skipped. Of a
    file that `stretches` cuts, only what lies `within` two such places is read.
    """
    if source == SOURCE_NAME:
        for document in python_documents():
            yield from _pieces([Piece(document, ends_document=True)])
            on_bytes(len(document))
    elif source.endswith(".parquet"):
        texts = parquet_texts(source, text_key, on_bytes, within)
        yield from _pieces(_told((Piece(text, ends_document=True) for text in texts), on_empty))
    elif source.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from _pieces(_told(_jsonl_documents(source, text_key, on_bytes, within), on_empty))
    elif document_separator is None:
        yield from _pieces(Piece(text, ends_document=False) for text in _decoded(source, on_bytes))
    else:
        yield from _pieces(_separated(_decoded(source, on_bytes, within), document_separator))


def occurs_in(separator: str, source: str) -> bool:
    """Tells whether something separates documents in a source, of which it reads no more than to there."""
    if source == SOURCE_NAME or not source.endswith((".txt", ".txt.gz", ".txt.zst")):
        return False
    parts = _separated(_decoded(source, lambda n_bytes: None), separator)
    return sum(1 for _ in islice((part for part in parts if part.ends_document), 2)) == 2


def has_windows_line_ends(source: str) -> bool:
    """Tells by its first line whether a text file has them; no byte of it is changed."""
    if source == SOURCE_NAME or not source.endswith((".txt", ".txt.gz", ".txt.zst")):
        return False
    first, ends_line = next(_separated(_decoded(source, lambda n_bytes: None), "\n"))
    return ends_line and first.endswith("\r")


def begins_as_utf8(source: str) -> bool:
    """Tells whether the beginning of a file of text can be read."""
    try:
        if source != SOURCE_NAME and not source.endswith(".parquet"):
            next(_decoded(source, lambda n_bytes: None))
    except NotUTF8:
        return False
    return True


def _told(rows: Iterator[Piece], on_empty: Callable[[], object]) -> Iterator[Piece]:
    for row in rows:
        if not row.text or row.text.isspace():
            on_empty()
        yield row


def _pieces(parts: Iterable[Piece]) -> Iterator[Piece]:
    """Regroups parts into pieces of even size, cut where it is safe; drops empty documents."""
    text, inside_document, searched = "", False, 0
    for part in chain(parts, [Piece("", ends_document=True)]):
        text += part.text
        start = 0
        while len(text) > (limit := max(start + _PIECE_CHARACTERS, searched)):
            cut = _safe_cut(text, start, limit)
            if cut is None and len(text) - start > _LONGEST_PIECE:
                cut = start + _LONGEST_PIECE
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
    """Finds the last cut up to `limit`, else the first soon beyond, that changes no token id on either side.

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
    beyond = _LETTER_THEN_SPACE.search(text, limit - 1, start + _LONGEST_PIECE)
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


def _decoded(
    path: str, on_bytes: Callable[[int], None], within: tuple[int, int] | None = None
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0 if within is None else within[0]
    is_start = position == 0
    for chunk in chain(unpacked_chunks(path, on_bytes, within), [b""]):
        held_back = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = position - held_back + error.start
            raise NotUTF8(not_utf8(path, place, chunk)) from None
        yield text.removeprefix("\ufeff") if is_start else text
        position, is_start = position + len(chunk), is_start and not text


def _jsonl_documents(
    path: str, text_key: str, on_bytes: Callable[[int], None], within: tuple[int, int] | None
) -> Iterator[Piece]:
    place = f"{path}, from byte {within[0]} on" if within is not None and within[0] else path
    for number, line in enumerate(_lines(_decoded(path, on_bytes, within)), start=1):
        if line.strip():
            yield Piece(_json_text(line, text_key, f"{place}, line {number}"), ends_document=True)


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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        problem = str(error).partition(";")[0]
        raise UserError(f"{place} is not JSON ({problem}); each line must be one JSON object") from None


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
    if "\\u" in line and has_half_character(text):  # only an escape such as \ud800 can bring one in
        raise UserError(f"{place} holds half of a surrogate pair (\\ud800 to \\udfff); mend it")
    return text
