"""Reads windows of several texts as if they were one, in which each is a circle of its own."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.token_cache import TokenSplit
from gpt_lightning.data.windows import Ints, gather


class MixedSplit:
    """Holds a split of each text; a window's start counts the tokens of those before its own, too."""

    def __init__(self, splits: Sequence[TokenSplit]) -> None:
        self.splits = tuple(splits)
        self._begins = np.cumsum([0, *(split.n_tokens for split in splits)])

    @property
    def folder(self) -> Path:
        """Is one of them, to name where damage may lie."""
        return self.splits[0].folder.parent

    def check(self, starts: Ints, seq_len: int, *, documents: bool) -> None:
        for split, own, rows in self._by_split(starts):
            split.check(own[rows], seq_len, documents=documents)

    def gather(self, starts: Ints, lengths: Ints, *, rows: int, seq_len: int) -> tuple[Ints, Ints]:
        """Reads inputs and targets [rows, seq_len] of the windows."""
        number = self._numbers(starts)
        texts = [self.splits[index].tokens for index in number.tolist()]
        return gather(texts, starts - self._begins[number], lengths, rows=rows, seq_len=seq_len)

    def document_ids(self, starts: Ints, lengths: Ints, *, rows: int, seq_len: int) -> Ints:
        """Tells which document each input is in, counted within its window."""
        found = np.zeros((rows, seq_len), dtype=np.int64)
        for split, own, here in self._by_split(starts):
            place = here.nonzero()[0]
            found[place] = split.document_ids(own[here], lengths[here], rows=len(place), seq_len=seq_len)
        return found

    def _numbers(self, starts: Ints) -> NDArray[np.intp]:
        """Tells of which split each window is."""
        return self._begins.searchsorted(starts, side="right") - 1

    def _by_split(self, starts: Ints) -> Iterator[tuple[TokenSplit, Ints, NDArray[np.bool_]]]:
        """Yields each split that has any of the windows, all starts as in it, and which are its own."""
        number = self._numbers(starts)
        own = starts - self._begins[number]
        for index in np.unique(number).tolist():
            yield self.splits[index], own, number == index
