"""Measures on a sample how much of a text a tokenizer loses: what does not come back when it is decoded."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from gpt_lightning.data.documents import Piece
from gpt_lightning.data.tokenizer import TextTokenizer

_STRETCH = 1000  # characters
_STRETCHES = 64


class TextSample:
    """Keeps some stretches of a text that comes piece by piece, each equally likely: all of a short one."""

    def __init__(self) -> None:
        self._stretches: list[str] = []
        self._n_seen = 0
        self._random = random.Random(0)
        self._begins = True

    def add(self, piece: Piece) -> None:
        for start in range(0, len(piece.text), _STRETCH):
            place = self._n_seen if self._n_seen < _STRETCHES else self._random.randrange(self._n_seen + 1)
            self._n_seen += 1
            if place < _STRETCHES:
                self._stretches[place : place + 1] = [self._stretch(piece, start)]
        self._begins = piece.ends_document

    def _stretch(self, piece: Piece, start: int) -> str:
        """Leaves out whitespace at a cut, which tokenizers may drop at the beginning or end of a document."""
        text, end = piece.text[start : start + _STRETCH], start + _STRETCH
        if start > 0 or not self._begins:
            text = text.lstrip()
        if end < len(piece.text) or not piece.ends_document:
            text = text.rstrip()
        return text

    def keep(self) -> dict[str, Any]:
        """Returns plain data for `joined`."""
        return {"n_seen": self._n_seen, "stretches": self._stretches}

    @classmethod
    def joined(cls, kept: list[dict[str, Any]]) -> "TextSample":
        """Makes one sample of those of consecutive texts: each of their stretches is equally likely again."""
        sample = cls()
        left = [part["n_seen"] for part in kept]
        unused = [sample._random.sample(part["stretches"], len(part["stretches"])) for part in kept]
        for _ in range(min(_STRETCHES, sum(left))):
            [part] = sample._random.choices(range(len(kept)), left)
            sample._stretches.append(unused[part].pop())
            left[part] -= 1
        sample._n_seen = sum(part["n_seen"] for part in kept)
        return sample

    def lost_share(self, tokenizer: TextTokenizer) -> float:
        """Decodes the sample's ids, and returns the share of its characters that are not as they were."""
        ids_of_all = tokenizer.encode_batch(self._stretches)
        decoded = map(tokenizer.decode, ids_of_all)
        changed = sum(map(_n_changed, self._stretches, decoded))
        return changed / max(1, sum(map(len, self._stretches)))


def sampled(
    marked: Iterable[tuple[str, Piece]], samples: defaultdict[str, TextSample]
) -> Iterator[tuple[str, Piece]]:
    """Yields the same text, and adds to the sample of each split."""
    for split, piece in marked:
        samples[split].add(piece)
        yield split, piece


def _n_changed(text: str, decoded: str) -> int:
    """Counts characters that are missing or new, up to all; one at least if the order alone differs."""
    if text == decoded:
        return 0
    before, after = Counter(text), Counter(decoded)
    return min(len(text), max(1, (before - after).total(), (after - before).total()))
