"""Decides which text is held out: whole documents where there are enough, else the end of each.

Decided before tokenizer training and before windowing, so no held-out text reaches either. A pure function of
the documents' sizes, the seed and the fraction.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.documents import Piece

# How far a cut within a document may move to reach the next line.
_NEAR_BYTES = 2000


@dataclass(frozen=True)
class SplitPlan:
    """Says of each document whether it is held out; None: the last `val_fraction` of every document is."""

    sizes: NDArray[np.uint64]
    val_fraction: float
    held_out: NDArray[np.bool_] | None


def plan_split(sizes: NDArray[np.uint64], val_fraction: float, seed: int) -> SplitPlan:
    """Takes documents in a shuffled order while they fit into `val_fraction` of all bytes."""
    target = int(val_fraction * int(sizes.sum()))
    held_out = np.zeros(len(sizes), dtype=np.bool_)
    order = np.random.default_rng(seed).permutation(len(sizes))
    smallest = int(sizes.min()) if len(sizes) else 0
    left = target
    for index in order:
        if left < smallest:
            break
        if int(sizes[index]) <= left:
            held_out[index] = True
            left -= int(sizes[index])
    if not held_out.any() and target:
        # No document fits: a small one may exceed the target a little, but a book must be cut.
        if len(sizes) == 1 or smallest > 2 * target:
            return SplitPlan(sizes, val_fraction, held_out=None)
        held_out[int(sizes.argmin())] = True
    return SplitPlan(sizes, val_fraction, held_out)


def split_pieces(pieces: Iterable[Piece], plan: SplitPlan) -> Iterator[tuple[str, Piece]]:
    """Yields the same text, each piece marked `train` or `val`."""
    document, position, in_val = 0, 0, False
    for piece in pieces:
        if plan.held_out is not None:
            yield "val" if plan.held_out[document] else "train", piece
        else:
            size = int(plan.sizes[document])
            text = piece.text.encode("utf-8")
            cut = size - int(size * plan.val_fraction) - position
            if in_val:
                yield "val", piece
            elif len(text) < cut:
                yield "train", piece
            else:
                in_val = True
                yield from _cut_piece(text, cut, ends_document=piece.ends_document)
            position += len(text)
        if piece.ends_document:
            document, position, in_val = document + 1, 0, False


def _cut_piece(text: bytes, cut: int, *, ends_document: bool) -> Iterator[tuple[str, Piece]]:
    """Cuts a piece in two, at the next line break if one is near, else at the next character."""
    while cut < len(text) and 0x80 <= text[cut] < 0xC0:  # inside a character
        cut += 1
    line_end = text.find(b"\n", cut, cut + _NEAR_BYTES) + 1
    if line_end and text[line_end:].strip():
        cut = line_end
    yield "train", Piece(text[:cut].decode("utf-8"), ends_document=True)
    if cut < len(text):
        yield "val", Piece(text[cut:].decode("utf-8"), ends_document)
