"""Tells which tokens each batch holds: the sample order, as a pure function of (seed, position).

The training stream is circular: token t is predicted from the token before it, and token 0 from the last one,
an eos. Epoch e cuts the circle into windows at its own offset, so every token is a target exactly once an
epoch, and the windows are drawn without replacement by a keyed permutation that is computed, not stored.
A sample's position is one global counter; the epoch is position // n_windows.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

IGNORED_TARGET = -100

_ROUNDS = 8
_BLOCK = 4096

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOrder(ABC):
    """Deals windows by their positions to batches and optimizer steps, from position `start` on.

    A resumed run may deal otherwise.
    """

    seq_len: int
    global_batch: int = 1
    accumulate: int = 1
    start: int = 0

    @property
    @abstractmethod
    def windows(self) -> int:
        """Counts the windows of an epoch."""

    @abstractmethod
    def cut(self, positions: Ints) -> tuple[Ints, Ints]:
        """Returns the first target and the number of targets of each window; all are of one epoch."""

    @cached_property
    def epoch_batches(self) -> int:
        return self.n_batches(self.windows)

    @cached_property
    def first_batches(self) -> int:
        """Counts the batches of the epoch in which `start` lies, from there on."""
        return self.n_batches(self.windows - self.start % self.windows)

    def n_batches(self, windows: int) -> int:
        """Counts the batches for so many windows: what their optimizer steps need, of `accumulate` each.

        The last step's batches may be short or empty, so that no step mixes two epochs.
        """
        return -(-windows // (self.global_batch * self.accumulate)) * self.accumulate

    def span(self, batch: int) -> tuple[int, int]:
        """Gives first position, and the one after the last, of batch `batch` counted from `start`.

        A batch never crosses the end of an epoch.
        """
        epoch, within = divmod(self.start, self.windows)
        if batch >= self.first_batches:
            epochs, batch = divmod(batch - self.first_batches, self.epoch_batches)
            epoch, within = epoch + 1 + epochs, 0
        first, epoch_start = within + batch * self.global_batch, epoch * self.windows
        last = first + self.global_batch
        return epoch_start + min(self.windows, first), epoch_start + min(self.windows, last)

    @lru_cache(maxsize=4)  # each micro-batch of a step asks
    def n_targets(self, batches: range) -> int:
        """Counts the targets that all ranks score in these batches, which may reach into another epoch."""
        first, end = self.span(batches[0])[0], self.span(batches[-1])[1]
        begin_of_next = (first // self.windows + 1) * self.windows
        bounds = pairwise((first, *range(begin_of_next, end, self.windows), end))
        return sum(int(self.cut(np.arange(*bound))[1].sum()) for bound in bounds)


@dataclass(frozen=True, kw_only=True, eq=False)
class Epochs(SampleOrder):
    """Orders the windows of one text anew in each epoch; without a seed they come in reading order."""

    n_tokens: int
    seed: int | None = None

    @cached_property
    def windows(self) -> int:
        """Counts the windows of an epoch, the last of which may be short."""
        return -(-self.n_tokens // self.seq_len)

    @override
    def cut(self, positions: Ints) -> tuple[Ints, Ints]:
        epoch = int(positions[0]) // self.windows if len(positions) else 0
        index, offset = positions - epoch * self.windows, 0
        if self.seed is not None:
            index = _permuted(index, self.windows, keyed_hash(self.seed, epoch, "order"))
            offset = keyed_hash(self.seed, epoch, "offset") % self.n_tokens
        starts = index * self.seq_len
        return (starts + offset) % self.n_tokens, np.minimum(self.n_tokens - starts, self.seq_len)


def gather(
    texts: Sequence[NDArray[np.integer]], starts: Ints, lengths: Ints, *, rows: int, seq_len: int
) -> tuple[Ints, Ints]:
    """Reads inputs and targets [rows, seq_len], each window from its own of the `texts`.

    What no window fills has input 0 and an ignored target.
    """
    # [B, T + 1]; past a window's end it reads on around the circle, which the mask then hides.
    window = np.empty((len(starts), seq_len + 1), dtype=texts[0].dtype if texts else np.uint16)
    for row, tokens, start in zip(window, texts, starts.tolist(), strict=True):
        if 0 < start <= len(tokens) - seq_len:
            row[:] = tokens[start - 1 : start + seq_len]
        else:
            row[:] = tokens[np.arange(start - 1, start + seq_len) % len(tokens)]
    inputs, targets = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
    if len(starts) == rows and lengths.min() == seq_len:
        return inputs, targets
    empty = ((0, rows - len(starts)), (0, 0))
    filled = np.pad(np.arange(seq_len) < lengths[:, None], empty)  # [B, T]
    inputs, targets = np.pad(inputs, empty), np.pad(targets, empty)
    return np.where(filled, inputs, 0), np.where(filled, targets, IGNORED_TARGET)


def document_ids(
    document_starts: NDArray[np.uint64],
    starts: Ints,
    lengths: Ints,
    *,
    n_tokens: int,
    rows: int,
    seq_len: int,
) -> Ints:
    """Tells which document each input is in, counted from 0 within its window; padding has an id of its own.

    An input is in the document of its target, so the eos before a document is that document's first input.
    """
    changes = np.zeros((rows, seq_len), dtype=np.int64)
    # In the dtype of document_starts, else numpy would convert that, a whole memory map.
    begins = starts.astype(np.uint64)
    first = document_starts.searchsorted(begins, side="right")
    counts = document_starts.searchsorted(begins + np.uint64(seq_len)) - first
    rows_of = np.repeat(np.arange(len(starts)), counts)  # [all document starts within a window]
    within = np.arange(len(rows_of)) - np.repeat(counts.cumsum() - counts, counts)
    changes[rows_of, document_starts[first[rows_of] + within].astype(np.int64) - starts[rows_of]] = 1
    for index in (starts + seq_len > n_tokens).nonzero()[0].tolist():
        # What lies beyond the end is the beginning again, where the first document is marked already: the
        # last of document_starts is n_tokens.
        rest = n_tokens - int(starts[index])
        again = document_starts.searchsorted(np.uint64(seq_len - rest))
        changes[index, document_starts[1:again] + rest] = 1
    for index in (lengths < seq_len).nonzero()[0].tolist():
        changes[index, lengths[index] :] = 0
        changes[index, lengths[index]] = 1
    return np.cumsum(changes, axis=1)


def _permuted(index: Ints, size: int, key: int) -> Ints:
    """Permutes the indices of one batch, and their neighbours with them, of which the next batches are."""
    block = int(index[0]) // _BLOCK if len(index) else 0
    if not len(index) or int(index[-1]) // _BLOCK != block:
        return permute(index, size, key=key)
    return _permuted_block(block, size, key)[index - block * _BLOCK]


@lru_cache(maxsize=4)
def _permuted_block(block: int, size: int, key: int) -> Ints:
    return permute(np.arange(block * _BLOCK, min(size, (block + 1) * _BLOCK)), size, key=key)


def permute(index: Ints, size: int, *, key: int) -> Ints:
    """Permutes range(size) by a key, at `index`: in constant memory, and any index as fast as the first.

    A Feistel network permutes the next power of four; what falls outside is permuted until it is inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    permuted = _feistel(index.astype(np.uint64), half, key)
    while (outside := permuted >= np.uint64(size)).any():
        permuted[outside] = _feistel(permuted[outside], half, key)
    return permuted.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for round_number in range(_ROUNDS):
        round_key = np.uint64(keyed_hash(key, round_number, "round"))
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return left << shift | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Has every input bit reach every output bit: the finalizer of splitmix64."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


@lru_cache(maxsize=64)
def keyed_hash(first: int, second: int, purpose: str) -> int:
    """Gives 64 bits, the same in every process and on every machine."""
    digest = hashlib.blake2b(f"{purpose} {first} {second}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
