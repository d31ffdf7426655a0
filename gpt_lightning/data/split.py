"""Decides which text is held out: whole documents where there are enough, else the end of each.

It is decided before the tokenizer is trained and windows are cut, so no held-out text reaches either, and
depends on nothing but the documents' sizes, the seed and the fraction.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.documents import Piece, utf8_length

# How far a cut within a document may move to reach the next line.
_NEAR_BYTES = 2000


def plan_split(sizes: NDArray[np.int64], val_fraction: float, seed: int) -> NDArray[np.int64]:
    """Gives the byte at which what is held out of each document begins: 0 for all of it, its size for none.

    Documents are taken in a shuffled order while they fit into `val_fraction` of all bytes.
    """
    target = int(val_fraction * int(sizes.sum()))
    held_out = np.zeros(len(sizes), dtype=np.bool_)
    smallest = int(sizes.min()) if len(sizes) else 0
    left = target
    for index in np.random.default_rng(seed).permutation(len(sizes)):
        if left < smallest:
            break
        if int(sizes[index]) <= left:
            held_out[index] = True
            left -= int(sizes[index])
    if not held_out.any() and target:
        # No document fits: a small one may exceed the target a little, but a book must be cut.
        if len(sizes) == 1 or smallest > 2 * target:
            return sizes - (sizes * val_fraction).astype(np.int64)
        held_out[int(sizes.argmin())] = True
    return np.where(held_out, 0, sizes)


def split_pieces(pieces: Iterable[Piece], cuts: NDArray[np.int64]) -> Iterator[tuple[str, Piece]]:
    """Yields the same text, each piece marked `train` or `val`, by the cuts that `plan_split` gives."""
    document, position = 0, 0
    for piece in pieces:
        cut, size = int(cuts[document]) - position, utf8_length(piece.text)
        if 0 < cut < size:
            yield from _cut_piece(piece, cut)
        elif cut > 0:
            yield "train", Piece(piece.text, piece.ends_document or cut == size)
        else:
            yield "val", piece
        position += size
        if piece.ends_document:
            document, position = document + 1, 0


def _cut_piece(piece: Piece, cut: int) -> Iterator[tuple[str, Piece]]:
    """Cuts a piece in two, at the next line break if one is near, else at the next character."""
    text = piece.text.encode("utf-8")
    while cut < len(text) and 0x80 <= text[cut] < 0xC0:  # inside a character
        cut += 1
    line_end = text.find(b"\n", cut, cut + _NEAR_BYTES) + 1
    if line_end and text[line_end:].strip():
        cut = line_end
    yield "train", Piece(text[:cut].decode("utf-8"), ends_document=True)
    if cut < len(text):
        yield "val", Piece(text[cut:].decode("utf-8"), piece.ends_document)
