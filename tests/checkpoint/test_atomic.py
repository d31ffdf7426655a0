"""A file or folder has its name when all of it is on the disk, or what had the name before stays."""

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

import gpt_lightning.checkpoint.atomic as atomic
from gpt_lightning.checkpoint.atomic import release, take_lock, tidy, written_file, written_folder

fork = multiprocessing.get_context("fork")


def fill(path: Path, text: str) -> None:
    """A file, or a folder that holds one."""
    if path.suffix == ".ckpt":
        with written_file(path) as file:
            file.write(text.encode())
    else:
        with written_folder(path) as folder:
            (folder / text).touch()


def holds(path: Path) -> list[str]:
    return [path.read_text()] if path.is_file() else [file.name for file in path.iterdir()]


@pytest.mark.parametrize("name", ["x.ckpt", "folder"])
def test_it_is_whole_or_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    fill(path, "first")
    fill(path, "second")
    assert holds(path) == ["second"] and list(tmp_path.iterdir()) == [path]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fill(path, "third")
    assert holds(path) == ["second"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x.ckpt", "folder"])
def test_all_is_on_the_disk_before_it_has_the_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure a name stands for all of its bytes: they are synced first, and the name after."""
    path = tmp_path / name
    on_disk: dict[int, int] = {}  # bytes of a file, by its number, when it was synced last
    states: list[bool] = []  # whether all was on the disk, each time that something took a name
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        on_disk[status.st_ino] = status.st_size

    def note_name(source: Path, target: Path) -> None:
        contents = [source, *source.iterdir()] if source.is_dir() else [source]
        sizes = [file.stat().st_size for file in contents]
        states.append([on_disk.get(file.stat().st_ino) for file in contents] == sizes)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    monkeypatch.setattr(Path, "rename", note_name)
    fill(path, "some text")
    assert states == [True]
    assert tmp_path.stat().st_ino in on_disk


def test_a_folder_that_cannot_be_named_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "folder", "first")
    rename = Path.rename

    def refuse_new(source: Path, target: Path) -> Path:
        if source.name.endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "folder", "second")
    assert holds(tmp_path / "folder") == ["first"] and list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_what_a_crash_left_between_two_names_gets_its_name_back(tmp_path: Path) -> None:
    for name in (".lost.ckpt.old", ".kept.ckpt.old", "kept.ckpt"):
        (tmp_path / name).write_text(name)
    tidy(tmp_path)
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names["lost.ckpt"] == ".lost.ckpt.old" and names["kept.ckpt"] == "kept.ckpt"


def test_what_a_kill_left_of_a_folder_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "half").touch()
    fill(tmp_path / "folder", "whole")
    assert holds(tmp_path / "folder") == ["whole"] and list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_lock_is_had_once_and_leaves_nothing(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / ".lock")
    assert lock is not None and take_lock(tmp_path / ".lock") is None
    release(lock)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        take_lock(tmp_path / "nowhere" / ".lock")


def test_windows_opens_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*args: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        windows.setattr(os, "open", refusing)
        atomic.sync(tmp_path)


def die_in_a_save(path: Path) -> None:
    os.replace = lambda source, target: os._exit(9)  # type: ignore[assignment]
    with atomic.written_file(path) as file:
        file.write(b"new")


def test_what_a_killed_save_left_is_swept(tmp_path: Path) -> None:
    written = tmp_path / "some.ckpt"
    fill(written, "old")
    process = fork.Process(target=die_in_a_save, args=(written,))
    process.start()
    process.join()
    (left,) = {*tmp_path.iterdir()} - {written}
    assert holds(written) == ["old"] and left.exists()
    tidy(tmp_path)
    assert list(tmp_path.iterdir()) == [written]


def test_what_strangers_have_in_the_folder_is_not_swept(tmp_path: Path) -> None:
    names = [
        *(".notes.tmp", ".draft.0123abcd.tmp", "last.ckpt.0123abcd.tmp", ".last.ckpt.0123abcd.tmp.gz"),
        *("sub/.last.ckpt.0123abcd.tmp", ".cache.tmp/file", "sub/.last.ckpt.tmp/file"),
    ]
    ours = [
        *(".last.ckpt.0123abcd.tmp", ".probe.0123abcd.tmp", ".config.yaml.0123abcd.tmp"),
        ".last.ckpt.tmp/__0_0.distcp",
    ]
    for name in (*names, *ours):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".linked.ckpt.tmp").symlink_to(tmp_path / "sub")
    tidy(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*names}
    assert (tmp_path / ".linked.ckpt.tmp").is_symlink()
