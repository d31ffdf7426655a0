"""Lets in who may ask: by the host that a browser names, by the page that asks, and by a key."""

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt_lightning.exit_codes import UserError
from gpt_lightning.server.fields import Refusal

_OPEN = ("/", "/health")  # need no key
_LEAST_KEY = 16  # characters


@dataclass(frozen=True)
class Access:
    """Says who is let in.

    `hosts` are the names by which a browser may know the server, None for any: a page of another name that
    leads here (DNS rebinding) is refused. `origins` are the pages elsewhere that may ask. Without `keys`
    everyone may.
    """

    hosts: frozenset[str] | None
    origins: frozenset[str] = frozenset()
    keys: tuple[bytes, ...] = ()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_access(
    host: str,
    *,
    api_key_file: str | None,
    no_auth: bool,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> Access:
    """Refuses to be open to others than this machine's unless that is said outright."""
    if api_key_file is not None and no_auth:
        raise UserError(f"api_key_file={api_key_file} asks for a key, no_auth for none; give one of them")
    if not is_loopback(host) and api_key_file is None and not no_auth:
        raise UserError(
            f"host={host} lets other machines in; give --api_key_file FILE with a key that they must know, "
            "or say --no_auth true"
        )
    for origin in origins:
        if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
            raise UserError(f"cors_origin={origin} is no origin; give e.g. https://example.org")
    for name in hosts:
        if "/" in name or "[" in name or name.count(":") == 1:
            raise UserError(f"allowed_host={name} is no name; give it without a port, e.g. model.example.org")
    names = {host, "localhost", "127.0.0.1", "::1", *hosts} if is_loopback(host) or hosts else None
    return Access(
        None if names is None else frozenset(name.lower() for name in names),
        frozenset(origin.lower() for origin in origins),  # as browsers send them
        () if api_key_file is None else _read_keys(api_key_file),
    )


def _read_keys(name: str) -> tuple[bytes, ...]:
    try:
        lines = Path(name).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"api_key_file={name} cannot be read ({error.strerror}); name another") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys or any(len(key) < _LEAST_KEY or not key.isascii() or b" " in key for key in keys):
        raise UserError(
            f"api_key_file={name} holds no key a line, each of at least {_LEAST_KEY} letters and figures; "
            "write one, e.g. by: openssl rand -hex 32"
        )
    return keys


class Guard:
    """Refuses requests before anything of them but the head is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope["path"])
            except Refusal as refusal:
                await JSONResponse(refusal.body, refusal.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "").lower()
        if self._access.hosts is not None and _without_port(host) not in self._access.hosts:
            message = "the Host header names another server; use the address that this one was started with"
            raise Refusal(message, status=403, code="host_not_allowed")
        origin = headers.get("origin")
        known = (f"http://{host}", f"https://{host}", *self._access.origins)
        if origin is not None and origin.lower() not in known and "*" not in self._access.origins:
            message = "pages of this origin may not ask; start the server with --cors_origin"
            raise Refusal(message, status=403, code="origin_not_allowed")
        if self._access.keys and path not in _OPEN and not self._is_known(headers.get("authorization", "")):
            message = "the key is missing or wrong; send Authorization: Bearer KEY"
            raise Refusal(message, status=401, code="invalid_api_key")

    def _is_known(self, authorization: str) -> bool:
        """Compares with every key, in a time that tells nothing of them."""
        scheme, _, given = authorization.partition(" ")
        given_bytes = given.strip().encode("utf-8", "replace")
        found = [hmac.compare_digest(given_bytes, key) for key in self._access.keys]
        return any(found) and scheme.lower() == "bearer"


def _without_port(host: str) -> str:
    if host.startswith("["):  # an address of IPv6
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
