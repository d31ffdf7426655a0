"""Keeps beside a file the digest of each of its blocks, so that damage is found before what it hit is used.

That costs the same for a file of any size: opening looks at a fixed number of blocks, and any other block is
looked at when it is first read. A block is as large as what a system reads around a page anyway.
"""

import hashlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.exit_codes import UserError

BLOCK_BYTES = 1 << 16
SUFFIX = ".digests"
# The first, the last and some between, always the same, so that the ranks of a node read them once. A file of
# 8 MB or less is looked at as a whole.
_OPENED_BLOCKS = 128

_hash = partial(hashlib.blake2b, digest_size=8)


class DigestedFile:
    """Writes a file, and beside it the digests of its blocks as they fill."""

    def __init__(self, path: Path) -> None:
        self._file, self._digests = open(path, "wb"), open(_digests_of(path), "wb")
        self._block, self._missing = _hash(), BLOCK_BYTES

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        rest = data.cast("B") if data.nbytes else memoryview(b"")
        while rest:
            part, rest = rest[: self._missing], rest[self._missing :]
            self._block.update(part)
            self._missing -= len(part)
            if not self._missing:
                self._end_block()

    def _end_block(self) -> None:
        self._digests.write(self._block.digest())
        self._block, self._missing = _hash(), BLOCK_BYTES

    def close(self) -> None:
        if self._missing < BLOCK_BYTES:
            self._end_block()
        self._file.close()
        self._digests.close()


def write_digests(path: Path) -> None:
    """Reads a file that somebody else has written."""
    with open(path, "rb") as file, open(_digests_of(path), "wb") as digests:
        for block in iter(partial(file.read, BLOCK_BYTES), b""):
            digests.write(_hash(block).digest())


def is_damaged(path: Path) -> bool:
    """Looks at a fixed number of blocks of a file that has digests."""
    n_blocks = _n_blocks(path.stat().st_size)
    if _digests_of(path).stat().st_size != n_blocks * _hash().digest_size:
        return True
    looked_at = {n_blocks * index // _OPENED_BLOCKS for index in range(_OPENED_BLOCKS)} | {n_blocks - 1}
    with open(path, "rb") as file, open(_digests_of(path), "rb") as digests:
        for block in sorted(looked_at) if n_blocks else ():
            file.seek(block * BLOCK_BYTES)
            digests.seek(block * _hash().digest_size)
            if _hash(file.read(BLOCK_BYTES)).digest() != digests.read(_hash().digest_size):
                return True
    return False


class CheckedFile:
    """Checks the blocks of a mapped file of numbers when they are about to be read for the first time."""

    def __init__(self, path: Path, content: NDArray[Any]) -> None:
        self._path, self._content = path, content
        self._block_items = BLOCK_BYTES // content.itemsize
        self._is_checked = np.zeros(_n_blocks(content.nbytes), dtype=np.bool_)
        if (digests := _digests_of(path)).exists():
            self._digests = np.asarray(np.memmap(digests, np.uint64, "r"))
        else:  # an earlier version wrote the file
            self._is_checked[:] = True

    def check(self, starts: NDArray[np.int64], length: int) -> None:
        """Refuses a damaged file before so many numbers from each start on, around the end, are read."""
        # The last block, which a step across the end may leave out, was looked at when the file was opened.
        blocks = (starts[:, None] + _steps(length, self._block_items)) % len(self._content)
        blocks //= self._block_items
        if self._is_checked[blocks].all():
            return
        for block in np.unique(blocks[~self._is_checked[blocks]]).tolist():
            content = self._content[block * self._block_items : (block + 1) * self._block_items]
            if _hash(content.data).digest() != self._digests[block].tobytes():
                self._refuse()
            self._is_checked[block] = True

    def check_sorted(self, lows: NDArray[np.int64], highs: NDArray[np.int64]) -> None:
        """Refuses a damaged file before numbers from each low to below its high are searched in it."""
        content, low, high = self._content, lows.astype(np.uint64), highs.astype(np.uint64)
        last = len(content) - 1
        first = (content.searchsorted(low, side="right") - 1).clip(0, last - 1)
        end = content.searchsorted(high).clip(1, last)
        self.check(first, max(2, int((end - first).max()) + 1))
        self.check(end - 1, 2)
        # A search that met damage elsewhere shows it: what it found does not lie around what it looked for.
        is_found = (content[first] <= low) & (low < content[first + 1]) & (content[end - 1] < high)
        if not (is_found & ((high <= content[end]) | (end == last))).all():
            self._refuse()

    def _refuse(self) -> NoReturn:
        problem = f"data.cache_dir: {self._path} is not as it was written"
        raise UserError(f"{problem}; remove {self._path.parent}, and it is built anew")


@lru_cache(maxsize=64)
def _steps(length: int, block_items: int) -> NDArray[np.int64]:
    """Gives numbers from 0 to length - 1 of which at least one is in each block that a stretch reaches."""
    return np.arange(0, length + block_items - 1, block_items).clip(max=length - 1)


def _digests_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _n_blocks(n_bytes: int) -> int:
    return -(-n_bytes // BLOCK_BYTES)
