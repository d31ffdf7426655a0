"""Event files are read as TensorBoard's own reader reads them, also where they end early or hold anything."""

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from gpt_lightning.report import events
from gpt_lightning.report.checksums import masked_checksums
from gpt_lightning.report.events import EVENTS, Events, Point

STEPS = [0, 1, 127, 128, 300, 2**31, 2**62]


def read(folder: Path) -> Events:
    found = Events()
    for path in sorted(folder.glob(EVENTS)):
        found.read(path)
    return found


def by_tensorboard(folder: Path) -> dict[str, list[Point]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [Point(e.step, e.value, e.wall_time) for e in accumulator.Scalars(tag)] for tag in tags}


def write(folder: Path) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for number, step in enumerate(STEPS):
            for tag in ("train/loss", "验证/x", "b" * 300):
                writer.add_scalar(tag, number / 3, step)
            writer.add_text("samples/0", f"    one\n    {number}", step)
            writer.add_histogram("weights", np.arange(3.0), step)
    return next(folder.glob(EVENTS))


def test_numbers_are_those_that_tensorboard_reads(tmp_path: Path) -> None:
    write(tmp_path)
    found = read(tmp_path).curves()
    assert found == by_tensorboard(tmp_path) and len(found) == 3
    assert [text.text for text in read(tmp_path).texts()["samples/0"]] == [f"one\n{n}" for n in range(7)]


def test_several_numbers_of_an_event_and_steps_below_zero_are_read(tmp_path: Path) -> None:
    writer = EventFileWriter(str(tmp_path))
    values = [Summary.Value(tag="a", simple_value=1.5), Summary.Value(tag="b", simple_value=2.5)]
    for step, part in ((-3, values), (4, values[:1]), (5, values[1:]), (6, values), (7, values[:1])):
        writer.add_event(Event(wall_time=100.0 + step, step=step, summary=Summary(value=part)))
    writer.close()
    found = read(tmp_path).curves()
    assert found == by_tensorboard(tmp_path)
    assert [point.step for point in found["a"]] == [-3, 4, 6, 7]


def test_a_run_that_went_on_has_lost_what_lay_beyond(tmp_path: Path) -> None:
    for number, steps in enumerate(((10, 20, 30), (20,))):
        options = {"purge_step": 15} if number else {}
        with SummaryWriter(str(tmp_path), filename_suffix=f".{number}", **options) as writer:
            for tag in ("a", "b") if not number else ("a",):
                for step in steps:
                    writer.add_scalar(tag, float(step + number), step)
    found = read(tmp_path).curves()
    assert found == by_tensorboard(tmp_path)
    assert [point[:2] for point in found["a"]] == [(10, 10.0), (20, 21.0)]
    assert [point[:2] for point in found["b"]] == [(10, 10.0)]


def test_a_file_that_ends_early_is_read_up_to_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    expected = read(tmp_path).curves()
    for size in (0, 5, 12, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for tag, points in read(tmp_path).curves().items():
            assert points == expected[tag][: len(points)]
    path.write_bytes(whole + bytes(100))  # as a file that was not written to its end after a crash
    assert read(tmp_path).curves() == expected


@pytest.mark.parametrize("at_once", [1, 1 << 23])
def test_a_record_with_another_bit_ends_what_is_read_as_for_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_once: int
) -> None:
    monkeypatch.setattr(events, "_BYTES_AT_ONCE", at_once)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(100):
            writer.add_scalar("train/loss", 1.5, step)
    path = next(tmp_path.glob(EVENTS))
    whole = path.read_bytes()
    assert len(read(tmp_path).curves()["train/loss"]) == 100 and not caplog.messages
    of_step_50 = whole.index(b"\x10\x32\x2a")
    for place in (of_step_50, of_step_50 + 1, len(whole) - 30, len(whole) - 5, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        caplog.clear()
        found = read(tmp_path).curves()
        assert found == by_tensorboard(tmp_path) and {point.value for point in found["train/loss"]} == {1.5}
        assert len(found["train/loss"]) < 100
        assert [line.partition(": ")[0] for line in caplog.messages] == [f"{path} is damaged"]


def test_checksums_are_those_of_the_standard_and_of_tensorboard() -> None:
    (found,) = masked_checksums([b"123456789"]).tolist()
    plain = (found - 0xA282EAD8) % 2**32
    assert (plain << 15 | plain >> 17) % 2**32 == 0xE3069283  # RFC 3720 and the catalogue of CRCs: CRC-32C
    draw = np.random.default_rng(0)
    records = [draw.bytes(length) for length in (1, 2, 3, 56, 57, 999) for _ in range(40)]
    records += [draw.bytes(length) for length in range(1, 30)]
    assert masked_checksums(records).tolist() == [masked_crc32c(record) for record in records]


@pytest.mark.parametrize("junk", [b"\xff" * 100, b"\x08" + bytes(11) + b"\xff" * 50, b"<html>" * 50])
def test_what_holds_no_events_gives_nothing(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(junk)
    found = read(tmp_path)
    assert found.curves() == {} and found.texts() == {}
