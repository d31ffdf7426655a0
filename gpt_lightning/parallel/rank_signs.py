"""Gives signs of life: those of a machine's ranks in a file, those of the machines in rank 0's store."""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import Popen

from torch.distributed import Store, TCPStore

TICK_SECONDS = 0.25
CONNECT_SECONDS = 10.0
RECORD_BYTES = 256
NOBODY = "nobody"  # is lost any more: the run ends in order


@dataclass(frozen=True)
class Place:
    """Says where a rank is in the run, which ranks (`children`) it started, and who (`parent`) started it."""

    rank: int
    world_size: int
    local_rank: int
    node: int = 0
    n_nodes: int = 1
    children: Callable[[], dict[int, "Popen[bytes]"]] = dict
    parent: int | None = None

    @property
    def first_rank(self) -> int:
        return self.rank - self.local_rank

    def speaks(self, lost_rank: int) -> bool:
        """Tells whether this rank reports it: rank 0 or, if that is lost, rank 1 and each first rank."""
        return self.rank == 0 or (lost_rank == 0 and (self.rank == 1 or self.local_rank == 0))


class MachineFile:
    """Holds a record of each rank of a machine, which the rank writes and locks until its process ends."""

    def __init__(self, path: Path, place: Place) -> None:
        self._rank, self._beats = place.rank, 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._offset = place.local_rank * RECORD_BYTES
        os.lseek(self._file, self._offset, os.SEEK_SET)
        os.lockf(self._file, os.F_LOCK, RECORD_BYTES)  # a fork of this process does not hold it
        self.write("")
        if (len(self.others()) + 1) * place.n_nodes == place.world_size:
            path.unlink(missing_ok=True)  # all have opened it, and nothing stays when all are killed

    def write(self, word: str) -> None:
        self._beats += 1
        record = f"{self._rank} {self._beats} {word}".encode()[:RECORD_BYTES]
        os.pwrite(self._file, record.ljust(RECORD_BYTES), self._offset)

    def others(self) -> dict[int, tuple[int, str, bool]]:
        """Returns each other rank's number of beats, its last word, and whether its process is gone."""
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        records = {}
        for offset in range(0, len(data), RECORD_BYTES):
            if offset != self._offset and data[offset]:  # else nobody has written there
                record = data[offset : offset + RECORD_BYTES].decode(errors="replace")
                rank, beats, word = record.split(" ", 2)
                records[int(rank)] = int(beats), word.rstrip(), not _is_locked(self._file, offset)
        return records


class Board(threading.Thread):
    """Connects a machine to rank 0's store, in a thread that may block while rank 0 is stopped.

    It beats there, reads who is lost, and looks after the next machine of a ring.
    """

    def __init__(self, store: Store, address: str, place: Place) -> None:
        super().__init__(name="rank-watch-store", daemon=True)
        self._store, self._is_server = store, place.rank == 0
        self._own, self._next = place.node, (place.node + 1) % place.n_nodes
        self.next_rank = self._next * (place.world_size // place.n_nodes)
        self._wake, self._to_tell = threading.Event(), ""
        self.lost = ""  # what a machine has told to all: a rank and how it was lost, or NOBODY
        self.answers, self.next_beats = 1, 0  # a store that was reached has answered
        self.is_gone = self.next_is_gone = False
        # Nobody accepts: the system answers, and ends the neighbour's connection when this process ends.
        self._listener = _listen()
        if self._is_server:
            store.set("lost", "-")
        store.set(f"address {self._own}", f"{address} {self._listener.getsockname()[1]}")
        for key in ("joined", f"beats {self._own}"):
            store.add(key, 1)
        store.add(f"beats {self._next}", 0)
        self._line: socket.socket | None = None  # where the neighbour cannot be reached, its beats alone tell
        with suppress(OSError, RuntimeError):
            host, port = store.get(f"address {self._next}").decode().split()
            self._line = socket.create_connection((host, int(port)), CONNECT_SECONDS)
            self._line.setblocking(False)
        store.set_timeout(timedelta(days=1))  # a late answer is better than a broken connection

    def end(self, lost: str, patience_seconds: float) -> None:
        """Tells all machines who is lost, once and for good, and stops when they have read it."""
        self._to_tell = lost
        self._wake.set()
        self.join(patience_seconds)

    def run(self) -> None:
        try:
            while not self._to_tell:
                self.exchange()
                self._wake.wait(TICK_SECONDS)
            self._store.compare_set("lost", "-", self._to_tell)
            self._store.add("left", 1)
            # The store ends with rank 0, and the others have to read it before.
            while self._is_server and self._store.add("left", 0) < self._store.add("joined", 0):
                time.sleep(TICK_SECONDS / 10)
        except RuntimeError:  # the connection has ended
            self.is_gone = True

    def exchange(self) -> None:
        """Beats in the store once, and reads there who is lost and how the next machine beats."""
        self._store.add(f"beats {self._own}", 1)
        next_is_gone = self._next_is_gone()  # before what is told is read: who has read it may go
        lost, beats = self._store.multi_get(["lost", f"beats {self._next}"])
        self.lost, self.next_beats, self.next_is_gone = lost.decode().lstrip("-"), int(beats), next_is_gone
        self.answers += 1

    def _next_is_gone(self) -> bool:
        try:
            return self._line is not None and not self._line.recv(1)
        except OSError as error:
            return isinstance(error, ConnectionError)


def open_store() -> TCPStore:
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)


def reach_store(port: int) -> tuple[TCPStore, str]:
    """Returns rank 0's store, and the address by which this machine reaches it."""
    host = os.environ["MASTER_ADDR"]
    with socket.create_connection((host, port), CONNECT_SECONDS) as probe:  # fails with less noise
        address = probe.getsockname()[0]
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False), address


def _listen() -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
    # Else it would live for as long as a killed rank's data workers.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=listener.close)
    return listener


def _is_locked(file: int, offset: int) -> bool:
    """Tells whether another process holds the lock."""
    os.lseek(file, offset, os.SEEK_SET)
    try:
        os.lockf(file, os.F_TEST, RECORD_BYTES)
    except (BlockingIOError, PermissionError):
        return True
    return False
