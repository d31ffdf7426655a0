"""Notices that a rank was killed or stopped, says in one line which, and ends the others.

The ranks of a machine see each other in a file, each machine sees the next, and all see rank 0's store.
So the work of a rank grows with its machine and not with the world.
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
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import PrefixStore

from gpt_lightning.exit_codes import LOST_RANK
from gpt_lightning.parallel.rank_signs import (
    NOBODY,
    TICK_SECONDS,
    Board,
    MachineFile,
    Place,
    open_store,
    reach_store,
)

STALE_SECONDS = 3.0  # a silence that says enough where a collective operation has run into its timeout
PATIENCE_SECONDS = 5.0  # for what ends at its own pace: other ranks, a file that is being written
GRACE_SECONDS = 30.0
KILLED, SILENT = "was killed, or its machine failed", "has not answered"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lost:
    rank: int
    how: str

    @property
    def is_stopped(self) -> bool:
        return self.how.startswith(SILENT)


class RankWatch:
    """Judges the other ranks a few times a second, in a thread, from `start` until this rank leaves.

    The line about a lost rank ends with `remedy`; after it, `before_exit` gets a few seconds.
    """

    def __init__(
        self,
        place: Place,
        timeout: timedelta,
        remedy: str = "",
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self.remedy = remedy
        self._place = place
        self._before_exit = before_exit
        self._timeout_seconds = timeout.total_seconds()
        # Earlier than the collective operations, so that the run has ended when their time is over.
        self._limit_seconds = self._timeout_seconds - min(PATIENCE_SECONDS, self._timeout_seconds / 4)
        self._file: MachineFile | None = None
        self._board: Board | None = None
        self._word = ""  # for the ranks of this machine: "error NAME", "left", or "lost RANK HOW"
        self._beats: dict[int, int] = {}
        self._silent_seconds: dict[int, float] = defaultdict(float)
        self._lost: Lost | None = None
        self._explained: BaseException | None = None
        self._paused_until = 0.0
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)

    # ---- what the program calls

    def start(self) -> None:
        self._thread.start()
        atexit.register(self._at_exit)

    def connect(self, broadcast: Callable[[Any], Any]) -> None:
        """Begins to see the others; all ranks call it. `broadcast` gives all of them rank 0's argument."""
        place, store, port = self._place, None, None
        if place.rank == 0 and place.n_nodes > 1:
            with suppress(RuntimeError):
                store = open_store()
                port = store.port
        secret, port = broadcast((secrets.token_hex(), port))
        try:
            path = Path(tempfile.gettempdir(), f"gpt_lightning-{secret}-{place.node}")
            self._file = MachineFile(path, place)
            if place.local_rank == 0 and port is not None:
                store, address = (store, os.environ["MASTER_ADDR"]) if store else reach_store(port)
                # Anybody can reach the port, but only a rank knows the keys.
                self._board = Board(PrefixStore(secret, store), address, place)
                self._board.start()
        except (OSError, AttributeError, RuntimeError) as error:  # Windows has no os.lockf
            logger.warning(f"rank {place.rank} is not watched: {str(error).splitlines()[0]}")

    def explain(self, error: BaseException) -> None:
        """Ends the process with the one line if the error comes of a lost rank, else returns."""
        if isinstance(error, SystemExit) or error is self._explained:
            return
        self._explained = error
        # Where all ranks fail alike, each is to say what it has to say.
        self._paused_until = time.monotonic() + min(GRACE_SECONDS, self._timeout_seconds / 2)
        # What collective operations raise is a RuntimeError.
        deadline = time.monotonic() + (PATIENCE_SECONDS if isinstance(error, RuntimeError) else 0)
        if re.search("time.?out|timed out", str(error), re.IGNORECASE):
            self._limit_seconds = min(STALE_SECONDS, self._limit_seconds)
        while time.monotonic() < deadline and not self._left.is_set():
            if self._lost is not None:
                self._end(self._lost)
            time.sleep(TICK_SECONDS / 5)
        self._say(f"error {type(error).__name__}")

    def leave(self) -> None:
        """Ends the judging, since all ranks are done or have agreed to stop."""
        with self._ending:
            if self._left.is_set():
                return
            self._left.set()
        self._say("left")
        self._thread.join()
        if self._board is not None:
            self._board.end(NOBODY, PATIENCE_SECONDS)
        self._end_children(GRACE_SECONDS)

    def _at_exit(self) -> None:
        if self._explained is None:
            self.leave()
        elif self._place.local_rank == 0 and not self._left.is_set():
            self._left.set()
            error = type(self._explained).__name__
            self._tell(Lost(self._place.rank, f"ended with an error ({error})"))
            self._end_children(PATIENCE_SECONDS)

    def _end_children(self, patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        for rank, child in self._place.children().items():
            is_lost = self._lost is not None and self._lost.rank == rank
            try:
                child.wait(0 if is_lost else max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()  # a stopped process heeds no other signal
                child.wait()

    # ---- what the others are told

    def _say(self, word: str) -> None:
        self._word = word
        if self._file is not None:
            self._file.write(word)

    def _tell(self, lost: Lost) -> None:
        self._say(f"lost {lost.rank} {lost.how}")
        store_is_lost = lost.rank == 0 != self._place.rank
        if self._board is not None and not store_is_lost:
            self._board.end(f"{lost.rank} {lost.how}", 3 * TICK_SECONDS)

    # ---- the thread

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._left.wait(TICK_SECONDS):
            now = time.monotonic()
            self._say(self._word)
            # Capped: if the whole run was suspended and goes on, nobody was silent.
            self._lost = self._lost or self._find_lost(min(now - last, 2 * TICK_SECONDS))
            last = now
            if self._lost is not None and now >= self._paused_until:
                self._end(self._lost)

    def _find_lost(self, elapsed_seconds: float) -> Lost | None:
        others, children = self._file.others() if self._file else {}, self._place.children()
        for rank, (beats, word, is_gone) in others.items():
            kind, _, rest = word.partition(" ")
            if kind == "lost":
                self._word = word
                return _lost(rest)
            if is_gone and kind != "left":
                if rank in children:
                    with suppress(subprocess.TimeoutExpired):
                        return Lost(rank, _ending(children[rank].wait(PATIENCE_SECONDS)))
                error = f"ended with an error ({rest})" if kind == "error" else None
                return Lost(rank, error or KILLED)
            self._listen(rank, 0 if kind == "left" else beats, elapsed_seconds)
        for rank, child in children.items():
            if rank not in others and child.poll():
                return Lost(rank, _ending(child.returncode))
        place = self._place
        parent = others.get(place.first_rank)
        if place.parent not in (None, os.getppid()) and (parent is None or parent[1] != "left"):
            return Lost(place.first_rank, "was killed")
        lost = None
        if self._board is not None and self._board.lost != NOBODY:
            lost = self._find_on_board(self._board, elapsed_seconds)
        return lost or self._find_silent()

    def _find_on_board(self, board: Board, elapsed_seconds: float) -> Lost | None:
        if board.lost:
            return _lost(board.lost)
        for rank, is_gone in ((0, board.is_gone), (board.next_rank, board.next_is_gone)):
            if is_gone:
                return Lost(rank, KILLED)
        # While rank 0's store does not answer, nothing is known of another rank.
        is_answered = self._place.rank == 0 or self._listen(0, board.answers, elapsed_seconds)
        if is_answered and board.next_rank != 0:
            self._listen(board.next_rank, board.next_beats, elapsed_seconds)
        return None

    def _listen(self, rank: int, beats: int, elapsed_seconds: float) -> bool:
        """Tells whether the rank was heard since the last time; counts for how long it has been silent."""
        is_heard = beats != self._beats.get(rank)
        self._beats[rank] = beats
        self._silent_seconds[rank] += elapsed_seconds
        if is_heard or not beats:  # or has not begun, or has left
            self._silent_seconds[rank] = 0.0
        return is_heard

    def _find_silent(self) -> Lost | None:
        for rank, seconds in self._silent_seconds.items():
            if seconds > self._limit_seconds:
                timeout = f"(trainer.strategy.timeout is {self._timeout_seconds:g} s)"
                return Lost(rank, f"{SILENT} for {seconds:.0f} s {timeout}")
        return None

    # ---- the end

    def _end(self, lost: Lost) -> None:
        with self._ending:  # kept until the process is gone, so that nobody speaks twice
            if not self._left.is_set():
                self._lost = lost
                self._exit(lost)

    def _exit(self, lost: Lost) -> NoReturn:
        place = self._place
        if place.speaks(lost.rank):
            line = f"error: rank {lost.rank} of {place.world_size} {lost.how}; the other ranks end too"
            print(line + (f". {self.remedy}" if self.remedy else ""), file=sys.stderr, flush=True)
            if lost.is_stopped and lost.rank == place.first_rank and place.parent == os.getppid():
                os.kill(os.getppid(), signal.SIGKILL)  # else it would keep its device for ever
        self._tell(lost)
        last_act = threading.Thread(target=self._before_exit, daemon=True)
        last_act.start()
        last_act.join(PATIENCE_SECONDS)
        for worker in multiprocessing.active_children():
            worker.kill()  # those that read data would wait for their parent a few seconds more
        self._end_children(PATIENCE_SECONDS)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(LOST_RANK)


def _lost(text: str) -> Lost:
    rank, _, how = text.partition(" ")
    return Lost(int(rank), how)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by signal {-code} ({signal.Signals(-code).name})"
