"""A checkpoint file is whole or not there, and no flipped bit in it changes what is read."""

import errno
import hashlib
import io
import multiprocessing
import os
import random
import resource
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpt_lightning.checkpoint.atomic as atomic
import gpt_lightning.checkpoint.files as checkpoint_file
from gpt_lightning.checkpoint.files import CheckpointWriteError, verify, write

fork = multiprocessing.get_context("fork")


def contents() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(30, generator=generator) for name in "ab"}
    return {"state_dict": weights, "global_step": 3}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "some.ckpt"
    write(contents(), path)
    return path


def refused(content: bytes, folder: Path) -> bool:
    path = folder / "changed.ckpt"
    path.write_bytes(content)
    try:
        verify(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


def test_it_is_what_torch_save_writes(written: Path) -> None:
    plain = io.BytesIO()
    torch.save(contents(), plain)
    content = written.read_bytes()
    # Apart from the id that torch derives from the contents.
    assert len(content) == len(plain.getvalue()) and content[-20:] == plain.getvalue()[-20:]


@pytest.mark.parametrize("mmap", [False, True])
def test_anybody_can_open_it(mmap: bool, written: Path) -> None:
    verify(written)
    loaded = torch.load(written, weights_only=True, mmap=mmap)
    torch.testing.assert_close(loaded, contents(), rtol=0, atol=0)
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None and not archive.comment


def with_digest(content: bytes) -> bytes:
    """As files were formerly written: with the SHA-256 of all that stands before it as the zip's comment."""
    content = content[:-2] + (71).to_bytes(2, "little")
    return content + f"sha256:{hashlib.sha256(content).hexdigest()}".encode()


@pytest.mark.parametrize("form", [bytes, with_digest])
def test_no_flipped_bit_changes_what_is_read(
    form: Callable[[bytes], bytes], written: Path, tmp_path: Path
) -> None:
    """It is refused, or fails to load, or lies where nothing is kept: in padding, a date, an old comment."""
    expected, path = contents(), tmp_path / "changed.ckpt"
    content, draw = bytearray(form(written.read_bytes())), random.Random(0)
    for position in range(0, len(content), 4):
        bit = 1 << draw.randrange(8)
        content[position] ^= bit
        if not refused(bytes(content), tmp_path):
            try:
                found = torch.load(path, weights_only=True)
            except Exception:
                found = expected
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        content[position] ^= bit


@pytest.mark.parametrize("form", [bytes, with_digest])
def test_every_flipped_bit_of_the_numbers_is_noticed(
    form: Callable[[bytes], bytes], written: Path, tmp_path: Path
) -> None:
    content = bytearray(form(written.read_bytes()))
    for weights in contents()["state_dict"].values():
        start = content.index(bytes(weights.numpy()))
        for position in range(start, start + weights.nbytes):
            content[position] ^= 1 << position % 8
            assert refused(bytes(content), tmp_path)
            content[position] ^= 1 << position % 8


@pytest.mark.parametrize("form", [bytes, with_digest])
def test_every_cut_is_noticed(form: Callable[[bytes], bytes], written: Path, tmp_path: Path) -> None:
    content = form(written.read_bytes())
    assert not refused(content, tmp_path)
    for length in {*range(0, len(content), 97), *range(len(content) - 100, len(content))}:
        assert refused(content[:length], tmp_path), f"{length} of {len(content)} bytes"
    assert refused(content + b"\0", tmp_path)
    assert refused(b"a text", tmp_path)


def test_a_file_is_read_once_and_again_after_a_change(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    check = checkpoint_file._check_records
    monkeypatch.setattr(checkpoint_file, "_check_records", lambda file: read.append(1) or check(file))
    now = written.stat().st_ctime
    monkeypatch.setattr(checkpoint_file.time, "time", lambda: now + 1)
    verify(written), verify(written)
    assert len(read) == 2  # it might have changed within one tick of the clock
    monkeypatch.setattr(checkpoint_file.time, "time", lambda: now + 60)
    verify(written), verify(written)
    assert len(read) == 3
    content = bytearray(written.read_bytes())
    content[content.index(bytes(contents()["state_dict"]["b"].numpy()))] ^= 1
    stat = written.stat()
    written.write_bytes(content)
    os.utime(written, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="checksum of its record .*data/1 is wrong"):
        verify(written)


def fail_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the write of that number, and the ones after it."""
    writes = []

    def write(data: bytes, original: Any) -> None:
        writes.append(len(data))
        if len(writes) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(data)

    class FullDisk(checkpoint_file._Stream):
        def __init__(self, file: Any) -> None:
            super().__init__(SimpleNamespace(write=partial(write, original=file.write)))

    monkeypatch.setattr(checkpoint_file, "_Stream", FullDisk)


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    count: int, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written.read_bytes()
    fail_after(count, monkeypatch)
    with pytest.raises(CheckpointWriteError) as error:
        write({**contents(), "more": torch.ones(500_000)}, written)
    message = str(error.value)
    assert message.startswith(f"{written} cannot be written (No space left on device): it needs 2.00 MB and ")
    assert "are free; the former file is as it was; make room" in message and "\n" not in message
    assert written.read_bytes() == before and list(written.parent.iterdir()) == [written]


def write_under_a_limit(checkpoint: Any, path: Path, limit: int, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(checkpoint, path)
        pipe.send("written")
    except CheckpointWriteError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("limit", [0, 1000, 1_999_000])
def test_a_limit_on_file_sizes_is_told_in_one_line(limit: int, written: Path) -> None:
    before, large = written.read_bytes(), {"more": torch.ones(500_000)}
    here, there = fork.Pipe()
    process = fork.Process(target=write_under_a_limit, args=(large, written, limit, there))
    process.start()
    message = here.recv()
    process.join()
    assert message.startswith(f"{written} cannot be written (File too large): it needs 2.00 MB")
    assert message.endswith("raise the limit on file sizes (ulimit -f)")
    assert written.read_bytes() == before and list(written.parent.iterdir()) == [written]


def test_a_folder_that_cannot_be_is_told_in_one_line(written: Path) -> None:
    with pytest.raises(CheckpointWriteError, match="last.ckpt cannot be written .File exists.*some.ckpt"):
        write(contents(), written / "last.ckpt")


def test_a_folder_that_cannot_be_synced_does_not_bring_back_the_former_file(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "sync", failing)
    with pytest.raises(CheckpointWriteError) as error:
        write({"global_step": 4}, written)
    expected = f"{written} is written, but may not outlive a power failure (Input/output error); choose"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert torch.load(written, weights_only=True) == {"global_step": 4}


def test_contents_that_nobody_could_read_are_an_error_of_their_own(written: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        write({"hook": lambda: None}, written)
    verify(written)
    assert list(written.parent.iterdir()) == [written]


def test_the_folder_of_temporary_files_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    write(contents(), tmp_path / "some.ckpt")
    verify(tmp_path / "some.ckpt")


def test_a_sharded_checkpoint_is_removed_if_nothing_else_is_in_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ours.ckpt", "mixed.ckpt"):
        (tmp_path / name).mkdir()
        for file in ("rest.pt", ".metadata", "__0_0.distcp"):
            (tmp_path / name / file).touch()
    (tmp_path / "mixed.ckpt" / "thesis.txt").touch()
    for name in ("ours.ckpt", "mixed.ckpt"):
        checkpoint_file.remove_checkpoint(tmp_path / name, [tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.ckpt"]
    assert len(list((tmp_path / "mixed.ckpt").iterdir())) == 4 and "mixed.ckpt is not removed" in caplog.text
