"""Gives signs of life: all ranks of a machine in a file, its first rank by a store that answers others."""

import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore

TICK_SECONDS = 0.25
CONNECT_SECONDS = 10.0
RECORD_BYTES = 256


class Sign(NamedTuple):
    """Says how often a rank was heard, its last word, and whether its process has ended.

    A word is "left", "error NAME", "lost RANK HOW" of a third rank, or nothing as long as all is well.
    """

    rank: int
    beats: int
    word: str
    is_gone: bool


class MachineFile:
    """Holds a record of each rank of a machine, which the rank writes and locks until its process ends."""

    def __init__(self, path: Path, rank: int, local_rank: int) -> None:
        self._first_rank, self._beats = rank - local_rank, 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._offset = local_rank * RECORD_BYTES
        os.lseek(self._file, self._offset, os.SEEK_SET)
        os.lockf(self._file, os.F_LOCK, RECORD_BYTES)  # a fork of this process does not hold it
        self.write("")

    def write(self, word: str) -> None:
        self._beats += 1
        record = f"{self._beats} {word}".encode()[:RECORD_BYTES]
        os.pwrite(self._file, record.ljust(RECORD_BYTES), self._offset)

    def signs(self) -> list[Sign]:
        """Returns those of the machine's other ranks."""
        signs = []
        for offset in range(0, os.fstat(self._file).st_size, RECORD_BYTES):
            if offset != self._offset:
                is_gone = not self._is_locked(offset)  # before its record is read, which then is its last
                record = os.pread(self._file, RECORD_BYTES, offset)
                if record[0]:  # else that rank could not join
                    beats, _, word = record.decode(errors="replace").partition(" ")
                    rank = self._first_rank + offset // RECORD_BYTES
                    signs.append(Sign(rank, int(beats), word.rstrip(), is_gone))
        return signs

    def _is_locked(self, offset: int) -> bool:
        os.lseek(self._file, offset, os.SEEK_SET)
        try:
            os.lockf(self._file, os.F_TEST, RECORD_BYTES)
        except (BlockingIOError, PermissionError):
            return True
        return False


class StoreReader(threading.Thread):
    """Asks a machine's store for its last word, in a thread that may block while the machine is stopped.

    The store's process answers as long as it lives. That it has ended is also seen on a `line` to it, and in
    silence, where the store itself would print where in torch it has failed.
    """

    def __init__(
        self, rank: int, store: Store, left: threading.Event, line: socket.socket | None = None
    ) -> None:
        super().__init__(name="rank-watch-store", daemon=True)
        self.store, self.sign = store, Sign(rank, 1, "", False)
        self._left, self._line = left, line
        store.add("readers", 1)
        store.set_timeout(timedelta(days=1))  # a late answer is better than a broken connection
        self.start()

    def run(self) -> None:
        try:
            while not self.sign.word and not self._left.wait(TICK_SECONDS):
                self._ask()
            self.store.add("readers", -1)
        except (OSError, RuntimeError):  # the connection has ended
            self.sign = self.sign._replace(is_gone=True)

    def _ask(self) -> None:
        if self._line is not None:
            with suppress(BlockingIOError):
                if not self._line.recv(1):
                    raise ConnectionResetError
        word = self.store.get("word").decode()
        self.sign = self.sign._replace(beats=self.sign.beats + 1, word=word)


def say_last(store: Store, word: str, patience_seconds: float) -> None:
    """Leaves a word in the store, once and for good, and waits until all have read it: it may end with us."""
    deadline = time.monotonic() + patience_seconds
    with suppress(RuntimeError):
        store.compare_set("word", "", word)
        while store.add("readers", 0) > 0 and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 10)


def open_store(rank: int, secret: str) -> tuple[Store, str, int]:
    """Returns this machine's store, and the address and port at which others reach it."""
    timeout = timedelta(seconds=CONNECT_SECONDS)
    server = TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    # Its sockets are torch's: a forked data worker keeps them until it looks for its rank, every 5 s.
    # Anybody can reach the port, but only a rank knows the keys.
    store = PrefixStore(secret, server)
    store.set("word", "")
    return store, _own_address() if rank else os.environ["MASTER_ADDR"], server.port


def reach_store(secret: str, address: str, port: int) -> Store:
    """Returns another machine's store."""
    open_line(address, port).close()  # fails with less noise
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return PrefixStore(secret, TCPStore(address, port, timeout=timeout, wait_for_workers=False))


def open_line(address: str, port: int) -> socket.socket:
    """Returns a connection to a store's process on which nothing is sent."""
    line = socket.create_connection((address, port), CONNECT_SECONDS)
    line.setblocking(False)
    return line


def _own_address() -> str:
    """Returns the address of this machine in the network in which rank 0 is."""
    family, kind, _, _, target = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])
