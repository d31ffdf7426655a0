"""Finds text that is both trained on and held out: what a model knows by heart says nothing of the rest."""

import filecmp
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
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

Marked = Iterable[tuple[str, Piece]]


def refuse_shared_files(files: dict[str, tuple[str, ...]]) -> None:
    """Refuses a file to hold out that is trained on, also under another name.

    Only files of equal size are read, as far as they are equal.
    """
    trained = defaultdict(list)
    for file in files["train_files"]:
        trained[_size(file)].append(file)
    for option in ("val_files", "test_files"):
        for file in files[option]:
            if file in files["train_files"]:
                raise UserError(f"data.{option}={file} is also in data.train_files; remove it from one")
            for other in trained[size] if (size := _size(file)) else ():
                if filecmp.cmp(file, other, shallow=False):
                    problem = f"data.{option}={file} has the same text as {other} of data.train_files"
                    raise UserError(f"{problem}; remove one of them")


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
                if split not in self._files:
                    self._files[split] = TemporaryFile(dir=self._folder)
                self._files[split].write(documents.pop(split).digest())
            yield split, piece

    def repeated(self) -> dict[str, NDArray[np.bool_]]:
        """Tells of each document of a held-out split whether it also occurs in the training text."""
        return {
            split: np.concatenate([self._are_trained_on(some) for some in self._parts(split)])
            for split in self._files
            if split != "train"
        }

    def n_repeated_in_train(self) -> int:
        """Counts the training documents that say just what another one before them says."""
        n_documents = sum(map(len, self._parts("train")))
        n_shares = 1 << (n_documents // _DOCUMENTS_AT_A_TIME).bit_length()
        return n_documents - sum(self._n_different("train", share, n_shares) for share in range(n_shares))

    def _n_different(self, split: str, share: int, n_shares: int) -> int:
        """Counts the digests of one share, so small that memory is the same for any number of documents."""
        found = np.empty(0, dtype=np.uint64)
        for part in self._parts(split):
            found = np.concatenate([found, part[part & np.uint64(n_shares - 1) == share]])
            if len(found) > _DOCUMENTS_AT_A_TIME:  # as where few documents are repeated often
                found = np.unique(found)
        return len(np.unique(found))

    def _are_trained_on(self, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = np.zeros(len(digests), dtype=np.bool_)
        for trained in self._parts("train"):
            found |= np.isin(digests, trained)
        return found

    def _parts(self, split: str) -> Iterator[NDArray[np.uint64]]:
        """Reads so few at a time that memory is the same for any number of documents."""
        if (file := self._files.get(split)) is not None:
            file.seek(0)
            while part := file.read(_DOCUMENTS_AT_A_TIME * _DIGEST_BYTES):
                yield np.frombuffer(part, dtype=np.uint64)


def without(marked: Marked, dropped: dict[str, NDArray[np.bool_]]) -> Iterator[tuple[str, Piece]]:
    """Leaves out the documents of each split that are marked to be dropped."""
    number: Counter[str] = Counter()
    for split, piece in marked:
        if split not in dropped or not dropped[split][number[split]]:
            yield split, piece
        number[split] += piece.ends_document
