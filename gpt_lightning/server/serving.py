"""Runs uvicorn with the app on a socket, from the first connection to an orderly end."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from typing_extensions import override

from gpt_lightning.exit_codes import INTERRUPTED, TERMINATED, UserError
from gpt_lightning.server.connections import Connections
from gpt_lightning.server.limits import Limits

_HEAD_BYTES = 2**14
_log = logging.getLogger(__name__)


def open_socket(host: str, port: int) -> socket.socket:
    """Takes the address, before anything else is done that takes long."""
    if not 0 <= port < 2**16:
        raise UserError(f"port={port} is not from 0 to 65535; give e.g. 8000, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"host={host} port={port} cannot be used ({reason}); give another") from None
    return opened


def _listen(opened: socket.socket) -> None:
    """Takes the port for good: two programs may have the same one until either listens."""
    try:
        opened.listen()
    except OSError as error:
        host, port = opened.getsockname()[:2]
        raise UserError(f"host={host} port={port} cannot be used ({error.strerror}); give another") from None


def serve(app: Starlette, opened: socket.socket, limits: Limits, said: Callable[[], None]) -> int:
    """Serves until a signal; returns the exit code: 0, or the signal's where a request was cut off."""
    server = make_server(app, limits, said)
    _listen(opened)
    asyncio.run(server.serve([opened]))
    if not app.state.service.metrics.cut:
        return 0
    return INTERRUPTED if server.ended_by == signal.SIGINT else TERMINATED


def make_server(app: Starlette, limits: Limits, said: Callable[[], None]) -> "Server":
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients do is no news
    config = uvicorn.Config(
        app,
        http=Connections(limits, app.state.service.metrics).protocol(),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=limits.grace_seconds,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
    return Server(config, app.state.service, said)


class Server(uvicorn.Server):
    """Takes no new requests from a signal on, and ends at once at a second one."""

    def __init__(self, config: uvicorn.Config, service: Any, said: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._said = service, said
        self.ended_by: int | None = None

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._said()

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        if self.should_exit:  # a second one
            logging.getLogger("uvicorn.error").disabled = True  # it would show where all was cut off
            for task in self.server_state.tasks:
                task.cancel()
            self.force_exit = True
        elif n_running := len(self.server_state.tasks):
            grace = f"{self.config.timeout_graceful_shutdown:g} s to end; a second signal does not wait"
            _log.info("requests under way: %d; they have up to %s", n_running, grace)
        self.ended_by = self.ended_by or number
        self._service.is_closing = self.should_exit = True
