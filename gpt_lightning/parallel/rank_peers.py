"""Connections between rank 0 and every other rank, to tell a rank that was killed or stopped from a slow one.

A connection that ends without a farewell is a rank that was killed, one that stays silent a rank that was
stopped. Collective operations notice the one late and the other after their timeout; with NCCL nobody does.
"""

import logging
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

BEAT_SECONDS = 0.5
CONNECT_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Of this rank in the run; `children` gives the ranks that it started, `parent` is who started it."""

    rank: int
    world_size: int
    local_rank: int
    children: Callable[[], dict[int, "subprocess.Popen[bytes]"]] = dict
    parent: int | None = None

    @property
    def parent_rank(self) -> int:
        return self.rank - self.local_rank

    def speaks(self, lost_rank: int) -> bool:
        """Rank 0 does; where it is lost, its neighbour, and on other machines the first rank there."""
        return self.rank == 0 or (lost_rank == 0 and (self.rank == 1 or self.local_rank == 0))


class Peer:
    """The other end of a connection, and what is known of the rank there."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(1)
        self.connection = connection
        self.silent_seconds = 0.0
        self.is_gone = self.has_left = False
        self.error = ""
        self._rest = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def say(self, line: str) -> None:
        with suppress(OSError):
            self.connection.sendall(line.encode() + b"\n")

    def hear(self) -> list[str]:
        try:
            data = self.connection.recv(4096)
        except OSError:
            data = b""
        self.silent_seconds, self.is_gone = 0.0, not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Peers:
    """Rank 0's connections to all others, or another rank's only one, to rank 0."""

    def __init__(self, rank: int) -> None:
        self.by_rank: dict[int, Peer] = {}
        self.verdict: tuple[int, str] | None = None  # what rank 0 says: who is lost, and how
        self._rank = rank
        self._listener: socket.socket | None = None
        self._strangers: list[Peer] = []
        self._token = ""
        self._spoke_at = 0.0
        # Else a killed rank's connections would stay open for as long as its data workers live.
        if hasattr(os, "register_at_fork"):  # where there are no forks, nobody inherits it
            os.register_at_fork(after_in_child=self.close)

    def connect(self, broadcast: Callable[[Any], Any]) -> None:
        """On all ranks at once, when they can talk: `broadcast` gives everybody rank 0's argument."""
        address = os.environ["MASTER_ADDR"]
        if self._rank == 0:
            listener, self._token = _listen(address), secrets.token_hex()
            broadcast((listener.getsockname()[1], self._token))
            self._listener = listener
            return
        port, token = broadcast(None)
        try:
            peer = Peer(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
        except OSError as error:
            logger.warning(f"rank {self._rank} is not watched: it cannot reach {address}:{port} ({error})")
        else:
            peer.say(f"{token} {self._rank}")
            self.by_rank[0] = peer

    def tell(self, line: str) -> None:
        for peer in self.by_rank.copy().values():
            peer.say(line)

    def exchange(self, elapsed_seconds: float) -> None:
        """Say that this rank is there, and hear what has come since the last call."""
        now = time.monotonic()
        if now - self._spoke_at >= BEAT_SECONDS:
            self._spoke_at = now
            self.tell("beat")
        for peer in self.by_rank.copy().values():
            peer.silent_seconds += elapsed_seconds
        while ready := self._ready():
            for source in ready:
                if isinstance(source, socket.socket):
                    self._strangers.append(Peer(source.accept()[0]))
                elif source in self._strangers:
                    self._admit(source, source.hear())
                else:
                    self._note(source, source.hear())

    def _ready(self) -> list[Any]:
        peers = [peer for peer in self.by_rank.copy().values() if not peer.is_gone]
        sources: list[Any] = [*peers, *self._strangers]
        return wait(sources if self._listener is None else [*sources, self._listener], timeout=0)

    def _admit(self, stranger: Peer, lines: list[str]) -> None:
        """Anybody can reach the port, but only a rank knows the token."""
        self._strangers.remove(stranger)
        token, _, rank = "".join(lines[:1]).partition(" ")
        if secrets.compare_digest(token.encode(), self._token.encode()):
            self.by_rank[int(rank)] = stranger
            stranger.say("beat")
            self._note(stranger, lines[1:])
        else:
            stranger.connection.close()

    def _note(self, peer: Peer, lines: list[str]) -> None:
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "farewell":
                peer.has_left = True
            elif word == "error":
                peer.error = rest
            elif word == "lost" and self._rank != 0:
                rank, _, how = rest.partition(" ")
                self.verdict = int(rank), how

    def close(self) -> None:
        for peer in [*self.by_rank.values(), *self._strangers]:
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()


def _listen(address: str) -> socket.socket:
    if address in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=both)
