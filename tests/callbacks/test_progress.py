"""A terminal of any width shows whole numbers, a file has a line from time to time, and both begin alike."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt_lightning import __version__
from gpt_lightning.__main__ import main
from gpt_lightning.callbacks import progress_line
from gpt_lightning.callbacks.progress import StepProgressBar, _end
from gpt_lightning.callbacks.progress_line import Progress, ProgressLine, clock, parts_of, shortened
from gpt_lightning.exit_codes import UserError
from tests.log import TIME, since_start, untimed

Config = Callable[..., Path]
ROOT = Path(__file__).parents[2]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
BAR = "━╸╺"
NUMBERS = {
    "train/loss": 5.558,
    "val/loss": 5.612,
    "val/bpb": 2.5967,
    "lr-AdamW": 0.003,
    "lr-Muon": 0.02,
    "train/grad_norm": 0.8123,
    "throughput/mfu": 0.1234,
    "throughput/peak_memory_gib": 1.26,
}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time of day, under "now"."""
    now = {"now": 1000.0}
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: now["now"])
    return now


def shown(progress: Progress, remaining: float | None, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(ProgressLine(progress, remaining), end="")
    return ESCAPES.sub("", captured.get()).rstrip()


def at_step_60(seconds: dict[str, float]) -> Progress:
    progress = Progress("step", 2800, numbers=NUMBERS, rate=1536.0)
    seconds["now"] += 12
    progress.advance(60)
    return progress


@pytest.mark.parametrize(
    "width, line",
    [
        (30, "60/2,800  0:12 < 9:20"),
        (60, "60/2,800  0:12 < 9:20  loss 5.56  val 5.61  1.5k tok/s"),
        (80, "60/2,800  0:12 < 9:20  loss 5.56  val 5.61  1.5k tok/s  bpb 2.597"),
        (100, "60/2,800  0:12 < 9:20  loss 5.56  val 5.61  1.5k tok/s  bpb 2.597  lr 0.003  norm 0.81"),
        (
            160,
            "60/2,800  0:12 < 9:20  loss 5.56  val 5.61  1.5k tok/s  bpb 2.597  lr 0.003  norm 0.81  "
            "mfu 12.3%  1.3 GiB",
        ),
    ],
)
def test_a_line_has_what_fits(width: int, line: str, seconds: dict[str, float]) -> None:
    text = shown(at_step_60(seconds), 560, width)
    assert text.rstrip(BAR).rstrip() == line
    assert len(text) <= width
    room = width - len(line) - 2
    assert len(text) == (len(line) + 2 + min(40, room) if room >= 10 else len(line))


def test_no_part_is_cut_at_any_width(seconds: dict[str, float]) -> None:
    progress = Progress("step", 1_234_567, numbers=NUMBERS, rate=1_536_000, note="validating 1,234/5,678")
    seconds["now"] += 200_000
    progress.advance(1_000_000)
    whole = [text for text, _ in parts_of(progress, 46_000)]
    for width in range(20, 220):
        text = shown(progress, 46_000, width)
        parts = re.split(" {2,}", text.rstrip(BAR).rstrip())
        assert len(text) <= width and "\n" not in text
        assert parts == [part for part in whole if part.strip()][: len(parts)] or parts == [""]


def test_the_rest_is_reckoned_without_the_first_step(seconds: dict[str, float]) -> None:
    progress = Progress("step", 110, done=100)
    assert progress.remaining_seconds is None
    seconds["now"] += 60  # of a compiler
    progress.advance(101)
    assert progress.remaining_seconds is None
    seconds["now"] += 4
    progress.advance(103)
    assert progress.remaining_seconds == 14 and progress.elapsed_seconds == 64
    seconds["now"] += 5  # of a validation
    assert progress.remaining_seconds == 9
    progress.advance(110)
    assert progress.remaining_seconds == 0
    endless = Progress("step", float("inf"))
    for done in (1, 5):
        seconds["now"] += 1
        endless.advance(done)
    assert endless.remaining_seconds is None and endless.line(None) == "step 5  elapsed 0:02"
    assert shown(endless, 60, 80) == "5  0:02 < 1:00"


def test_numbers_are_short() -> None:
    rates = [0, 950.4, 999.6, 1536, 20_746, 99_949, 99_951, 123_456, 1_200_000]
    assert [*map(shortened, rates)] == "0 950 1.0k 1.5k 20.7k 99.9k 100k 123k 1.2M".split()
    times = [0, 12.9, 560, 3723, 86_399, 200_000]
    assert [*map(clock, times)] == ["0:00", "0:12", "9:20", "1:02:03", "23:59:59", "2d 7:33:20"]


def test_the_end_of_a_run_is_told_in_steps_and_epochs() -> None:
    ends = [_end(2000, 1.0), _end(2800, 51.3), _end(6, 0.0123), _end(20_000, 1234.4), _end(50, 3.55)]
    assert ends == [
        *("step 2,000 (1 epoch)", "step 2,800 (51 epochs)", "step 6 (0.012 epochs)"),
        *("step 20,000 (1,234 epochs)", "step 50 (3.5 epochs)"),
    ]
    assert _end(50, 50 / float("inf")) == "step 50"
    assert _end(float("inf"), float("inf")) == "the end of its time"


def test_intervals_below_zero_are_refused() -> None:
    with pytest.raises(UserError, match="progress.every_n_seconds=-1"):
        StepProgressBar(-1)


@pytest.mark.parametrize("option, is_written", [("0", True), ("1000", False), ("null", False)])
def test_a_file_has_a_line_every_so_many_seconds(
    option: str, is_written: bool, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", str(tiny_config()), "--progress.every_n_seconds", option])
    log = since_start(capsys.readouterr().err)
    lines = untimed(log).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("gpt_lightning"))
    folder = re.escape(str(tmp_path / "checkpoints" / "tiny"))
    devices = r"cpu with \d+ threads?, precision 32-true"
    assert re.fullmatch(rf"gpt_lightning {__version__}; run folder {folder}; {devices}", lines[at])
    model = r"model of [\d,]+ parameters; epoch of (\d+) batches; training to step 6 \((0\.\d+) epochs\)"
    assert (found := re.fullmatch(model, lines[at + 1])) is not None
    assert float(found[2]) == pytest.approx(6 / int(found[1]), rel=0.05)
    form = TIME + r"step \d/6(  loss \d\.\d\d)?(  val \d\.\d\d)?(  [\d.]+k? tok/s)?"
    written = [line for line in log.splitlines() if re.match(form + r"  elapsed 0:\d\d", line)]
    assert bool(written) is is_written
    if written:
        for step in range(1, 7):
            assert any(f"  step {step}/6  loss" in line for line in written)
        assert any("left 0:00" in line and "tok/s" in line for line in written)
        assert any("validating 1/" in line for line in written)
    assert [line.split(":")[0] for line in lines if "val/loss" in line] == ["step 3", "step 6"]


def run_in_terminal(words: list[str], width: int) -> tuple[int, str]:
    """The exit code, and what a terminal of this width was sent by the program in a process of its own."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm", "LINES": "24", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gpt_lightning", *words]
    process = subprocess.Popen(command, env=environment, stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    sent = b""
    while True:
        try:
            sent += (piece := os.read(terminal, 65536))
        except OSError:  # the other end is closed
            break
        if not piece:
            break
    os.close(terminal)
    return process.wait(), sent.decode()


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_shows_the_numbers_whole(width: int, tiny_config: Config, tmp_path: Path) -> None:
    trainer = {"max_steps": 120, "val_check_interval": 60}
    code, sent = run_in_terminal(["fit", "--config", str(tiny_config(trainer=trainer))], width)
    assert code == 0, sent
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", sent))]
    bars = [line for line in lines if re.match(r"[\d,]+/120  ", line)]
    assert bars and all(len(line) <= width for line in bars)
    assert re.match(r"120/120  \d:\d\d < 0:00  loss \d\.\d\d  val \d\.\d\d  [\d.]+k? tok/s", bars[-1]), bars
    assert ("  mfu " in bars[-1] and " GiB" in bars[-1]) is (width == 160)
    assert BAR[0] in bars[-1]
    assert not any("…" in line for line in lines)
    assert not any(re.search(r"tok/s\S", line) for line in lines)  # nothing is glued to it
    assert f"gpt_lightning {__version__}; run folder {tmp_path}"[:width] in sent


def test_a_terminal_that_moves_no_cursor_has_lines(
    tiny_config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "dumb"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    main(["fit", "--config", str(tiny_config()), "--progress.every_n_seconds", "0"])
    said: Any = capsys.readouterr().err
    assert re.search(r"  step 4/6  loss \d\.\d\d  val", said) and "\r" not in said
