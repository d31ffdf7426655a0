"""Digests of blocks: any damage is found before a number that it hit is used."""

from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data import block_digests
from gpt_lightning.data.block_digests import CheckedFile, DigestedFile, is_damaged, write_digests
from gpt_lightning.exit_codes import UserError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", 64)


def write(path: Path, numbers: np.ndarray, part: int = 37) -> CheckedFile:
    file = DigestedFile(path)
    for first in range(0, len(numbers), part):
        file.write(numbers[first : first + part].data)
    file.close()
    return CheckedFile(path, np.asarray(np.memmap(path, numbers.dtype, "r")))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    with open(path, "r+b") as file:  # the same file, as on a disk that decays
        file.write(content)


@pytest.mark.parametrize("n_bytes", [0, 1, 63, 64, 65, 1000])
def test_digests_written_along_are_those_read_later(tmp_path: Path, n_bytes: int) -> None:
    content = np.arange(n_bytes, dtype=np.uint8)
    for part in (1, 64, 200):
        file = DigestedFile(tmp_path / "a")
        for first in range(0, n_bytes, part):
            file.write(content[first : first + part].data)
        file.write(content[:0].data)
        file.close()
        along = (tmp_path / "a.digests").read_bytes()
        write_digests(tmp_path / "a")
        assert (tmp_path / "a.digests").read_bytes() == along and len(along) == 8 * -(-n_bytes // 64)
        assert not is_damaged(tmp_path / "a")


def test_opening_finds_any_flipped_bit_of_a_small_file_and_of_the_ends_of_a_large_one(tmp_path: Path) -> None:
    path, n_bytes = tmp_path / "a", 64 * block_digests._OPENED_BLOCKS
    write(path, np.arange(n_bytes, dtype=np.uint8))
    for bit in range(5, n_bytes * 8, 501):
        flip(path, bit)
        assert is_damaged(path)
        flip(path, bit)
    write(path, np.arange(n_bytes * 50, dtype=np.uint8))
    assert not is_damaged(path)
    for bit in (3, n_bytes * 400 - 1):
        flip(path, bit)
        assert is_damaged(path)
        flip(path, bit)
    flip(tmp_path / "a.digests", 7)
    assert is_damaged(path)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 5, 33, 200])
def test_a_block_is_checked_before_its_first_reading(tmp_path: Path, dtype: type, length: int) -> None:
    path, n = tmp_path / "a", 1000
    draw = np.random.default_rng(0)
    for _ in range(60):
        checked = write(path, np.arange(n, dtype=dtype))
        starts = draw.integers(-1, n, size=3)
        # The ends are looked at when a file is opened.
        damaged = int(draw.integers(64 // np.dtype(dtype).itemsize, n - 64))
        flip(path, damaged * np.dtype(dtype).itemsize * 8 + 3)
        block = damaged * np.dtype(dtype).itemsize // 64
        numbers = {(start + i) % n for start in starts for i in range(length)}
        touched = {number * np.dtype(dtype).itemsize // 64 for number in numbers}
        if block in touched:
            with pytest.raises(UserError, match=r"data.cache_dir: .*a is not as it was written; remove"):
                checked.check(starts, length)
        else:
            checked.check(starts, length)


def test_a_search_is_never_misled(tmp_path: Path) -> None:
    """Each result equals that in the undamaged file, or the file is refused."""
    draw, refused = np.random.default_rng(1), 0
    for _ in range(300):
        sorted_numbers = np.unique(np.append(draw.integers(1, 4000, size=200), [0, 4000])).astype(np.uint64)
        checked = write(tmp_path / "a", sorted_numbers)
        numbers = np.memmap(tmp_path / "a", np.uint64, "r")
        flip(tmp_path / "a", 64 * 8 + int(draw.integers((len(sorted_numbers) - 16) * 64)))
        lows = draw.integers(0, 4000, size=2)
        highs = lows + int(draw.integers(1, 300))
        try:
            checked.check_sorted(lows, highs)
        except UserError:
            refused += 1
            continue
        for values, side in ((lows.astype(np.uint64), "right"), (highs.astype(np.uint64), "left")):
            found, expected = (each.searchsorted(values, side) for each in (numbers, sorted_numbers))
            assert (found == expected).all()
    assert 0 < refused < 300


def test_files_of_earlier_versions_are_taken_as_they_are(tmp_path: Path) -> None:
    content = np.arange(1000, dtype=np.uint16)
    content.tofile(tmp_path / "a")
    checked = CheckedFile(tmp_path / "a", content)
    checked.check(np.array([500]), 100)
