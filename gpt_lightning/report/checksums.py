"""Computes the checksums in TensorBoard's event files (CRC-32C, masked), of many records at once."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL, _MASK = np.uint32(0x82F63B78), np.uint32(0xA282EAD8)
_FEW = 32  # records of one length, for which Python's own loop is faster


@cache
def _after(bits: int) -> NDArray[np.uint32]:
    """Lists what becomes of each remainder of so many bits when they have been shifted out."""
    remainders = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        halves = remainders >> np.uint32(1)
        remainders = np.where(remainders & 1, halves ^ _POLYNOMIAL, halves)
    return remainders


def masked_checksums(records: Sequence[bytes]) -> NDArray[np.uint32]:
    """Returns the checksum of each record; those of one length are taken together, two bytes at a time."""
    found = np.empty(len(records), dtype=np.uint32)
    of_length: defaultdict[int, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        of_length[len(record)].append(number)
    for length, numbers in of_length.items():
        some = [records[number] for number in numbers]
        found[numbers] = [*map(_one, some)] if len(some) < _FEW else _all_of_a_length(some, length)
    found = ~found
    return (found >> np.uint32(15) | found << np.uint32(17)) + _MASK


def _one(record: bytes) -> int:
    after_byte, remainder = _after(8).tolist(), 0xFFFFFFFF
    for byte in record:
        remainder = (remainder >> 8) ^ after_byte[(remainder ^ byte) & 0xFF]
    return remainder


def _all_of_a_length(records: Sequence[bytes], length: int) -> NDArray[np.uint32]:
    rows = np.frombuffer(b"".join(records), dtype=np.uint8).reshape(-1, length)
    remainders = np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, length - 1, 2):
        pair = rows[:, start] | rows[:, start + 1].astype(np.uint16) << 8
        remainders = (remainders >> 16) ^ _after(16)[(remainders ^ pair) & 0xFFFF]
    if length % 2:
        remainders = (remainders >> 8) ^ _after(8)[(remainders ^ rows[:, -1]) & 0xFF]
    return remainders
