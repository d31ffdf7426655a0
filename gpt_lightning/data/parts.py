"""Tokenizes a corpus by several processes, on any machines, that share nothing but the cache's folder.

Text is cut into parts, whole files together or stretches of a large one, by their sizes alone. Each
process takes the next part that is not made and that nobody is at, so it does not matter how many there are,
when they start, or which of them is killed: what is made stays, in a folder beside the cache. Who finds every
part made joins them to the cache that one process would have written.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.cache_folder import (
    BeingBuilt,
    build_number,
    built_folder,
    is_fresh,
    sources_of,
    unread,
)
from gpt_lightning.data.corpus import Corpus, document_sizes
from gpt_lightning.data.documents import source_bytes
from gpt_lightning.data.encoding import EncodedText, Encoding
from gpt_lightning.data.overlap import DocumentDigests, Dropped, Marked
from gpt_lightning.data.progress import reading
from gpt_lightning.data.python_docs import SOURCE_NAME
from gpt_lightning.data.split import plan_split, split_pieces
from gpt_lightning.data.stretches import Stretch, cut_file
from gpt_lightning.data.text_loss import TextSample
from gpt_lightning.data.token_files import with_notes, write_encoded, write_text
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError

_MOST_PARTS = 512  # of one split, unless its files are many and uneven
_LEAST_BYTES = 1 << 22  # of text in a part, so that making its files costs little
_JOINED_TOKENS = 1 << 22  # at a time
_SIZES = "sizes.bin"
_AT_WORK = "parts made here: {} of {}; other processes are at the rest, and the last one to finish joins them"

_log = logging.getLogger("gpt_lightning")


class OthersAtWork(Exception):
    """Tells that nothing is left to do but what other processes are at."""


class _JoinedMeanwhile(Exception):
    """Tells that the parts were joined, and may be gone."""


class _Part(NamedTuple):
    number: int
    split: str
    stretches: tuple[Stretch, ...]
    n_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(stretch.source for stretch in self.stretches)


def parts_folder_of(folder: Path) -> Path:
    """Names the folder of the parts of which a cache is made; nobody needs it once the cache is there."""
    return folder.with_name(f"{folder.name}.parts")


def cut_in_parts(corpus: Corpus) -> list[_Part]:
    """Groups the files of each split, in order, and cuts large ones; every process finds the same groups."""
    parts: list[_Part] = []
    files_of = {"train": corpus.train_files, "val": corpus.val_files, "test": corpus.test_files}
    for split, files in files_of.items():
        limit = max(_LEAST_BYTES, sum(map(source_bytes, files)) // _MOST_PARTS)
        group, size = list[Stretch](), 0
        for stretch, n_bytes in _stretches(files, limit, corpus.document_separator):
            group.append(stretch)
            size += n_bytes
            if size >= limit or stretch.within is not None:
                parts.append(_Part(len(parts), split, tuple(group), size))
                group, size = [], 0
        if group:
            parts.append(_Part(len(parts), split, tuple(group), size))
    return parts


def _stretches(
    files: tuple[str, ...], n_bytes: int, separator: str | None
) -> Iterator[tuple[Stretch, int]]:
    """Yields the files, of large ones what they are cut into, each with its size."""
    for file in files:
        size = source_bytes(file)
        if file == SOURCE_NAME or size < 2 * n_bytes:
            yield Stretch(file), size
        else:
            yield from cut_file(file, n_bytes, separator)


class SharedWork:
    """Makes the parts of one cache, `folder`, beside others that do the same."""

    def __init__(
        self, folder: Path, corpus: Corpus, tokenizer: TextTokenizer, *, drop_repeated: bool
    ) -> None:
        self._folder, self._corpus, self._tokenizer = folder, corpus, tokenizer
        self._drop_repeated = drop_repeated
        self._parts_folder = parts_folder_of(folder)
        self._cuts: dict[int, NDArray[np.int64]] = {}  # by a part's number, of each of its documents
        self._dropped: dict[int, Dropped] = {}
        self._build_number = build_number(folder)
        self._is_joining = False
        self._n_made = 0
        self.known: dict[str, dict[str, Any]] = {}  # of the sources' content, as the parts were made of it

    def do(self, *, waits: bool) -> None:
        """Returns when every part is made, or the cache is; without `waits` others' work is OthersAtWork."""
        if is_fresh(self._folder, self._corpus.sources):
            return
        try:
            self._decide()
            n_parts = len(self._parts)
            _log.info("with other processes: parts to tokenize: %d, in %s", n_parts, self._parts_folder)
            self._make_all("tokens", waits=waits)
        except _JoinedMeanwhile:
            pass
        except (OSError, UserError):  # as of a folder that was removed while this process wrote there
            if build_number(self._folder) == self._build_number:
                raise

    def join(self, folder: Path) -> dict[str, Any]:
        """Fills the folder of a cache from the parts, for `built_folder`."""
        self._is_joining = True
        self._decide()
        _log.info("parts to join: %d, made here: %d", len(self._parts), self._n_made)
        digests, built_parts = DocumentDigests(folder), list[dict[str, Any]]()

        def read() -> Iterator[EncodedText]:
            for part in self._parts:
                with self._opened("tokens", part) as (of_part, built):
                    digests.take(of_part)
                    built_parts.append(built)
                    for name, counts in built["splits"].items():
                        yield from _read_tokens(of_part, name, counts)

        counts = write_encoded(folder, read(), self._tokenizer.vocab_size)
        kept = {name: [of["samples"][name] for of in built_parts if name in of["samples"]] for name in counts}
        samples = {name: TextSample.joined(of_parts) for name, of_parts in kept.items()}
        n_empty = sum(built["empty_rows"] for built in built_parts)
        return {**with_notes(counts, digests, samples, self._tokenizer), "empty_rows": n_empty}

    @cached_property
    def _parts(self) -> list[_Part]:
        return cut_in_parts(self._corpus)

    @cached_property
    def _encoding(self) -> Encoding:
        return Encoding(self._tokenizer)

    # ---- one part after the other

    def _make_all(self, kind: str, *, waits: bool) -> None:
        """Makes what nobody is at, and then looks whether all is made."""
        for part in self._parts:
            with suppress(BeingBuilt), self._opened(kind, part, waits=False):
                pass
        # Without `waits` this ends at the first part that another process is at. It will look, too, after it
        # has made that: so whoever looks last finds all.
        for part in self._parts:
            try:
                with self._opened(kind, part, waits=waits) as (folder, _):
                    whole = {stretch.source for stretch in part.stretches if stretch.within is None}
                    self.known |= {name: of for name, of in sources_of(folder).items() if name in whole}
            except BeingBuilt:
                raise OthersAtWork(_AT_WORK.format(self._n_made, len(self._parts))) from None

    def _opened(
        self, kind: str, part: _Part, *, waits: bool = True
    ) -> AbstractContextManager[tuple[Path, dict[str, Any]]]:
        def build(folder: Path) -> dict[str, Any]:
            if not self._is_joining and build_number(self._folder) != self._build_number:
                raise _JoinedMeanwhile
            make = {"sizes": self._measure, "repeats": self._compare, "tokens": self._tokenize}[kind]
            built = make(part, folder)
            self._n_made += kind == "tokens"
            return built

        within = [stretch.within for stretch in part.stretches]
        settings = {"part": part.number, "within": within, "decided": self._decided(part)}
        where = str(self._parts_folder), kind, settings, part.files
        # A file that many read a part of is read as a whole by who joins them alone; here its time tells.
        cut = {source: unread(source) for source, within in part.stretches if within is not None}
        return built_folder(*where, build, known=self.known | cut, waits=waits, log_level=logging.DEBUG)

    def _read(self, part: _Part, advance: Callable[[int], None], on_empty: Callable[[], object]) -> Marked:
        pieces = self._corpus.read_stretches(part.stretches, advance, on_empty)
        if part.number in self._cuts:
            return split_pieces(pieces, self._cuts[part.number])
        return ((part.split, piece) for piece in pieces)

    def _tokenize(self, part: _Part, folder: Path) -> dict[str, Any]:
        empty_rows, dropped = count(), self._dropped.get(part.number, {})
        with self._reading("Tokenizing", part) as advance:
            read = self._read(part, advance, partial(next, empty_rows))
            written = write_text(folder, read, dropped, self._encoding.pieces, self._tokenizer.vocab_size)
        written.digests.keep()
        kept = {name: sample.keep() for name, sample in written.samples.items()}
        return {"splits": written.counts, "samples": kept, "empty_rows": next(empty_rows)}

    def _reading(self, title: str, part: _Part) -> AbstractContextManager[Callable[[int], None]]:
        return reading(f"{title}, part {part.number + 1} of {len(self._parts)}", part.n_bytes)

    # ---- what all parts together decide

    def _decide(self) -> None:
        """Settles, as in one process, which documents are held out, and which of these are dropped."""
        self._cuts, self._dropped = {}, {}
        if self._corpus.holds_out_by_size:
            self._make_all("sizes", waits=True)
            self._cuts = self._all_cuts()
        if self._drop_repeated:
            self._make_all("repeats", waits=True)
            self._dropped = self._all_dropped()

    def _decided(self, part: _Part) -> str:
        """Is equal where the same is held out and dropped of a part."""
        digest = hashlib.blake2b(self._cuts.get(part.number, np.zeros(0)).tobytes(), digest_size=16)
        for name, dropped in sorted(self._dropped.get(part.number, {}).items()):
            digest.update(name.encode() + dropped.tobytes())
        return digest.hexdigest()

    def _measure(self, part: _Part, folder: Path) -> dict[str, Any]:
        if part.split == "train":
            with self._reading("Measuring documents", part) as advance:
                sizes = document_sizes(self._corpus.read_stretches(part.stretches, advance))
            (folder / _SIZES).write_bytes(sizes.tobytes())
        return {}

    def _all_cuts(self) -> dict[int, NDArray[np.int64]]:
        sizes = []
        for part in (trained := [part for part in self._parts if part.split == "train"]):
            with self._opened("sizes", part) as (folder, _):
                sizes.append(np.fromfile(folder / _SIZES, dtype=np.int64))
        cuts = plan_split(np.concatenate(sizes), self._corpus.val_fraction, self._corpus.seed)
        places = np.cumsum([*map(len, sizes)])[:-1]
        return {part.number: own for part, own in zip(trained, np.split(cuts, places), strict=True)}

    def _compare(self, part: _Part, folder: Path) -> dict[str, Any]:
        digests = DocumentDigests(folder)
        with self._reading("Comparing documents", part) as advance:
            for _ in digests.noted(self._read(part, advance, lambda: None)):
                pass
        return digests.keep()

    def _all_dropped(self) -> dict[int, Dropped]:
        n_documents = {}
        with TemporaryDirectory(dir=self._parts_folder) as name:
            digests = DocumentDigests(Path(name))
            for part in self._parts:
                with self._opened("repeats", part) as (folder, built):
                    digests.take(folder)
                    n_documents[part.number] = built
            repeated = digests.repeated_to_drop()
        places: Counter[str] = Counter()
        dropped: dict[int, Dropped] = {}
        for number, built in n_documents.items():
            own = {name: repeated[name][places[name] :][:n] for name, n in built.items() if name in repeated}
            dropped[number] = own
            places.update(built)
        return dropped


def _read_tokens(folder: Path, name: str, counts: dict[str, Any]) -> Iterator[EncodedText]:
    """Reads the files of a split back, little at a time."""
    tokens = np.memmap(folder / f"{name}.tokens.bin", dtype=counts["dtype"], mode="r")
    ends = np.asarray(np.memmap(folder / f"{name}.documents.bin", dtype=np.uint64, mode="r"))[1:]
    n_bytes = counts["n_bytes"]
    for start in range(0, len(tokens), _JOINED_TOKENS):
        some = np.asarray(tokens[start : start + _JOINED_TOKENS])
        edges = np.array([start, start + len(some)], dtype=np.uint64)
        first, last = np.searchsorted(ends, edges, side="right")
        yield EncodedText(name, some, ends[first:last] - np.uint64(start), n_bytes)
        n_bytes = 0
