"""Texts cannot act on the terminal that shows them, files keep them, and no output ends a program."""

import errno
import io
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.terminal import SteadyStream, for_readers, log_time, printable, steady_streams
from gpt_lightning.cli.errors import one_line_errors, quiet, say, show_fault
from gpt_lightning.exit_codes import UserError
from tests.log import TIME

EVIL = "\x1b]0;title\x07\x1b[2Ja\rb\x08\x9b31m\x7f\u202eabc\u2066\udcff"


def acts(text: str) -> bool:
    return any(character in text for character in "\x1b\x07\r\x08\x9b\x7f\u202e\u2066\udcff")


def test_what_acts_is_written_out_and_all_else_stays() -> None:
    assert printable(EVIL) == r"\x1b]0;title\x07\x1b[2Ja\rb\x08\x9b31m\x7f\u202eabc\u2066\udcff"
    text = "a\tb\n从前 naïve e\u0301 👍🏽 \u200d \u3000 العربية \\x1b"
    assert printable(text) == text


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_it_and_a_file_keeps_it() -> None:
    assert for_readers(EVIL, io.StringIO()) == EVIL
    assert not acts(for_readers(EVIL, Screen()))


def test_no_message_acts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # to be given back
    quiet()
    say(EVIL)
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError(EVIL)
    with pytest.raises(SystemExit), one_line_errors():
        raise FileNotFoundError(errno.ENOENT, "not there", EVIL)
    for verb in ([], ["generate"], ["fit"], ["fit", "--config"], ["validate", "--ckpt_path"]):
        with pytest.raises(SystemExit):
            main([*verb, "--" + EVIL])
    for name in ("gpt_lightning", "lightning.pytorch"):
        for handler in logging.getLogger(name).handlers:
            assert handler.filter(record := logging.LogRecord("x", 20, "x", 1, "at %s", (EVIL,), None))
            assert not acts(record.getMessage())
    warnings.showwarning(UserWarning(EVIL), UserWarning, "x.py", 1)
    show_fault(RuntimeError, RuntimeError(EVIL), None)
    captured = capsys.readouterr()
    assert r"\x1b[2J" in captured.err and not acts(captured.err + captured.out)


class Broken(io.StringIO):
    """A stream whose reader has left, or whose disk is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error

    def flush(self) -> None:
        raise self._error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "full"), ValueError("closed")])
def test_a_stream_that_fails_ends_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with steady_streams(stdout=True):
        print("a")
        say("b")
        sys.stdout.flush()
    assert isinstance(sys.stdout, Broken)


def test_a_signal_ends_a_run_in_order_also_when_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", write)
    stop = OrderlyStop()
    stop._note(signal.SIGTERM, None)
    assert stop._exit_code == 143


def test_each_line_of_a_log_begins_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with steady_streams(stdout=False, is_log=True):
        print("a", "b", file=sys.stderr)
        sys.stderr.write("half")
        sys.stderr.write("")
        sys.stderr.write(" a line\n\nc\n")
        sys.stderr.write("2026-11-29 13:42:05  d\n")
        print("error: e", "error of rank 1: f", "errors", sep="\n", file=sys.stderr)
        say("g")
        say("tensorboard", to_copy=True)
        own = log_time()
    assert sys.stderr is log and re.fullmatch(TIME, own) and log_time() == ""
    lines = log.getvalue().splitlines()
    assert [re.sub(TIME, "@", line) for line in lines] == [
        *("@a b", "@half a line", "", "@c", "@d", "error: e", "error of rank 1: f", "@errors", "@g"),
        "tensorboard",
    ]
    assert lines[4] == "2026-11-29 13:42:05  d"
    with steady_streams(stdout=False):
        print("h", file=sys.stderr)
    assert log.getvalue().endswith("\nh\n")


def test_a_terminal_shows_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with steady_streams(stdout=False, is_log=True):
        say("a")
        assert log_time() == ""
    assert screen.getvalue() == "a\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_characters_ends_nothing(encoding: str) -> None:
    written = io.BytesIO()
    stream: Any = SteadyStream(io.TextIOWrapper(written, encoding=encoding))
    print("从 é", file=stream, flush=True)
    assert written.getvalue() in (b"? ?\n", b"? \xe9\n")


def test_closed_streams_end_nothing(tmp_path: Path) -> None:
    """In an interpreter of its own, whose numbers 0 to 2 a file could take."""
    code = (
        "import os, sys; from gpt_lightning.callbacks.terminal import steady_streams\n"
        "with steady_streams(stdout=True):\n"
        "    file = open('written', 'w'); print('out'); print('err', file=sys.stderr); os.write(1, b'raw')\n"
        "    file.write(str(file.fileno()))\n"
    )
    command = f"{sys.executable} -c \"{code}\" <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=environment).returncode == 0
    assert int((tmp_path / "written").read_text()) > 2
