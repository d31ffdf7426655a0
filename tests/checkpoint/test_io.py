"""Saves in the background: of their moment, one at a time, none lost, and nothing that is not finite."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpt_lightning.checkpoint.io as checkpoint_module
from gpt_lightning.checkpoint.files import CheckpointWriteError, NonFiniteCheckpointError, write
from gpt_lightning.checkpoint.io import DurableCheckpointIO, SaveOptions
from gpt_lightning.exit_codes import UserError

BACKGROUND = SaveOptions(background=True)


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


class SlowDisk:
    """Writes wait until they are let go, one permit each, and fail for the names in `broken`."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.broken: set[str] = set()
        self.started: list[str] = []

    def write(self, checkpoint: Any, path: Path) -> None:
        self.started.append(path.name)
        assert self.permits.acquire(timeout=30)
        if path.name in self.broken:
            raise CheckpointWriteError(f"{path} cannot be written")
        write(checkpoint, path)

    def let_go(self, count: int) -> None:
        self.permits.release(count)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(checkpoint_module, "write", disk.write)
    yield disk
    disk.let_go(100)


def training_state() -> tuple[dict[str, Any], nn.Linear, torch.optim.Optimizer]:
    """A layer whose weight is tied and half shown, its optimizer after one step, and a nested counter."""
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    train(layer, optimizer)
    weights = {**layer.state_dict(), "tied": layer.weight.detach(), "half": layer.weight.detach()[:, 1::2]}
    checkpoint = {"state_dict": weights, "optimizer_states": [optimizer.state_dict()]}
    return {**checkpoint, "loops": {"batches": [1]}}, layer, optimizer


