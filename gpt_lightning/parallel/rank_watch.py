"""Notices that a rank was killed or stopped, says in one line which, and ends the others."""

import atexit
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from gpt_lightning.exit_codes import LOST_RANK
from gpt_lightning.parallel.rank_peers import Peers, Place

TICK_SECONDS = 0.25
STALE_SECONDS = 3.0  # a silence that says enough where a collective operation has run into its timeout
PATIENCE_SECONDS = 5.0  # for what ends at its own pace: other ranks, a file that is being written
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Lost:
    rank: int
    how: str
    is_stopped: bool = False


class RankWatch:
    """A thread that judges the other ranks a few times a second, from `start` until this rank leaves.

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
        self._peers = Peers(place.rank)
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
        """On all ranks at once, when they can talk: `broadcast` gives everybody rank 0's argument."""
        self._peers.connect(broadcast)

    def explain(self, error: BaseException) -> None:
        """End the process with the one line if the error comes of a lost rank, else return."""
        if isinstance(error, SystemExit) or error is self._explained:
            return
        self._explained = error
        # Where all ranks fail alike, each is to say what it has to say.
        self._paused_until = time.monotonic() + min(GRACE_SECONDS, self._timeout_seconds / 2)
        # What collective operations raise is a RuntimeError.
        deadline = time.monotonic() + (PATIENCE_SECONDS if isinstance(error, RuntimeError) else 0)
        timed_out = re.search("time.?out|timed out", str(error), re.IGNORECASE)
        while time.monotonic() < deadline and not self._left.is_set():
            lost = self._lost or (self._find_silent(STALE_SECONDS) if timed_out else None)
            if lost is not None:
                self._end(lost)
            time.sleep(TICK_SECONDS / 5)
        self._peers.tell(f"error {type(error).__name__}")

    def leave(self) -> None:
        """When all ranks are done, or have agreed to stop: from here on nobody is judged."""
        with self._ending:
            if self._left.is_set():
                return
            self._left.set()
        self._peers.tell("farewell")
        self._thread.join()
        self._peers.close()
        self._end_children(GRACE_SECONDS)

    def _at_exit(self) -> None:
        if self._explained is None:
            self.leave()
        elif self._place.rank == self._place.parent_rank and not self._left.is_set():
            self._left.set()
            if self._place.rank == 0:
                self._peers.tell("lost 0 ended with an error")
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

    # ---- the thread

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._left.wait(TICK_SECONDS):
            now = time.monotonic()
            # Capped: if the whole run was suspended and goes on, nobody was silent.
            self._peers.exchange(min(now - last, 2 * TICK_SECONDS))
            last = now
            self._lost = self._lost or self._find_lost()
            if self._lost is not None and now >= self._paused_until:
                self._end(self._lost)

    def _find_lost(self) -> Lost | None:
        if self._peers.verdict is not None:
            return Lost(*self._peers.verdict)
        by_rank, children = self._peers.by_rank.copy(), self._place.children()
        present = {rank: peer for rank, peer in by_rank.items() if not peer.has_left}
        for rank, peer in present.items():
            if peer.is_gone and rank in children:
                with suppress(subprocess.TimeoutExpired):
                    return Lost(rank, _ending(children[rank].wait(PATIENCE_SECONDS)))
            if peer.is_gone:
                error = f"ended with an error ({peer.error})" if peer.error else None
                return Lost(rank, error or "was killed, or its machine failed")
        for rank, child in children.items():
            if rank not in by_rank and child.poll():
                return Lost(rank, _ending(child.returncode))
        place = self._place
        if place.parent not in (None, os.getppid()) and (0 in present or not by_rank):
            return Lost(place.parent_rank, "was killed")
        return self._find_silent(self._limit_seconds)

    def _find_silent(self, limit_seconds: float) -> Lost | None:
        for rank, peer in self._peers.by_rank.copy().items():
            if peer.silent_seconds > limit_seconds and not peer.has_left:
                how = f"has not answered for {peer.silent_seconds:.0f} s"
                timeout = f"(trainer.strategy.timeout is {self._timeout_seconds:g} s)"
                return Lost(rank, f"{how} {timeout}", is_stopped=True)
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
            if lost.is_stopped and lost.rank == place.parent_rank and place.parent == os.getppid():
                os.kill(os.getppid(), signal.SIGKILL)  # else it would keep its device for ever
        self._peers.tell(f"lost {lost.rank} {lost.how}")
        last_act = threading.Thread(target=self._before_exit, daemon=True)
        last_act.start()
        last_act.join(PATIENCE_SECONDS)
        for worker in multiprocessing.active_children():
            worker.kill()  # those that read data would wait for their parent a few seconds more
        self._end_children(PATIENCE_SECONDS)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(LOST_RANK)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by signal {-code} ({signal.Signals(-code).name})"
