"""Finds text that is both trained on and held out: what a model knows by heart says nothing of the rest."""

import filecmp
import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.documents import Piece
from gpt_lightning.data.python_docs import SOURCE_NAME
from gpt_lightning.exit_codes import UserError

_DIGEST_BYTES = 8
_DOCUMENTS_AT_A_TIME = 1 << 20
_KEPT = ".repeats.bin"

Marked = Iterable[tuple[str, Piece]]
Dropped = dict[str, NDArray[np.bool_]]  # of each split that is held out, its documents


def refuse_shared_files(
    files: dict[str, tuple[str, ...]], label: Callable[[str], str] = "data.{}".format
) -> None:
    """Refuses a file to hold out that is trained on, also under another name."""
    trained = files["train_files"]
    for option in ("val_files", "test_files"):
        for file, other in _same_files(files[option], trained):
            if file == other:
                problem = f"{label(option)}={file} is also in {label('train_files')}"
                raise UserError(f"{problem}; remove it from one")
            problem = f"{label(option)}={file} has the same text as {other} of {label('train_files')}"
            raise UserError(f"{problem}; remove one of them")


def refuse_shared_sources(files: dict[str, tuple[str, ...]]) -> None:
    """Refuses a file in two sources of a mixture: what the one holds out could be trained on in the other."""
    names = list(files)
    for number, name in enumerate(names):
        others = [file for other in names[:number] for file in files[other]]
        for file, same in _same_files(files[name], others):
            other = next(each for each in names if same in files[each])
            problem = f"data.mixture: {file} of {name} is the same text as {same} of {other}"
            raise UserError(f"{problem}, which could hold out what is trained on here; leave out one of them")


def _same_files(files: Iterable[str], others: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields files with those of the others that have the same text, be it under another name.

    Only files of equal size are read, as far as they are equal.
    """
    by_size = defaultdict(list)
    for other in others:
        by_size[_size(other)].append(other)
    for file in files:
        size = _size(file)
        if file in by_size[size]:
            yield file, file
        for other in by_size[size] if size else ():
            if filecmp.cmp(file, other, shallow=False):
                yield file, other


def _size(file: str) -> int:
    return 0 if file == SOURCE_NAME else os.path.getsize(file)


class DocumentDigests:
    """Notes on disk, in a folder, what each document of each split says in 8 bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}

    def noted(self, marked: Marked) -> Iterator[tuple[str, Piece]]:
        """Passes pieces on."""
        documents: defaultdict[str, Any] = defaultdict(lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
        for split, piece in marked:
            documents[split].update(piece.text.encode("utf-8"))
            if piece.ends_document:
                self._file(split).write(documents.pop(split).digest())
            yield split, piece

    def keep(self) -> dict[str, int]:
        """Leaves what was noted in the folder, for `take`, and counts the documents of each split."""
        n_documents = {}
        for split, file in self._files.items():
            n_documents[split] = file.tell() // _DIGEST_BYTES
            file.seek(0)
            with open(self._folder / f"{split}{_KEPT}", "wb") as kept:
                shutil.copyfileobj(file, kept)
        return n_documents

    def take(self, folder: Path) -> None:
        """Adds what was kept in another folder, of documents that come after those noted so far."""
        for kept in sorted(folder.glob(f"*{_KEPT}")):
            with open(kept, "rb") as more:
                shutil.copyfileobj(more, self._file(kept.name.removesuffix(_KEPT)))

    def _file(self, split: str) -> BinaryIO:
        if split not in self._files:
            self._files[split] = TemporaryFile(dir=self._folder)
        return self._files[split]

    def repeated(self) -> Dropped:
        """Tells of each document of a held-out split whether it also occurs in the training text."""
        return {
            split: np.concatenate([self._are_trained_on(some) for some in self._parts(split)])
            for split in self._files
            if split != "train"
        }

    def repeated_to_drop(self) -> Dropped:
        """Refuses to leave nothing of a split that is held out."""
        repeated = self.repeated()
        for name, of_split in repeated.items():
            if of_split.all():
                problem = f"data.drop_repeated=true leaves nothing of {name}"
                n = len(of_split)
                its = "its 1 document is" if n == 1 else f"its {n:,} documents are all"
                raise UserError(f"{problem}: {its} in train; give other text")
        return repeated

    def n_repeated_in_train(self) -> int:
        """Counts the training documents that say just what another one before them says."""
        runs = self._sorted_runs("train")
        # Each share of all digests that there can be is counted alone, in about the memory that a run takes.
        edges = [(share << 64) // len(runs) for share in range(1, len(runs))]
        shares = zip(*(np.split(run, np.searchsorted(run, np.array(edges, dtype=np.uint64))) for run in runs))
        n_different = sum(len(_different(np.concatenate([*map(_different, share)]))) for share in shares)
        return sum(map(len, runs)) - n_different

    def _sorted_runs(self, split: str) -> list[NDArray[np.uint64]]:
        """Sorts on disk what `_parts` reads at a time, each part for itself."""
        if (file := self._files.get(split)) is None:
            return []
        for number, part in enumerate(self._parts(split)):
            file.seek(number * _DOCUMENTS_AT_A_TIME * _DIGEST_BYTES)
            file.write(np.sort(part).data)
        file.flush()
        digests = np.memmap(file, dtype=np.uint64, mode="r")
        return np.split(digests, range(_DOCUMENTS_AT_A_TIME, len(digests), _DOCUMENTS_AT_A_TIME))

    def _are_trained_on(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = np.zeros(len(digests), dtype=np.bool_)
        for trained in map(np.sort, self._parts("train")):
            places = np.searchsorted(trained, digests)
            found |= trained[np.minimum(places, len(trained) - 1)] == digests
        return found

    def _parts(self, split: str) -> Iterator[NDArray[np.uint64]]:
        """Reads so few at a time that memory is the same for any number of documents."""
        if (file := self._files.get(split)) is not None:
            file.seek(0)
            while part := file.read(_DOCUMENTS_AT_A_TIME * _DIGEST_BYTES):
                yield np.frombuffer(part, dtype=np.uint64)


def _different(digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Leaves each out that is there already; np.unique takes a hundred times as long."""
    found = np.sort(digests)
    return found[np.diff(found, prepend=~found[:1]) != 0]


def without(marked: Marked, dropped: Dropped) -> Iterator[tuple[str, Piece]]:
    """Leaves out the documents of each split that are marked to be dropped."""
    number: Counter[str] = Counter()
    for split, piece in marked:
        if split not in dropped or not dropped[split][number[split]]:
            yield split, piece
        number[split] += piece.ends_document
