import errno
import os
from pathlib import Path

import pytest
import torch

from gpt_lightning.checkpoint import DurableCheckpointIO, newest_checkpoint, read_checkpoint


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    writer = DurableCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_files_are_as_readable_as_any(tmp_path: Path) -> None:
    DurableCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_newest_is_the_last_written(tmp_path: Path) -> None:
    for number, name in enumerate(("b/last.ckpt", "a/step000010.ckpt", "a/last.ckpt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({}, tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    assert newest_checkpoint(tmp_path) == tmp_path / "a" / "last.ckpt"
    os.utime(tmp_path / "b" / "last.ckpt", (9, 9))
    assert newest_checkpoint(tmp_path) == tmp_path / "b" / "last.ckpt"
    assert newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_unreadable_files_are_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert "torn.ckpt" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match="last.ckpt"):
        read_checkpoint(tmp_path / "lost.ckpt")


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"gpt_config": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="evil.ckpt"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "canary").exists()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by gpt_lightning"):
        read_checkpoint(tmp_path / "foreign.ckpt")
