"""Ends a verb at a signal that comes while no step is trained: at once, with a line and a code."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from gpt_lightning.exit_codes import INTERRUPTED, TERMINATED

EXIT_CODES = {"SIGTERM": TERMINATED, "SIGUSR1": TERMINATED, "SIGINT": INTERRUPTED}
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them


class EndedBySignal(BaseException):
    """Leaves all that goes on; no Exception, which an import may take for a thing that is missing.

    Nor a SystemExit, which other ranks take for an end that all have agreed on.
    """


class StartSignals:
    """Surrounds a verb: what is half-written when a signal comes is removed on the way out.

    It is the signals' handler too. While steps are trained OrderlyStop takes its place.
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self.has_trained = False
        self._ended_by: str | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StartSignals":
        if threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                number = getattr(signal, name, None)
                # A shell has what runs in the background ignore some.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._handler_of(name))
        return self

    def _handler_of(self, name: str) -> Any:
        """Lets a rank that writes nothing yet end even where it waits for others, outside of Python."""
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        return self if is_first_here or name == "SIGINT" else signal.SIG_DFL

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._ended_by = signal.Signals(number).name
        raise EndedBySignal(self._ended_by)

    def check(self) -> None:
        """Ends what has let no exception through, as imports may."""
        if self._ended_by is not None:
            raise EndedBySignal(self._ended_by)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._ended_by is not None and error is not None:  # perhaps another one, of the way out
            if first_rank():
                print(f"{self._ended_by}: {self._what_ended()}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODES[self._ended_by])

    def _what_ended(self) -> str:
        if self._verb != "fit":
            return f"{self._verb} ended"
        return "ended after training" if self.has_trained else "ended before the first step; nothing is saved"


def first_rank() -> bool:
    """Tells whether this process speaks for the run, also before Lightning is imported."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"
