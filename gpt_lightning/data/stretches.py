"""Cuts large files where documents begin, so that several processes can share the reading of one."""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from gpt_lightning.data.parquet_text import group_ends

_SEARCHED_BYTES = (1 << 16, 1 << 20, 1 << 24)  # from a place on for the beginning of a document


class Stretch(NamedTuple):
    """Is a file, or of a large one what is `within` two places: in bytes, or of parquet in groups of rows."""

    source: str
    within: tuple[int, int] | None = None


def cut_file(source: str, n_bytes: int, separator: str | None) -> list[tuple[Stretch, int]]:
    """Cuts a file into stretches of about `n_bytes` and whole documents; with each comes its size.

    A file stays whole if it is packed, if it is one document, or where no document begins for 16 MB.
    """
    size = os.path.getsize(source)
    if source.endswith(".parquet"):
        ends = group_ends(source)
        wanted = [(group, end) for group, end in enumerate(ends, start=1)]
        places = [(0, 0), *_every(wanted[:-1], n_bytes), *wanted[-1:]]
    elif source.endswith(".jsonl"):
        places = [(place, place) for place in _beginnings(source, size, n_bytes, b"\n")]
    elif source.endswith(".txt") and separator:
        places = [(place, place) for place in _beginnings(source, size, n_bytes, separator.encode())]
    else:
        places = []
    if len(places) < 3:
        return [(Stretch(source), size)]
    return [(Stretch(source, (a[0], b[0])), b[1] - a[1]) for a, b in pairwise(places)]


def _every(places: list[tuple[int, int]], n_bytes: int) -> Iterator[tuple[int, int]]:
    """Picks places that are so many bytes apart at least."""
    last = 0
    for place in places:
        if place[1] - last >= n_bytes:
            yield place
            last = place[1]


def _beginnings(source: str, size: int, n_bytes: int, separator: bytes) -> list[int]:
    """Finds the beginnings of documents next to multiples of `n_bytes`, with both ends of the file."""
    found = [0]
    with open(source, "rb") as file:
        for place in range(n_bytes, size - n_bytes // 2, n_bytes):
            if place < found[-1]:
                continue
            for n_searched in _SEARCHED_BYTES:
                first = max(0, place - len(separator) + 1)
                file.seek(first)
                text = file.read(n_searched)
                if (beginning := _after_separator(text, separator, place - first)) is not None:
                    found.append(first + beginning)
                    break
    return [place for place in found if place < size] + [size]


def _after_separator(text: bytes, separator: bytes, least: int) -> int | None:
    """Finds the end of the first separator, from `least` on, that any reader takes for one.

    Where separators overlap, as three line breaks are twice two of them, it depends on what came before which
    of them is taken. So one counts if none begins within its length before it.
    """
    former, place = -len(separator), text.find(separator)
    while place >= 0:
        if place >= least and place - former >= len(separator):
            return place + len(separator)
        former, place = place, text.find(separator, place + 1)
    return None