def train(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    layer(torch.ones(2, 4)).pow(2).sum().backward()
    optimizer.step()


def test_a_file_in_the_background_is_of_the_moment_of_the_save(disk: SlowDisk, tmp_path: Path) -> None:
    checkpoint, layer, optimizer = training_state()
    write(checkpoint, tmp_path / "expected.ckpt")
    plugin = DurableCheckpointIO()
    options = SaveOptions(background=True, also=(tmp_path / "last.ckpt",))
    plugin.save_checkpoint(checkpoint, tmp_path / "best.ckpt", options)
    for _ in range(3):
        train(layer, optimizer)
    checkpoint["loops"]["batches"][0] = 7
    disk.let_go(2)
    plugin.finish()
    expected = loaded(tmp_path / "expected.ckpt")
    for name in ("best.ckpt", "last.ckpt"):
        torch.testing.assert_close(loaded(tmp_path / name), expected, rtol=0, atol=0)
    assert not torch.equal(layer.weight, expected["state_dict"]["weight"])  # else nothing was tested
    weights = loaded(tmp_path / "best.ckpt")["state_dict"]
    pointers = {name: tensor.untyped_storage().data_ptr() for name, tensor in weights.items()}
    assert pointers["weight"] == pointers["tied"] == pointers["half"] != pointers["bias"]
    assert (tmp_path / "best.ckpt").stat().st_size == (tmp_path / "expected.ckpt").stat().st_size


def test_a_second_snapshot_waits_for_the_first_to_be_written(disk: SlowDisk, tmp_path: Path) -> None:
    plugin, weights = DurableCheckpointIO(), {"w": torch.full((3,), 1.0)}
    plugin.save_checkpoint({"state_dict": weights}, tmp_path / "1.ckpt", BACKGROUND)
    weights["w"].fill_(2.0)
    arguments = ({"state_dict": weights}, tmp_path / "2.ckpt", BACKGROUND)
    second = threading.Thread(target=plugin.save_checkpoint, args=arguments)
    second.start()
    second.join(0.05)
    assert second.is_alive() and disk.started == ["1.ckpt"]
    disk.let_go(2)
    second.join(30)
    plugin.wait()
    written = [loaded(tmp_path / f"{number}.ckpt")["state_dict"]["w"].tolist() for number in (1, 2)]
    assert written == [[1.0] * 3, [2.0] * 3]


def test_snapshots_of_different_shapes_do_not_mix(tmp_path: Path) -> None:
    plugin = DurableCheckpointIO()
    for number, sizes in enumerate([(3, 5), (5, 3), (5,), (5, 3, 2)]):
        tensors = [torch.randn(size) for size in sizes]
        path = tmp_path / f"{number}.ckpt"
        plugin.save_checkpoint({"state_dict": {}, "tensors": tensors}, path, BACKGROUND)
        plugin.wait()
        torch.testing.assert_close(loaded(path)["tensors"], tensors, rtol=0, atol=0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["the same", "others each time"])
def test_memory_holds_one_snapshot_however_fast_saves_come(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, most, next_one = 100_000_000, 0, threading.Event()

    def measure() -> None:
        nonlocal most
        most = max(most, resident_bytes())

    def slow(checkpoint: Any, path: Path) -> None:
        """Until the next save has had time to take its snapshot, if it does not wait."""
        next_one.wait(30)
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            measure()

    copy = checkpoint_module._copy_memory
    monkeypatch.setattr(checkpoint_module, "_copy_memory", lambda *pair: (copy(*pair), measure()))
    monkeypatch.setattr(checkpoint_module, "write", slow)
    monkeypatch.setattr(checkpoint_module, "check_finite", lambda checkpoint: None)
    # By NumPy: threads of PyTorch's would not survive the fork of later tests.
    plugin, weights = DurableCheckpointIO(), np.ones(size // 4, dtype=np.float32)
    before = resident_bytes()
    for number in range(10):
        # Parts above 32 MiB, which the allocator gives back to the system at once.
        cut = 9_000_000 + (300_000 * number if shapes == "others each time" else 0)
        parts = {str(part.size): torch.from_numpy(part.copy()) for part in np.split(weights, [cut])}
        next_one.set()
        plugin.save_checkpoint({"state_dict": parts}, tmp_path / "last.ckpt", BACKGROUND)
        next_one.clear()
        del parts
    next_one.set()
    plugin.teardown()
    assert 0.9 < (most - before) / size < 2.2  # with the parts themselves


def test_a_failure_in_the_background_is_raised_once_and_the_old_files_stay(
    disk: SlowDisk, tmp_path: Path
) -> None:
    for name in ("last.ckpt", "old.ckpt"):
        write({"step": 1}, tmp_path / name)
    plugin = DurableCheckpointIO()
    disk.broken = {"last.ckpt"}
    options = SaveOptions(background=True, also=(tmp_path / "last.ckpt",), remove=(tmp_path / "old.ckpt",))
    plugin.save_checkpoint({"step": 2}, tmp_path / "best.ckpt", options)
    assert plugin.writing is not None and not plugin.writing.done()  # it has not failed yet
    disk.let_go(2)
    plugin.wait()
    assert plugin.writing.done()
    with pytest.raises(CheckpointWriteError, match="last.ckpt cannot be written"):
        plugin.finish()
    plugin.finish()
    steps = {path.name: loaded(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"best.ckpt": 2, "last.ckpt": 1, "old.ckpt": 1}


@pytest.mark.parametrize("when", ["the next save", "the end"])
def test_a_failure_is_not_lost(when: str, disk: SlowDisk, tmp_path: Path) -> None:
    plugin = DurableCheckpointIO()
    disk.broken = {"last.ckpt"}
    plugin.save_checkpoint({"step": 2}, tmp_path / "last.ckpt", BACKGROUND)
    disk.let_go(9)
    with pytest.raises(CheckpointWriteError):
        if when == "the end":
            plugin.teardown()
        else:
            plugin.save_checkpoint({"step": 3}, tmp_path / "next.ckpt")


def test_what_is_replaced_is_removed_last(disk: SlowDisk, tmp_path: Path) -> None:
    write({"step": 1}, tmp_path / "old.ckpt")
    options = SaveOptions(True, also=(tmp_path / "last.ckpt",), remove=(tmp_path / "old.ckpt",))
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint({"step": 2}, tmp_path / "best.ckpt", options)
    disk.let_go(1)
    while disk.started != ["best.ckpt", "last.ckpt"]:
        pass
    assert (tmp_path / "old.ckpt").exists()
    disk.let_go(1)
    plugin.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


POISONED: list[tuple[Tensor, str | None]] = [
    (torch.tensor([1.0, float("nan")]), "w"),
    (torch.tensor([1.0, float("inf"), float("-inf")]), "w"),
    (torch.tensor([1.0, float("-inf")], dtype=torch.bfloat16), "w"),
    (torch.full((1000,), 60000.0, dtype=torch.float16), None),  # their sum is no float16
    (torch.full((9,), 3e38), None),
    (torch.tensor([2**62, 2**62]), None),
    (torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn), "w"),
]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
@pytest.mark.parametrize("tensor, name", POISONED)
def test_only_finite_numbers_are_written(
    tensor: Tensor, name: str | None, part: str, background: bool, tmp_path: Path
) -> None:
    write({"step": 1}, tmp_path / "last.ckpt")
    checkpoint = {"state_dict": {"a": torch.ones(2)}, "optimizer_states": [{"state": {0: {}}}]}
    place: Any = checkpoint[part] if part == "state_dict" else checkpoint[part][0]["state"][0]  # type: ignore
    place["w"] = tensor
    plugin = DurableCheckpointIO()
    options = SaveOptions(background, remove=(tmp_path / "last.ckpt",))
    if name is None:
        plugin.save_checkpoint(checkpoint, tmp_path / "next.ckpt", options)
        plugin.teardown()
        assert [path.name for path in tmp_path.iterdir()] == ["next.ckpt"]
        return
    with pytest.raises(NonFiniteCheckpointError, match=f"{part}.*{name} holds NaN or infinity"):
        plugin.save_checkpoint(checkpoint, tmp_path / "next.ckpt", options)
        plugin.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "value, problem",
    [
        (Path("a"), "as callbacks.Own.best.0 what asks for 'pathlib.PosixPath', which is no plain value"),
        (np.float64(1), "as callbacks.Own.best.0 what asks for 'numpy.*scalar'"),
        (threading.Lock(), "as callbacks.Own.best.0 a lock, which is no plain value"),
        (lambda: 0, "as callbacks.Own.best.0 a function, "),
        (torch.zeros(2).to_sparse(), "a sparse tensor as callbacks.Own.best.0"),
    ],
)
def test_what_no_reader_would_take_is_not_written(tmp_path: Path, value: Any, problem: str) -> None:
    checkpoint = {"state_dict": {"w": torch.ones(2)}, "callbacks": {"Own": {"best": [value, {1, 2}]}}}
    plugin = DurableCheckpointIO()
    with pytest.raises(UserError, match=f"^no checkpoint is saved, .*: it holds {problem}.*; keep numbers"):
        plugin.save_checkpoint(checkpoint, tmp_path / "a.ckpt", BACKGROUND)
    assert not list(tmp_path.iterdir())
    checkpoint["callbacks"]["Own"] = {"best": [0.5, {1, 2}, torch.float32, nn.Parameter(torch.ones(2))]}
    plugin.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    plugin.load_checkpoint(tmp_path / "a.ckpt")


def test_files_are_as_readable_as_any(tmp_path: Path) -> None:
    DurableCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    (tmp_path / "plain").touch()
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_plugin_reads_what_is_being_written(disk: SlowDisk, tmp_path: Path) -> None:
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint({"step": 4}, tmp_path / "last.ckpt", BACKGROUND)
    disk.let_go(1)
    assert plugin.load_checkpoint(tmp_path / "last.ckpt")["step"] == 4
    plugin.save_checkpoint({"step": 5}, tmp_path / "last.ckpt", BACKGROUND)
    disk.let_go(1)
    plugin.remove_checkpoint(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_where_no_thread_can_be_started_the_file_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer = DurableCheckpointIO()
    writer.save_checkpoint({"step": 1}, tmp_path / "last.ckpt", BACKGROUND)
    assert writer.writing is None and loaded(tmp_path / "last.ckpt") == {"step": 1}
