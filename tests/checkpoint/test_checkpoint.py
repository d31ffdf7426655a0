"""A checkpoint is opened once: what is wrong with it is told in one line, and nothing in it acts."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt_lightning.checkpoint
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.files import write
from gpt_lightning.checkpoint.io import DurableCheckpointIO


def test_load_model_is_had_from_the_package() -> None:
    assert gpt_lightning.checkpoint.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'loaded'"):
        gpt_lightning.checkpoint.loaded


def contents(step: int = 3, fill: float = 1.0) -> dict[str, Any]:
    return {"gpt_config": {}, "state_dict": {}, "global_step": step, "more": torch.full((9,), fill)}


def test_checkpoints_differ_by_their_digests(tmp_path: Path) -> None:
    """One number, anywhere in it, makes another; another name or a copy does not."""
    for name, options in {"a": {}, "copy": {}, "step": {"step": 4}, "tensor": {"fill": 1.0000001}}.items():
        write(contents(**options), tmp_path / f"{name}.ckpt")
    digests = {path.stem: Checkpoint(path, {}).digest for path in tmp_path.iterdir()}
    assert digests["a"] == digests["copy"] and len(set(digests.values())) == 3


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_unreadable_files_are_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Checkpoint.open(path)
    assert "torn.ckpt" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match="last.ckpt"):
        Checkpoint.open(tmp_path / "lost.ckpt")


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"gpt_config": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="evil.ckpt"):
        Checkpoint.open(tmp_path / "evil.ckpt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("foreign", [{}, {"state_dict": {}}])
def test_a_foreign_checkpoint_is_refused(foreign: dict[str, Any], tmp_path: Path) -> None:
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by gpt_lightning"):
        Checkpoint.open(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize("how", ["open", "plugin"])
def test_nothing_brings_back_code_in_checkpoints(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write({"gpt_config": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="evil.ckpt"):
        if how == "plugin":
            DurableCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
        else:
            Checkpoint.open(tmp_path / "evil.ckpt")
    assert not (tmp_path / "canary").exists()
