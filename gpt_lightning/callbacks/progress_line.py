"""Writes how far something has come into one line, of which a narrow terminal gets whole parts."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.text import Text

GAP = "  "
NARROWEST_BAR, WIDEST_BAR = 10, 40
# What a wide terminal shows besides, in this order: the beginning of a metric's name, and how it is written.
MORE = {
    "val/bpb": "bpb {:.3f}",
    "lr-": "lr {:.2g}",
    "train/grad_norm": "norm {:.2g}",
    "throughput/mfu": "mfu {:.1%}",
    "throughput/peak_memory_gib": "{:.1f} GiB",
}


@dataclass
class Progress:
    """Counts what is done of a whole, and reckons by it when that ends.

    The first of it is left out of the reckoning: it may wait for a compiler.
    """

    what: str
    total: float
    done: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)  # of the logs, by name
    rate: float | None = None  # in tokens a second
    note: str = ""  # what goes on besides

    def __post_init__(self) -> None:
        self._begun = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None

    def advance(self, done: int) -> None:
        if done != self.done:
            self.done, self._last = done, time.monotonic()
            self._first = self._first or (self._last, done)

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def remaining_seconds(self) -> float | None:
        """Is None while nothing is known of it."""
        if self.done >= self.total:
            return 0.0
        if self._first is None or self.done == self._first[1] or self.total == float("inf"):
            return None
        seconds = (self._last - self._first[0]) / (self.done - self._first[1])
        return max(0.0, seconds * (self.total - self.done) - (time.monotonic() - self._last))

    def line(self, remaining: float | None) -> str:
        """Writes all of it for a file, in which many such lines stand."""
        times = f"elapsed {clock(self.elapsed_seconds)}"
        times += "" if remaining is None else f"{GAP}left {clock(remaining)}"
        parts = [f"{self.what} {_count(self)}", *_losses(self), _rate(self), times, self.note]
        return GAP.join(part for part in parts if part)


@dataclass(frozen=True)
class ProgressLine:
    """Shows a Progress on a terminal: step, times and loss in any case, the rest where there is room."""

    progress: Progress
    remaining: float | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress, width = self.progress, options.max_width
        parts = fitted(parts_of(progress, self.remaining), width)
        yield Text(GAP, end="").join(Text(text, style) for text, style in parts)
        room = width - _width(parts) - len(GAP)
        if room >= NARROWEST_BAR and progress.total not in (0, float("inf")):
            yield Text(GAP, end="")
            yield ProgressBar(progress.total, progress.done, width=min(room, WIDEST_BAR))


Part = tuple[str, str]  # a text, and rich's name of its style


def parts_of(progress: Progress, remaining: float | None) -> list[Part]:
    """Lists the parts of a line as they follow each other, the most important ones first."""
    what = "" if progress.what == "step" else f"{progress.what} "
    times = f"{clock(progress.elapsed_seconds)} < {'?' if remaining is None else clock(remaining)}"
    parts = [(what + _count(progress), "progress.download"), (times, "progress.remaining")]
    parts += [(text, "bold") for text in _losses(progress)]
    parts += [(progress.note, "progress.description"), (_rate(progress), "progress.data.speed")]
    parts.append((" " * NARROWEST_BAR, ""))  # the bar's place
    for beginning, form in MORE.items():
        numbers = [number for name, number in progress.numbers.items() if name.startswith(beginning)]
        parts += [(form.format(number), "progress.description") for number in numbers[:1]]
    return [part for part in parts if part[0]]


def fitted(parts: list[Part], width: int) -> list[Part]:
    """Leaves out, from the first that does not fit on, whole parts; and the bar's place, which is last."""
    kept: list[Part] = []
    for part in parts:
        if _width([*kept, part]) > width:
            break
        kept.append(part)
    return [part for part in kept if part[0].strip()]


def _width(parts: list[Part]) -> int:
    return sum(cell_len(text) for text, _ in parts) + len(GAP) * (len(parts) - 1)


def _count(progress: Progress) -> str:
    of = "" if progress.total == float("inf") else f"/{int(progress.total):,}"
    return f"{progress.done:,}{of}"


def _losses(progress: Progress) -> list[str]:
    names = (("train/loss", "loss"), ("val/loss", "val"))
    numbers = progress.numbers
    return [f"{short} {_three_digits(numbers[name])}" for name, short in names if name in numbers]


def _three_digits(loss: float) -> str:
    return f"{loss:.3f}" if abs(loss) < 1 else f"{loss:.2f}"


def _rate(progress: Progress) -> str:
    return "" if progress.rate is None else f"{shortened(progress.rate)} tok/s"


def shortened(number: float) -> str:
    """Writes 950, 1.5k, 20.7k, 123k, 1.2M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5 or unit == "G":
            break
        number /= 1000
    if not unit:
        return f"{number:.0f}"
    return f"{number:.1f}{unit}" if abs(number) < 99.95 else f"{number:.0f}{unit}"


def clock(seconds: float) -> str:
    """Writes 0:12, 9:20, 1:02:03, 2d 3:04:05."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
