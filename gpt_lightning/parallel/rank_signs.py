"""Gives signs of life: all ranks of a machine in a file, its first rank also on a connection with rank 0.

A TCPStore would not do: its server looks up the name of each caller, and meanwhile answers nobody.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

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

    def __init__(self, path: Path, rank: int, ranks: list[int]) -> None:
        self._ranks, self._beats = ranks, 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._offset = ranks.index(rank) * RECORD_BYTES
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
                    rank = self._ranks[offset // RECORD_BYTES]
                    signs.append(Sign(rank, int(beats), word.rstrip(), is_gone))
        return signs

    def _is_locked(self, offset: int) -> bool:
        os.lseek(self._file, offset, os.SEEK_SET)
        try:
            os.lockf(self._file, os.F_TEST, RECORD_BYTES)
        except (BlockingIOError, PermissionError):
            return True
        return False


class Link:
    """A connection of two machines' first ranks, on which each writes its word at each tick, in a line."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        """`rank` is the other end's, or None until it has said who it is."""
        self.rank, self.beats, self.word, self.is_gone = rank, 0, "", False
        self._connection, self._received, self._to_send = connection, b"", b""
        connection.setblocking(False)

    def close(self) -> None:
        self.is_gone = True
        self._connection.close()

    def write(self, line: str) -> None:
        if self.rank is not None:  # nothing is told to a stranger
            self._to_send = self._to_send or f"{line}\n".encode()
        with suppress(OSError):  # it has been stopped and its buffer is full, or it is gone
            self._to_send = self._to_send[self._connection.send(self._to_send) :]

    def read(self, secret: str) -> None:
        received, is_gone = b"", False
        try:
            received = self._connection.recv(1 << 16)
            is_gone = not received
        except BlockingIOError:
            pass
        except OSError:
            is_gone = True
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"), secret)
        if is_gone or len(self._received) > RECORD_BYTES:  # no rank says so much
            self.close()

    def _take(self, line: str, secret: str) -> None:
        kind, _, rest = line.partition(" ")
        if self.rank is not None:
            self.beats, self.word = self.beats + 1, line
            if kind in ("left", "lost"):  # its last word, and so it hears that we have it
                self.close()
        elif kind == secret:
            self.rank = int(rest)
        else:
            self.close()  # anybody can reach the port


class MachineLinks:
    """Links rank 0 with the first rank of each other machine."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._links: list[Link] = []
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):  # else a killed rank's data workers would keep its links
            os.register_at_fork(after_in_child=self._close)

    def listen(self) -> int:
        """Lets the others call at the port that is returned."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=4096)
        self._listener.setblocking(False)
        return int(self._listener.getsockname()[1])

    def call(self, rank: int, address: str, port: int) -> None:
        """Calls rank 0, as this rank."""
        self._links.append(Link(socket.create_connection((address, port), CONNECT_SECONDS), 0))
        self._links[0].write(f"{self._secret} {rank}")

    def join(self, n_links: int) -> None:
        """Waits until so many others were heard, and raises TimeoutError if they are fewer."""
        deadline = time.monotonic() + CONNECT_SECONDS
        n_heard = 0
        while n_heard < n_links and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 25)
            self._accept()
            n_heard = sum(sign.beats > 0 for sign in self.signs())
            self.write("")  # also to those that were heard just now
        for link in self._links:
            if link.beats == 0:
                link.write("left")
                link.close()
        self._links = [link for link in self._links if link.beats > 0]
        if self._listener is not None:
            self._listener.close()
        if n_heard < n_links:
            raise TimeoutError(f"{n_heard} of {n_links} machines have answered")

    def _accept(self) -> None:
        with suppress(OSError):  # nobody calls, or no file descriptor is left for now
            while self._listener is not None:
                self._links.append(Link(self._listener.accept()[0]))

    def write(self, word: str) -> None:
        with self._lock:
            for link in self._links:
                link.write(word)

    def signs(self) -> list[Sign]:
        """Returns those of the other ends."""
        with self._lock:
            for link in self._links:
                if not link.is_gone:
                    link.read(self._secret)
            known = [(link, link.rank) for link in self._links if link.rank is not None]
            return [Sign(rank, link.beats, link.word, link.is_gone) for link, rank in known]

    def end(self, patience_seconds: float) -> None:
        """Waits until the others have read this rank's last word."""
        deadline = time.monotonic() + patience_seconds
        while not all(sign.is_gone for sign in self.signs()) and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 10)

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for link in self._links:
            link.close()
