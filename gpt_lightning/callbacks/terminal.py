"""Writes for people: nothing in a text acts on their terminal, and no output ends a run."""

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# What moves, hides, colours or turns round: control characters but tab and newline, signs of direction, and
# halves of surrogate pairs, which no encoding has.
_ACTING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Where a line begins that has no time yet and is to have one: scripts look for errors by their first word.
_UNTIMED = re.compile(r"^(?!\d{4}-\d\d-\d\d \d\d:|error[ :])(?=.)", re.MULTILINE)
TIME = "%Y-%m-%d %H:%M:%S  "


def printable(text: str) -> str:
    """Writes what could act on a terminal as Python does: an escape becomes the four characters \\x1b."""
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_readers(text: str, stream: TextIO) -> str:
    """Returns the text as the stream is to have it: a file keeps it, a terminal shows it."""
    return printable(text) if stream.isatty() else text


class SteadyStream:
    """Passes everything on to a stream, and goes on without it when its reader left or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # of characters that the terminal does not have

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies and pickles ask for before there is a stream
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # a ValueError where it was closed
            self._go_on(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._go_on(error)

    def _go_on(self, error: Exception) -> None:
        """Has what comes later, and what is still buffered, written nowhere."""
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            if number == 1 and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                os.write(2, f"standard output cannot be written ({error.strerror}); it ends here\n".encode())


class LogStream(SteadyStream):
    """Begins each line with the time, but those of errors; `plain` leaves it out, for a line to be copied."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.plain = cast(TextIO, SteadyStream(stream))
        self._is_inside = False  # a line that has begun

    def write(self, text: str) -> int:
        now = time.strftime(TIME)
        timed = _UNTIMED.sub(now, text)
        super().write(timed.removeprefix(now) if self._is_inside else timed)
        self._is_inside = self._is_inside if not text else not text.endswith("\n")
        return len(text)


def log_time() -> str:
    """Returns what a line begins with that goes around sys.stderr; nothing where that is no log."""
    return time.strftime(TIME) if isinstance(sys.stderr, LogStream) else ""


def plain_stderr() -> TextIO:
    return sys.stderr.plain if isinstance(sys.stderr, LogStream) else sys.stderr


@contextmanager
def steady_streams(*, stdout: bool, is_log: bool = False) -> Iterator[None]:
    """Surrounds a program: no message ends it, nor its standard output, where that is not its work.

    What it says is a log, with times, where nobody watches it on a terminal.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, and the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    former = sys.stdout, sys.stderr
    sys.stderr = _steady(sys.stderr, LogStream if is_log and not _is_terminal(sys.stderr) else SteadyStream)
    if stdout:
        sys.stdout = _steady(sys.stdout)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr) if stdout else (sys.stderr,):
            stream.flush()
        sys.stdout, sys.stderr = former


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _steady(stream: TextIO | None, kind: type[SteadyStream] = SteadyStream) -> TextIO:
    return cast(TextIO, kind(stream or open(os.devnull, "w", encoding="utf-8")))
