"""Notices that a rank was killed or stopped, says in one line which, and ends the others.

The ranks of a machine see each other in a file. Its first rank and rank 0 see each other, and through rank 0
machines tell each other of a loss. So a rank's work grows with its machine, and rank 0's with their number.
"""

import atexit
import logging
import multiprocessing
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from gpt_lightning.exit_codes import LOST_RANK
from gpt_lightning.parallel.rank_signs import (
    TICK_SECONDS,
    MachineFile,
    MachineLinks,
    Sign,
)
from gpt_lightning.parallel.ranks import from_first, gathered_numbers, together

STALE_SECONDS = 3.0  # a silence that says enough where a collective operation has run into its timeout
PATIENCE_SECONDS = 5.0  # for what ends at its own pace: other ranks, a file that is being written
GRACE_SECONDS = 30.0
KILLED, SILENT = "was killed, or its machine failed", "has not answered"

logger = logging.getLogger(__name__)


class Lost(NamedTuple):
    rank: int
    how: str


class RankWatch:
    """Judges the other ranks a few times a second, in a thread, from `start` until this rank leaves.

    `children` are the ranks that this one has started, `parent` is the process of the one that started it.
    The line about a lost rank ends with the `remedy` of then; after it, `before_exit` gets a few seconds.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        machine: int,
        timeout: timedelta,
        children: Callable[[], dict[int, "subprocess.Popen[bytes]"]] = dict,
        parent: int | None = None,
    ) -> None:
        self.remedy: Callable[[], str] = str
        self.before_exit: Callable[[], None] = lambda: None
        self._rank, self._world_size, self._machine_number = rank, world_size, machine
        # This machine's ranks: by Lightning's launcher, until all have told where a scheduler has put them.
        self._machine = [*range(rank - local_rank, rank + 1)]
        self._children, self._parent = children, parent
        self._timeout_seconds = timeout.total_seconds()
        # Earlier than the collective operations, so that the run has ended when their time is over.
        self._limit_seconds = self._timeout_seconds - min(PATIENCE_SECONDS, self._timeout_seconds / 4)
        self._file: MachineFile | None = None
        self._links: MachineLinks | None = None
        self._word = ""  # for the ranks of this machine
        self._clock = 0.0  # stands still while the whole run is suspended
        self._heard: dict[int, tuple[int, float]] = {}
        self._explained: BaseException | None = None
        self._paused_until = 0.0
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    # ---- what the program calls

    def start(self) -> None:
        self._thread.start()
        atexit.register(self._at_exit)

    def connect(self) -> None:
        """Begins to see the others; all ranks call it."""
        machines = gathered_numbers(self._machine_number)
        self._machine = [rank for rank, number in enumerate(machines) if number == self._machine_number]
        secret, port, file = from_first(secrets.token_hex()), 0, None
        links, n_machines = MachineLinks(secret), len(set(machines))
        if self._rank == 0 and n_machines > 1:
            with self._warning():
                port = links.listen()
        port = from_first(port)
        path = Path(tempfile.gettempdir(), f"gpt_lightning-{secret}-{self._machine[0]}")
        with self._warning():
            file = MachineFile(path, self._rank, self._machine)
        if self._rank == self._machine[0] and port:
            with self._warning():
                if self._rank != 0:
                    links.call(self._rank, os.environ["MASTER_ADDR"], port)
                links.join(1 if self._rank else n_machines - 1)
        together()
        with suppress(OSError):
            path.unlink()  # all have opened it, or cannot: nothing stays of it when all are killed
        self._file, self._links = file, links

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except (OSError, AttributeError, RuntimeError) as error:  # Windows has no os.lockf
            logger.warning(f"rank {self._rank} is not watched: {str(error).splitlines()[0]}")

    def explain(self, error: BaseException) -> None:
        """Gives the watch time to end the process with its line, in case the error comes of a lost rank."""
        if isinstance(error, SystemExit):
            return
        self._explained = error
        if re.search("time.?out|timed out", str(error), re.IGNORECASE):
            self._limit_seconds = min(STALE_SECONDS, self._limit_seconds)
        if isinstance(error, RuntimeError):  # as collective operations raise it
            self._left.wait(PATIENCE_SECONDS)
        with self._ending:
            # Where all ranks fail alike, each is to say what it has to say.
            self._paused_until = time.monotonic() + min(GRACE_SECONDS, self._timeout_seconds / 2)
        self._say(f"error {type(error).__name__}")

    def leave(self) -> None:
        """Ends the judging, since all ranks are done or have agreed to stop."""
        with self._ending:
            if self._left.is_set():
                return
            self._left.set()
        self._thread.join()  # which else could write its former word over this one
        self._say("left")
        if self._links is not None:
            self._links.end(PATIENCE_SECONDS)
        self._end_children(GRACE_SECONDS)

    def _at_exit(self) -> None:
        if self._explained is None:
            self.leave()
        elif self._rank == self._machine[0] and not self._left.is_set():
            self._left.set()
            error = type(self._explained).__name__
            self._tell(Lost(self._rank, f"ended with an error ({error})"))
            self._end_children(PATIENCE_SECONDS)

    # ---- the thread

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._left.wait(TICK_SECONDS):
            now = time.monotonic()
            self._clock += min(now - last, 2 * TICK_SECONDS)
            last = now
            self._beat()
            if (lost := self._find_lost()) is not None:
                self._end(lost)

    def _say(self, word: str) -> None:
        self._word = word
        self._beat()

    def _beat(self) -> None:
        for channel in (self._file, self._links):
            if channel is not None:
                channel.write(self._word)

    def _find_lost(self) -> Lost | None:
        children = self._children()
        signs = [sign for channel in (self._file, self._links) if channel for sign in channel.signs()]
        for rank, _, word, is_gone in signs:
            kind, _, rest = word.partition(" ")
            if kind == "lost":
                lost_rank, _, how = rest.partition(" ")
                return Lost(int(lost_rank), how)
            if is_gone and kind != "left":
                return Lost(rank, _ending(children.get(rank), rest if kind == "error" else ""))
        for rank in children.keys() - {sign.rank for sign in signs}:
            if children[rank].poll():
                return Lost(rank, _ending(children[rank]))
        if self._parent not in (None, os.getppid()):
            return Lost(self._machine[0], "was killed")
        return self._find_silent(signs)

    def _find_silent(self, signs: list[Sign]) -> Lost | None:
        for rank, beats, word, _ in signs:
            if self._heard.get(rank, (0, 0.0))[0] != beats:
                self._heard[rank] = beats, self._clock
            seconds = self._clock - self._heard[rank][1]
            if seconds > self._limit_seconds and word != "left":
                timeout = f"(trainer.strategy.timeout is {self._timeout_seconds:g} s)"
                return Lost(rank, f"{SILENT} for {seconds:.0f} s {timeout}")
        return None

    # ---- the end

    def _end(self, lost: Lost) -> None:
        with self._ending:  # kept until the process is gone, so that nobody speaks twice
            if self._left.is_set() or time.monotonic() < self._paused_until:
                return
            self._report(lost)
            self._tell(lost)
            _try(self.before_exit, PATIENCE_SECONDS)
            for worker in multiprocessing.active_children():
                worker.kill()  # those that read data would wait for their parent a few seconds more
            self._end_children(PATIENCE_SECONDS, lost)
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(LOST_RANK)

    def _report(self, lost: Lost) -> None:
        """Prints the line: on rank 0 or, if that is lost, on rank 1 and the first rank of each machine."""
        if self._rank != 0 and (lost.rank != 0 or self._rank not in (1, self._machine[0])):
            return
        line = f"error: rank {lost.rank} of {self._world_size} {lost.how}; the other ranks end too"
        remedies: list[str] = []
        # It may look for a file on a disk that does not answer, by which the rank was lost.
        _try(lambda: remedies.append(self.remedy()), PATIENCE_SECONDS)
        print(". ".join([line, *filter(None, remedies)]), file=sys.stderr, flush=True)
        if lost.rank == self._machine[0] and lost.how.startswith(SILENT) and self._parent == os.getppid():
            os.kill(os.getppid(), signal.SIGKILL)  # else it would keep its device for ever

    def _tell(self, lost: Lost) -> None:
        """Tells this machine's ranks, and the others unless rank 0 is lost, which would tell them."""
        self._say(f"lost {lost.rank} {lost.how}")
        if self._links is not None and (lost.rank != 0 or self._rank == 0):
            self._links.end(3 * TICK_SECONDS)

    def _end_children(self, patience_seconds: float, lost: Lost | None = None) -> None:
        deadline = time.monotonic() + patience_seconds
        for rank, child in self._children().items():
            is_lost = lost is not None and lost.rank == rank
            try:
                child.wait(0 if is_lost else max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()  # a stopped process heeds no other signal
                child.wait()


def _try(act: Callable[[], None], seconds: float) -> None:
    """Does what may block, for so long at most."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


def _ending(child: "subprocess.Popen[bytes] | None", error: str = "") -> str:
    if child is not None:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(PATIENCE_SECONDS)
            if code >= 0:
                return f"ended with exit code {code}"
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with an error ({error})" if error else KILLED
