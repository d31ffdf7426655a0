"""A sharded checkpoint's table of contents builds values alone, and is held to what lies in its folder."""

import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.files import write
from gpt_lightning.exit_codes import UserError

OLD = Path(__file__).parents[1] / "old_files" / "folder.ckpt"
QKV = "state_dict/model.blocks.0.attn.qkv_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, of which nobody has noted the digests."""
    shutil.copytree(OLD, tmp_path / "evil.ckpt")
    change_rest(tmp_path / "evil.ckpt", lambda rest: rest.pop("digests"))
    return tmp_path / "evil.ckpt"


def change_rest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rest = torch.load(folder / "rest.pt", weights_only=True)
    change(rest)
    write(rest, folder / "rest.pt")


def complaint(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        Checkpoint.open(folder).whole()
    assert "\n" not in str(error.value) and str(error.value).startswith(f"ckpt_path={folder} ")
    return str(error.value)


def test_an_honest_one_opens(folder: Path) -> None:
    weights = Checkpoint.open(folder).whole().weights
    assert torch.equal(weights["lm_head.weight"], weights["token_embedding.weight"])


def test_one_of_a_class_that_is_not_known_opens(folder: Path) -> None:
    """What its optimizer holds of each parameter is its own business."""
    change_rest(folder, lambda rest: rest.update(module_class="somebody.Module"))
    whole = Checkpoint.open(folder).whole().contents
    assert {"exp_avg", "exp_avg_sq", "step"} == whole["optimizer_states"][0]["state"][3].keys()


@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "Path"])
def test_a_table_changes_no_class(name: str, folder: Path) -> None:
    def word(text: str) -> bytes:
        return b"\x8c" + bytes([len(text)]) + text.encode()

    evil = word("pathlib") + word(name) + b"\x93}" + word("evil") + b"K\x01sb."
    (folder / ".metadata").write_bytes(b"\x80\x04" + evil)
    complaint(folder)
    assert not hasattr(getattr(pathlib, name), "evil")
    metadata = "torch.distributed.checkpoint.metadata"
    evil = word(metadata) + word("Metadata") + b"\x93N}" + word("evil") + b"K\x01s\x86b."
    (folder / ".metadata").write_bytes(b"\x80\x04" + evil)
    complaint(folder)
    assert not hasattr(Metadata, "evil")


def test_a_table_builds_nothing_else(folder: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder / "canary"),)

    for protocol in (2, 4):
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(), protocol))
        complaint(folder)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"(" * 20_000_000, b")" + b"\x85" * 10**6])
def test_an_endless_table_is_refused(content: bytes, folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x04" + content + b".")
    complaint(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_pipe_in_it_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in complaint(folder)


def rename(table: Metadata, former: str, name: str) -> None:
    table.state_dict_metadata[name] = table.state_dict_metadata.pop(former)
    table.storage_data = {
        replace(index, fqn=name) if index.fqn == former else index: place
        for index, place in table.storage_data.items()
    }


def place(table: Metadata, **changes: Any) -> None:
    index = next(index for index in table.storage_data if index.fqn == QKV)
    table.storage_data[index] = replace(table.storage_data[index], **changes)


def size(table: Metadata, *sizes: int) -> None:
    table.state_dict_metadata[QKV] = replace(table.state_dict_metadata[QKV], size=torch.Size(sizes))


def chunk(table: Metadata, **changes: Any) -> None:
    chunks = table.state_dict_metadata[QKV].chunks
    chunks[0] = replace(chunks[0], **{name: torch.Size(value) for name, value in changes.items()})


def twice(table: Metadata) -> None:
    first, second, *_ = table.storage_data
    table.storage_data[second] = table.storage_data[first]


CHANGES: dict[str, Callable[[Metadata], object]] = {
    "a file elsewhere": lambda table: place(table, relative_path="../../__0_0.distcp"),
    "an absolute file": lambda table: place(table, relative_path="/etc/passwd"),
    "another file": lambda table: place(table, relative_path="rest.pt"),
    "a lacking file": lambda table: place(table, relative_path="__7_0.distcp"),
    "beyond the end": lambda table: place(table, offset=10**9),
    "below 0": lambda table: place(table, offset=-5),
    "too short": lambda table: place(table, length=10),
    "too long": lambda table: place(table, length=2**62),
    "no number": lambda table: place(table, length="x"),
    "twice the same": twice,
    "35 TB": lambda table: size(table, 3_000_000, 3_000_000),
    "another size": lambda table: size(table, 48, 8),
    "size below 0": lambda table: size(table, -48, -16),
    "a part too large": lambda table: chunk(table, sizes=(48, 16)),
    "a part outside": lambda table: chunk(table, offsets=(100, 0)),
    "a part of other dimensions": lambda table: chunk(table, sizes=(384,), offsets=(0,)),
    "no part": lambda table: table.state_dict_metadata[QKV].chunks.clear(),
    "another name": lambda table: rename(table, QKV, "state_dict/model.blocks.0.x"),
    "a name of nothing": lambda table: rename(table, QKV, "elsewhere/model.x"),
    "another moment": lambda table: rename(table, "optimizer_states/0/3/exp_avg", "optimizer_states/0/3/x"),
    "a moment of none": lambda table: rename(table, "optimizer_states/0/3/exp_avg", "optimizer_states/7/3/x"),
    "a lacking name": lambda table: table.state_dict_metadata.pop(QKV),
    "a lacking place": lambda table: table.storage_data.pop(MetadataIndex(QKV, torch.Size([0, 0]))),
    "a name of bytes": lambda table: rename(table, QKV, b"x"),  # type: ignore[arg-type]
    "no table": lambda table: vars(table).pop("storage_data"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_table_of_another_folder_is_refused(change: Callable[[Metadata], object], folder: Path) -> None:
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    complaint(folder)


def test_one_from_before_the_first_step_opens(folder: Path) -> None:
    """Its optimizer holds nothing yet of any parameter."""
    change_rest(folder, lambda rest: rest["optimizer_states"][0]["state"].clear())
    table = pickle.loads((folder / ".metadata").read_bytes())
    for name in [name for name in table.state_dict_metadata if name.startswith("optimizer_states/")]:
        del table.state_dict_metadata[name]
    table.storage_data = {
        index: place for index, place in table.storage_data.items() if index.fqn in table.state_dict_metadata
    }
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    assert Checkpoint.open(folder).whole().contents["optimizer_states"][0]["state"] == {}


@pytest.mark.parametrize(
    "key, value",
    [
        *(("digests", value) for value in (7, {"../../x": "0"}, {"/etc/passwd": "0"}, {".metadata": 7})),
        *(("tied_parameters", value) for value in (7, None, {"a": "b"}, {"model.lm_head.weight": 3})),
        ("tied_parameters", {"model.ln_f.weight": "model.blocks.0.ln_1.weight"}),
        ("tied_parameters", {3: "model.token_embedding.weight"}),
        *(("optimizer_states", value) for value in (7, [7], {})),
    ],
)
def test_names_beside_the_tensors_are_held_to_them(key: str, value: Any, folder: Path) -> None:
    change_rest(folder, lambda rest: rest.update({key: value}))
    complaint(folder)


def test_a_rest_that_is_no_dictionary_is_refused(folder: Path) -> None:
    write([1], folder / "rest.pt")
    assert "rest.pt is a list" in complaint(folder)
