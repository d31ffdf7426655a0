"""Clients of all bad kinds at once, a full disk for the log, and many requests: nothing hangs or grows."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from gpt_lightning.kernels.choose import PIN  # noqa: E402
from tests.cli.test_generate import write_checkpoint  # noqa: E402
from tests.server.test_refusals import BAD, content_of  # noqa: E402

pytestmark = pytest.mark.faults
N_REQUESTS = int(os.environ.get("SERVE_REQUESTS", "1000"))  # 5000 for the figure of docs/serving.md
LIMITS = "max_body_bytes=20000 max_prompt_tokens=500 max_tokens=64 max_logprobs=1000 max_queue=10".split()


@contextmanager
def program(folder: Path, *words: str, log: Any = subprocess.PIPE) -> Iterator[tuple[Any, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ("--port", str(port), "--device", "cpu", *words)
    command = [sys.executable, "-m", "gpt_lightning", "serve", *words]
    # oneDNN's products keep what they have made for each shape, until their cache of those is full.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", PIN: "linear,quantized"}
    process = subprocess.Popen(command, cwd=folder, stderr=log, text=True, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.ConnectError:
                threading.Event().wait(0.1)
        yield process, address
    finally:
        process.kill()
        process.communicate()


def memory(process: Any) -> float:
    """Resident MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def gauges(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def leave_in_the_middle(address: str, number: int) -> None:
    """A client that is killed after its request, or after some of the answer."""
    fields = {"max_tokens": 64, "stream": number % 2 == 0, "n": 1 + number % 3, "logit_bias": {"0": -100}}
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as opened:
        opened.sendall(head + body if number % 5 else (head + body)[: 20 + number])
        if number % 4 == 0 and number % 5:
            opened.recv(10)


def test_bad_clients_leave_nothing_behind(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    limits = [word for limit in LIMITS for word in f"--limits.{limit}".split("=")]
    with program(tmp_path, *limits, "--limits.header_seconds", "5") as (process, address):
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        silent = [socket.create_connection(place) for _ in range(1000)]
        expected = httpx.post(f"{address}/v1/completions", json={"temperature": 0, "max_tokens": 20}).json()
        kinds = [*BAD.values()]

        def bad(number: int) -> tuple[int, int]:
            body, status, _ = kinds[number % len(kinds)]
            answer = httpx.post(f"{address}/v1/completions", content=content_of(body), timeout=60)
            return status, answer.status_code

        with ThreadPoolExecutor(16) as clients:
            answers = clients.map(bad, range(200))
            gone = [clients.submit(leave_in_the_middle, address, number) for number in range(100)]
            for left in gone:
                left.result()
            # Those that are right may find the queue full, and what asks for more than it ever has does.
            assert all(found in (status, 429) and found < 500 for status, found in answers)
        deadline = time.monotonic() + 30
        while any(gauges(address)[f"gpt_lightning_{name}"] for name in ("rows_in_use", "queue")):
            assert time.monotonic() < deadline
        again = httpx.post(f"{address}/v1/completions", json={"temperature": 0, "max_tokens": 20}).json()
        assert again["choices"] == expected["choices"]
        for each in silent:
            each.close()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and "Traceback" not in said and len(said.splitlines()) < 5, said


def test_many_requests_take_no_more_memory_while_the_log_has_no_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    with open("/dev/full", "w") as full, program(tmp_path, log=full) as (process, address):

        def ask(number: int) -> None:
            fields: dict[str, Any] = {"prompt": "The cat " * (number % 9), "max_tokens": 1 + number % 17}
            fields |= {"temperature": number % 3 / 2, "logprobs": number % 4, "stream": number % 2 == 0}
            with client.stream("POST", f"{address}/v1/completions", json=fields, timeout=120) as answer:
                assert answer.status_code == 200 and len(answer.read()) > 50

        client = httpx.Client(limits=httpx.Limits(max_connections=None))  # for all threads
        with ThreadPoolExecutor(32) as clients:
            list(clients.map(ask, range(N_REQUESTS // 4)))
            before = memory(process)
            list(clients.map(ask, range(N_REQUESTS)))
        after = memory(process)
        print(f"MiB after {N_REQUESTS // 4} requests {before:.1f}, after {N_REQUESTS} more {after:.1f}")
        assert after - before < 8
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
