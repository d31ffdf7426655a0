"""Runs a trial in a process of its own, and reads its curve while it runs."""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.checkpoint.atomic import release, take_lock
from gpt_lightning.checkpoint.runs import LOCK
from gpt_lightning.exit_codes import INTERRUPTED, TERMINATED

POLL_SECONDS = 1.0
_SIGNALS = {"SIGINT": INTERRUPTED, "SIGTERM": TERMINATED, "SIGHUP": TERMINATED, "SIGUSR1": TERMINATED}


class SweepStopped(Exception):
    """Ends a sweep before its time, in order, with this exit code."""

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(f"{name}: the sweep has stopped; the same words go on with it")
        self.exit_code = exit_code


class Curve:
    """Reads the validation losses of a run, by step, from its event files, on which it may be writing."""

    def __init__(self, run_folder: Path) -> None:
        self._logs = run_folder / "logs"
        self._events: EventAccumulator | None = None

    def read(self) -> dict[int, float]:
        if self._events is None:
            if not self._logs.is_dir():
                return {}
            self._events = EventAccumulator(str(self._logs), size_guidance={"scalars": 0})
        self._events.Reload()
        if "val/loss" not in self._events.Tags()["scalars"]:
            return {}
        # What was validated again after a kill is there twice, the later one last.
        return {event.step: event.value for event in self._events.Scalars("val/loss")}


class Signals:
    """Passes the first signal that the sweep gets on to its trial, which saves; a second one kills that.

    The trials have sessions of their own, so that Ctrl-C in a terminal reaches them once.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._received: str | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for name in _SIGNALS:
            if (number := getattr(signal, name, None)) is not None:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        again, self._received = self._received is not None, signal.Signals(number).name
        if self._process is not None and self._process.poll() is None:
            if again:
                self._process.kill()
            else:
                self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def check(self) -> None:
        if self._received is not None:
            raise SweepStopped(self._received, _SIGNALS[self._received])

    def run(self, command: Sequence[str], log: Path, look: Callable[[], bool]) -> tuple[int, bool]:
        """Returns the exit code, and whether it was ended since `look`, called meanwhile, said so."""
        self.check()
        with log.open("ab") as output:
            # Nobody answers a trial, and its output is not the sweep's.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        was_ended = False
        try:
            while (code := _wait(self._process, POLL_SECONDS)) is None:
                if not was_ended and self._received is None and look():
                    self._process.send_signal(signal.SIGTERM)
                    was_ended = True
        except BaseException:
            self._process.terminate()  # else it would train on, and nobody would look
            raise
        self._process = None
        self.check()
        by_signal = {-number for name in _SIGNALS if (number := getattr(signal, name, None)) is not None}
        if code in (INTERRUPTED, TERMINATED, *by_signal) and not was_ended:
            raise SweepStopped(f"a signal ended the trial (exit code {code})", TERMINATED)
        look()  # at what it wrote last
        return code, was_ended and code != 0

    def wait_until_free(self, folder: Path, tell: Callable[[str], None]) -> None:
        """Waits for a trial that has outlived the sweep which started it, as one does that was killed."""
        was_told = False
        while folder.is_dir():
            if (lock := take_lock(folder / LOCK)) is not None:
                release(lock)
                return
            if not was_told:
                tell(f"{folder.name} is still running; waiting for it")
            was_told = True
            time.sleep(POLL_SECONDS)
            self.check()


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
