"""Notices that a rank was killed or stopped, says in one line which, and ends the others.

The ranks of a machine see each other in a file. Its first rank also beats in rank 0's TCPStore, and looks there
after the next machine: the work of a rank grows with its machine, not with the world.
"""

import atexit
import logging
import multiprocessing
import os
import re
import secrets
import signal
import socket
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

from torch.distributed import TCPStore

from gpt_lightning.exit_codes import LOST_RANK

TICK_SECONDS = 0.25
STALE_SECONDS = 3.0  # a silence that says enough where a collective operation has failed
PATIENCE_SECONDS = 5.0  # for what ends at its own pace: other ranks, a file that is being written
CONNECT_SECONDS = 10.0
GRACE_SECONDS = 30.0
RECORD_BYTES = 256
FAULT_OF_A_PEER = re.compile("time.?out|timed out|connection|remote", re.IGNORECASE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this rank is in the run; `children` gives the ranks that it started, `parent` is who started it."""

    rank: int
    world_size: int
    local_rank: int
    node: int = 0
    n_nodes: int = 1
    children: Callable[[], dict[int, "subprocess.Popen[bytes]"]] = dict
    parent: int | None = None

    @property
    def first_rank(self) -> int:
        return self.rank - self.local_rank

    def speaks(self, lost_rank: int) -> bool:
        """Rank 0 does; where it is lost, its neighbour, and on other machines the first rank there."""
        return self.rank == 0 or (lost_rank == 0 and (self.rank == 1 or self.local_rank == 0))


class NodeFile:
    """The ranks of one machine: each writes a record, and holds a lock on it that ends with its process."""

    def __init__(self, path: Path, place: Place) -> None:
        self._path, self._rank, self._beats = path, place.rank, 0
        self._offset = place.local_rank * RECORD_BYTES
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        _lock(self._file, self._offset)
        self.write("")

    def write(self, word: str) -> None:
        self._beats += 1
        record = f"{self._rank} {self._beats} {word}".encode()[:RECORD_BYTES]
        os.pwrite(self._file, record.ljust(RECORD_BYTES), self._offset)

    def others(self) -> dict[int, tuple[str, str, bool]]:
        """Each other rank's number of beats, its last word, and whether its process is gone."""
        records = {}
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        for offset in range(0, len(data), RECORD_BYTES):
            if offset != self._offset and data[offset]:  # else nobody has written there
                record = data[offset : offset + RECORD_BYTES].decode(errors="replace")
                rank, beats, word = record.split(" ", 2)
                records[int(rank)] = beats, word.rstrip(), _is_free(self._file, offset)
        return records

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class StoreBoard(threading.Thread):
    """A machine's only connection to rank 0's store, in a thread that may block while rank 0 is stopped."""

    def __init__(self, store: TCPStore, place: Place) -> None:
        super().__init__(name="rank-watch-store", daemon=True)
        self._store, self._place = store, place
        self._wake, self._is_ending = threading.Event(), False
        self._to_tell = {"lost": "", "doubt": ""}
        self.lost = self.doubt = ""  # what somebody has told to all
        self.answers = self.neighbour_beats = 0
        self.is_gone = self.is_leaving = False
        self._beat, self._neighbour = (
            f"beats of {node % place.n_nodes}" for node in (place.node, place.node + 1)
        )
        self._keys = ["lost", "doubt", "left", self._neighbour]
        store.add("joined", 1)
        for key in ("left", self._neighbour):
            store.add(key, 0)

    @property
    def neighbour_rank(self) -> int:
        """The first rank of the next machine, where all have as many ranks as this one."""
        return (self._place.node + 1) % self._place.n_nodes * (self._place.world_size // self._place.n_nodes)

    def tell(self, key: str, text: str) -> None:
        """Tell all machines, the first `text` under a key for good."""
        self._to_tell[key] = text
        self._wake.set()

    def run(self) -> None:
        try:
            while not self._is_ending:
                self.exchange()
                self._wake.wait(TICK_SECONDS)
                self._wake.clear()
            self.exchange()
            self._store.add("left", 1)
            # The store ends with rank 0, and the others have to read it before.
            while self._place.rank == 0 and self._store.add("left", 0) < self._store.add("joined", 0):
                time.sleep(TICK_SECONDS / 10)
        except RuntimeError:  # the connection has ended
            self.is_gone = True

    def exchange(self) -> None:
        for key, text in self._to_tell.items():
            if text:
                self._store.compare_set(key, "-", text)
        self._store.add(self._beat, 1)
        lost, doubt, left, beats = (value.decode() for value in self._store.multi_get(self._keys))
        self.lost, self.doubt = lost.lstrip("-"), doubt.lstrip("-")
        self.is_leaving, self.neighbour_beats = left != "0", int(beats)
        self.answers += 1

    def end(self, patience_seconds: float) -> None:
        self._is_ending = True
        self._wake.set()
        self.join(patience_seconds)


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
        self._file: NodeFile | None = None
        self._board: StoreBoard | None = None
        self._word = ""  # what the ranks of this machine read: doubt, error NAME, left, lost RANK HOW
        self._beats: dict[int, object] = {}
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
        """On all ranks at once, when they can talk: `broadcast` gives everybody rank 0's argument."""
        place, server = self._place, None
        try:
            if place.rank == 0 and place.n_nodes > 1:
                server = _open_store()
        finally:
            secret, self._port = broadcast((secrets.token_hex(), server and server.port))
        try:
            path = Path(tempfile.gettempdir(), f"gpt_lightning-{secret}-{place.node}")
            self._file = NodeFile(path, place)
            if place.local_rank == 0 and self._port:
                self._board = StoreBoard(server or _reach_store(self._port), place)
                self._board.start()
        except (OSError, ImportError, RuntimeError) as error:
            logger.warning(f"rank {place.rank} is not watched: {str(error).splitlines()[0]}")

    def explain(self, error: BaseException) -> None:
        """End the process with the one line if the error comes of a lost rank, else return."""
        if isinstance(error, SystemExit) or error is self._explained:
            return
        self._explained = error
        # Where all ranks fail alike, each is to say what it has to say.
        self._paused_until = time.monotonic() + min(GRACE_SECONDS, self._timeout_seconds / 2)
        # What collective operations raise is a RuntimeError.
        deadline = time.monotonic() + (PATIENCE_SECONDS if isinstance(error, RuntimeError) else 0)
        if isinstance(error, RuntimeError) and FAULT_OF_A_PEER.search(str(error)):
            self._say("doubt")
        while time.monotonic() < deadline and not self._left.is_set():
            if self._lost is not None:
                self._end(self._lost)
            time.sleep(TICK_SECONDS / 5)
        self._say(f"error {type(error).__name__}")

    def leave(self) -> None:
        """When all ranks are done, or have agreed to stop: from here on nobody is judged."""
        with self._ending:
            if self._left.is_set():
                return
            self._left.set()
        self._say("left")
        self._thread.join()
        self._close(PATIENCE_SECONDS)
        self._end_children(GRACE_SECONDS)

    def _at_exit(self) -> None:
        if self._explained is None:
            self.leave()
        elif self._place.local_rank == 0 and not self._left.is_set():
            self._left.set()
            self._tell(f"{self._place.rank} ended with an error ({type(self._explained).__name__})")
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

    def _tell(self, lost: str) -> None:
        """Tell all ranks who is lost; the second rank of a machine does so for the first."""
        self._say(f"lost {lost}")
        place = self._place
        if self._board is None and place.local_rank == 1 and place.node and lost.startswith(f"{place.first_rank} "):
            with suppress(OSError, RuntimeError):
                self._board = StoreBoard(_reach_store(self._port), place)
                self._board.start()
        if self._board is not None:
            self._board.tell("lost", lost)
        self._close(3 * TICK_SECONDS)

    def _close(self, patience_seconds: float) -> None:
        if self._board is not None:
            self._board.end(patience_seconds)
        if self._file is not None:
            self._file.remove()

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
                return Lost(rank, error or "was killed, or its machine failed")
            self._listen(rank, beats, elapsed_seconds, has_left=kind == "left")
        for rank, child in children.items():
            if rank not in others and child.poll():
                return Lost(rank, _ending(child.returncode))
        place = self._place
        parent = others.get(place.first_rank)
        if place.parent not in (None, os.getppid()) and (parent is None or parent[1] != "left"):
            return Lost(place.first_rank, "was killed")
        doubts = any(word == "doubt" for _, word, _ in others.values()) or self._word == "doubt"
        if self._board is not None:
            return self._find_on_board(self._board, elapsed_seconds, doubts)
        return self._find_silent(doubts)

    def _find_on_board(self, board: StoreBoard, elapsed_seconds: float, doubts: bool) -> Lost | None:
        if board.lost:
            return _lost(board.lost)
        if board.is_gone and not board.is_leaving:
            return Lost(0, "was killed, or its machine failed")
        if doubts:
            board.tell("doubt", "yes")
        if self._listen(0, board.answers, elapsed_seconds, board.is_leaving) == 0:
            self._listen(board.neighbour_rank, board.neighbour_beats, elapsed_seconds, board.is_leaving)
        return self._find_silent(doubts or bool(board.doubt))

    def _listen(self, rank: int, beats: object, elapsed_seconds: float, has_left: bool) -> float:
        """Count for how long a rank, once heard, has been silent."""
        heard = beats != self._beats.get(rank, "0")
        self._beats[rank] = beats
        silent = 0.0 if heard or has_left else self._silent_seconds[rank] + elapsed_seconds
        self._silent_seconds[rank] = silent
        return silent

    def _find_silent(self, doubts: bool) -> Lost | None:
        limit_seconds = min(self._limit_seconds, STALE_SECONDS) if doubts else self._limit_seconds
        for rank, seconds in self._silent_seconds.items():
            if seconds > limit_seconds:
                how = f"has not answered for {seconds:.0f} s"
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
            if lost.is_stopped and lost.rank == place.first_rank and place.parent == os.getppid():
                os.kill(os.getppid(), signal.SIGKILL)  # else it would keep its device for ever
        self._tell(f"{lost.rank} {lost.how}")
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


# ---- files and sockets


def _lock(file: int, offset: int) -> None:
    """Lock a record until this process ends, however it ends; forked processes do not hold the lock."""
    import fcntl  # not on Windows

    fcntl.lockf(file, fcntl.LOCK_EX, RECORD_BYTES, offset)


def _is_free(file: int, offset: int) -> bool:
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, RECORD_BYTES, offset)
    except BlockingIOError:
        return False
    fcntl.lockf(file, fcntl.LOCK_UN, RECORD_BYTES, offset)
    return True


def _open_store() -> TCPStore:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for key in ("lost", "doubt"):
        store.set(key, "-")
    return store


def _reach_store(port: int) -> TCPStore:
    address = os.environ["MASTER_ADDR"]
    socket.create_connection((address, port), CONNECT_SECONDS).close()  # fails with less noise than the store
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
