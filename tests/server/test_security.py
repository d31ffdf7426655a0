"""Who is let in, and what a connection may take of the server."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from gpt_lightning.exit_codes import UserError  # noqa: E402
from gpt_lightning.generation.sampling import GenerationConfig  # noqa: E402
from gpt_lightning.server.limits import Limits  # noqa: E402
from gpt_lightning.server.metrics import Metrics  # noqa: E402
from gpt_lightning.server.security import is_loopback, make_access  # noqa: E402
from gpt_lightning.server.serving import _listen, open_socket  # noqa: E402
from tests.server.in_process import serving, small_served  # noqa: E402

KEY = "a-key-of-some-length"
LIMITS = Limits(header_seconds=0.3, idle_seconds=0.5, max_connections=20)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(scope="module")
def address(metrics: Metrics) -> Iterator[str]:
    with serving([small_served(limits=LIMITS, metrics=metrics)], limits=LIMITS, metrics=metrics) as found:
        yield found


def connected(address: str, data: bytes = b"") -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=10)
    opened.sendall(data)
    return opened


def test_a_page_of_another_name_cannot_ask(address: str) -> None:
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("127.0.0.1", 200), ("", 403)):
        assert httpx.get(f"{address}/v1/models", headers={"host": host}).status_code == status
    own = address.removeprefix("http://")
    for origin, status in (("http://evil.example", 403), ("null", 403), (f"http://{own}", 200)):
        answer = httpx.post(f"{address}/v1/completions", json={"max_tokens": 1}, headers={"origin": origin})
        assert answer.status_code == status and "access-control-allow-origin" not in answer.headers


def test_a_key_is_asked_for_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"another-key-of-some-length\n{KEY}\n")
    access = make_access("127.0.0.1", api_key_file=str(path), no_auth=False, origins=["https://page.example"])
    with serving([small_served()], access=access) as address:
        for header, status in (
            (f"Bearer {KEY}", 200),
            ("Bearer another-key-of-some-length", 200),
            (f"Bearer {KEY}x", 401),
            (KEY, 401),
            ("Bearer \xff", 401),
            (None, 401),
        ):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            for path_ in ("/v1/models", "/metrics"):
                assert httpx.get(address + path_, headers=headers).status_code == status, header
        assert httpx.post(f"{address}/v1/completions", json={}).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(address).status_code == httpx.get(f"{address}/health").status_code == 200
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{address}/v1/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"


def test_only_who_says_so_lets_other_machines_in(tmp_path: Path) -> None:
    options: dict[str, Any] = {"api_key_file": None, "no_auth": False}
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match=r"--api_key_file"):
            make_access(host, **options)
        assert make_access(host, **{**options, "no_auth": True}).hosts is None
    assert is_loopback("127.0.0.2") and is_loopback("::1") and make_access("localhost", **options).hosts
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "empty").write_text("\n")
    for name in ("short", "empty", "none"):
        with pytest.raises(UserError, match="api_key_file="):
            make_access("0.0.0.0", api_key_file=str(tmp_path / name), no_auth=False)


def test_an_origin_and_a_host_are_known_however_they_are_written() -> None:
    options: dict[str, Any] = {"api_key_file": None, "no_auth": False}
    access = make_access("127.0.0.1", **options, origins=["https://Page.example"], hosts=["Model.example"])
    with serving([small_served()], access=access) as address:
        headers = {"origin": "https://page.example", "host": "model.example:8080"}
        answer = httpx.get(f"{address}/v1/models", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    for name in ("model.example:8080", "http://model.example", "[::1]"):  # which no Host header would match
        with pytest.raises(UserError, match=r"allowed_host=.* is no name"):
            make_access("127.0.0.1", **options, hosts=[name])


def test_a_silent_connection_is_closed_and_one_that_dribbles_too(address: str) -> None:
    start = time.monotonic()
    body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    for data in (b"", b"GET / HT", body):
        with closing(connected(address, data)) as opened:
            try:
                found = opened.recv(1000)
            except ConnectionResetError:
                found = b""
            assert found == b"" or b" 408 " in found
    assert time.monotonic() - start < 5


def test_the_body_of_a_refused_request_is_not_taken_for_ever(address: str) -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"
    with closing(connected(address, head)) as opened:
        ended = time.monotonic() + 5
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < ended:
                opened.sendall(b"x")
                threading.Event().wait(0.05)


def test_connections_that_say_nothing_make_room(address: str, metrics: Metrics) -> None:
    silent = [connected(address) for _ in range(60)]
    for _ in range(5):
        assert httpx.get(f"{address}/health").status_code == 200
        assert metrics.connections <= LIMITS.max_connections
    for opened in silent:
        opened.close()


def test_a_port_that_another_program_took_meanwhile_is_refused() -> None:
    first = open_socket("127.0.0.1", 0)
    second = open_socket("127.0.0.1", first.getsockname()[1])  # neither listens yet
    with closing(first), closing(second):
        _listen(first)
        with pytest.raises(UserError, match=r"port=\d+ cannot be used"):
            _listen(second)


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_cut_off_and_holds_no_row(metrics: Metrics) -> None:
    limits = Limits(reader_seconds=0.3, idle_seconds=60.0, max_tokens=4096)
    settings = GenerationConfig(temperature=0.0, max_new_tokens=16)
    served = small_served(limits=limits, metrics=metrics, settings=settings)
    with serving([served], limits=limits, metrics=metrics) as address:
        body = b'{"stream": true, "logprobs": 20, "max_tokens": 700, "logit_bias": {"0": -100}}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        opened.sendall(head + body)
        answer = httpx.post(f"{address}/v1/completions", json={"max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        ended = time.monotonic() + 30
        while metrics.connections > 0 or sum(metrics.rows.values()) > 0:
            assert time.monotonic() < ended
            threading.Event().wait(0.05)
        with closing(opened):
            assert b"[DONE]" not in b"".join(iter(lambda: opened.recv(2**20), b""))
