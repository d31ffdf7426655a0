"""Names the text of a run, and reads it document by document, each marked with the split that it is of."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.charset import NotUTF8
from gpt_lightning.data.documents import (
    Piece,
    begins_as_utf8,
    has_windows_line_ends,
    occurs_in,
    read_pieces,
    source_bytes,
    utf8_length,
)
from gpt_lightning.data.overlap import refuse_shared_files
from gpt_lightning.data.sources import resolve_sources
from gpt_lightning.data.split import plan_split, split_pieces
from gpt_lightning.data.stretches import Stretch
from gpt_lightning.exit_codes import UserError


@dataclass(frozen=True)
class Corpus:
    """Names the sources of each split, and all else that decides which text is trained on and held out."""

    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    test_files: tuple[str, ...]
    val_fraction: float
    seed: int
    text_key: str
    document_separator: str | None

    @classmethod
    def find(
        cls,
        patterns: dict[str, list[str] | str | None],
        *,
        label: Callable[[str], str] = "data.{}".format,
        **settings: Any,
    ) -> "Corpus":
        """Finds the files that the `patterns` of train_files, val_files and test_files stand for.

        `label` names such an option as the user gives it.
        """
        files: dict[str, Any] = {}
        for option, given in patterns.items():
            given = [given] if isinstance(given, str) else given
            files[option] = () if given is None else tuple(resolve_sources(given, label(option)))
        refuse_shared_files(files, label)
        return cls(**files, **settings)

    @property
    def sources(self) -> tuple[str, ...]:
        return self.train_files + self.val_files + self.test_files

    @property
    def n_bytes(self) -> int:
        return sum(map(source_bytes, self.sources))

    @property
    def is_separated(self) -> bool:
        """Tells whether a separator that is given occurs anywhere."""
        separator = self.document_separator
        return separator is None or any(occurs_in(separator, source) for source in self.sources)

    @property
    def n_with_windows_line_ends(self) -> int:
        return sum(map(has_windows_line_ends, self.sources))

    def read(
        self,
        files: Iterable[str],
        on_bytes: Callable[[int], None],
        on_empty: Callable[[], object] = lambda: None,
    ) -> Iterator[Piece]:
        return self.read_stretches(map(Stretch, files), on_bytes, on_empty)

    def read_stretches(
        self,
        stretches: Iterable[Stretch],
        on_bytes: Callable[[int], None],
        on_empty: Callable[[], object] = lambda: None,
    ) -> Iterator[Piece]:
        how: dict[str, Any] = {"text_key": self.text_key, "document_separator": self.document_separator}
        for file, within in stretches:
            try:
                yield from read_pieces(file, on_bytes, on_empty, within=within, **how)
            except NotUTF8 as error:
                others = sum(not begins_as_utf8(other) for other in self.sources if other != file)
                more = f"; so are {others} others of the {len(self.sources)} files" if others else ""
                raise UserError(f"{error}{more}") from None

    def read_marked(
        self, on_bytes: Callable[[int], None], on_empty: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[str, Piece]]:
        """Yields all text, each piece with the name of its split."""
        yield from self.read_train(on_bytes, on_empty)
        for name, files in (("val", self.val_files), ("test", self.test_files)):
            for piece in self.read(files, on_bytes, on_empty):
                yield name, piece

    def read_train(
        self, on_bytes: Callable[[int], None], on_empty: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[str, Piece]]:
        """Yields the training text, what is held out marked `val`; reads the files twice if any of it is."""
        if not self.holds_out_by_size:
            return (("train", piece) for piece in self.read(self.train_files, on_bytes, on_empty))
        sizes = document_sizes(self.read(self.train_files, lambda n_bytes: None))
        cuts = plan_split(sizes, self.val_fraction, self.seed)
        return split_pieces(self.read(self.train_files, on_bytes, on_empty), cuts)

    @property
    def holds_out_by_size(self) -> bool:
        """Tells whether the size of each training document decides what is held out."""
        return bool(self.train_files) and not self.val_files and self.val_fraction > 0


def document_sizes(pieces: Iterable[Piece]) -> NDArray[np.int64]:
    """Counts the UTF-8 bytes of each document."""
    sizes, size = array("q"), 0
    for piece in pieces:
        size += utf8_length(piece.text)
        if piece.ends_document:
            sizes.append(size)
            size = 0
    return np.asarray(sizes)


def no_train_files() -> UserError:
    """Says that there is nothing to train on."""
    return UserError("data.train_files=null names no text; give a file, folder or glob, or python:docs")
