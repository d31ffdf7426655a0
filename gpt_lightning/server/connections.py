"""Bounds what a connection may take of the server: its number, its silence, and an answer not taken.

uvicorn bounds the time between two requests alone.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt_lightning.server.limits import Limits
from gpt_lightning.server.metrics import Metrics

_UNREAD_BYTES = 2**17  # of an answer that the system keeps for a client which does not take it


class Connections:
    """Knows the connections that have no request running, in the order of their silence."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.silent: dict["Connection", None] = {}
        self.n_open = 0

    def make_room(self) -> None:
        if self.n_open > self.limits.max_connections and self.silent:
            next(iter(self.silent)).cut()

    def protocol(self) -> Callable[..., "Connection"]:
        """Returns what uvicorn makes its connections with."""
        return lambda **options: Connection(self, **options)


class Connection(H11Protocol):
    """Is closed where its head does not come in time, or its client does not take the answer."""

    def __init__(self, group: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._group = group
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (connected := transport.get_extra_info("socket")) is not None:
            # Of a machine that is gone without a word the system itself finds out.
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        self._group.n_open += 1
        self._group.metrics.connections = self._group.n_open
        self._wait_for_head()
        self._group.make_room()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._group.n_open -= 1
        self._group.metrics.connections = self._group.n_open
        self._group.silent.pop(self, None)
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        """Starts the clock where a head has begun or a body is left, and stops it where a request runs."""
        is_running = self.cycle is not None and not self.cycle.response_complete
        if is_running:
            self._group.silent.pop(self, None)
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY:  # of a refused request
            self._wait_for_head()
        else:
            self._group.silent[self] = None

    def _wait_for_head(self) -> None:
        self._group.silent[self] = None
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._group.limits.header_seconds, self.cut)

    def cut(self) -> None:
        self._group.silent.pop(self, None)
        self.transport.abort()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_timer = self.loop.call_later(self._group.limits.reader_seconds, self.cut)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    @override
    def timeout_keep_alive_handler(self) -> None:
        # A close would wait for a client that takes nothing.
        self.cut() if self.transport.get_write_buffer_size() else super().timeout_keep_alive_handler()

    @override
    def send_400_response(self, msg: str) -> None:
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # within an answer
            self.cut()
