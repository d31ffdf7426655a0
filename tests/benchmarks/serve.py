"""Loads `serve` with many clients, beside the Engine alone and transformers' server on the same weights.

    python tests/benchmarks/serve.py --ckpt_path checkpoints/quickstart/last.ckpt [--exported FOLDER]
    pip install fastapi opentelemetry-api                            what `transformers serve` needs

Prints for each number of clients tokens a second, and the milliseconds to the first token and between tokens
(half of them, and 99 in 100, take at most so long). Every client sends requests of its own lengths, one after
the other, and reads the streams. `--exported` is the folder that `export-hf` made of the checkpoint, and
`--theirs` the options of transformers' server, which never asks the hub.
"""

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gpt_lightning.checkpoint import load_model
from gpt_lightning.generation.engine import Engine
from gpt_lightning.generation.rows import Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.packed_linear import packed

WORDS = "the return value of a list that holds each name and an object which is called with it".split()


class Job(NamedTuple):
    """Is a prompt, and how many tokens shall follow it."""

    prompt: str
    n_new: int


class Times(NamedTuple):
    """Holds how many tokens came, and when each piece of the stream did, from the request on."""

    n_tokens: int
    seconds: list[float]


def make_jobs(n_jobs: int, longest: int) -> list[Job]:
    """Mixes prompts of 4 to `longest` words with completions of a quarter of that up to all of it."""
    draw = random.Random(0)
    words = (" ".join(draw.choices(WORDS, k=draw.randint(4, longest))) for _ in range(n_jobs))
    return [Job(prompt, draw.randint(longest // 4, longest)) for prompt in words]


def ask(port: int, model: str, job: Job) -> Times:
    """Sends one request and reads its stream to the end."""
    body = {"model": model, "prompt": job.prompt, "max_tokens": job.n_new, "stream": True, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, seconds, n_tokens = time.perf_counter(), [], 0
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({**body, "stream_options": {"include_usage": True}}),
        {"Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read(500)!r}")
    for line in answer:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if any(choice.get("text") for choice in chunk.get("choices", [])):
                seconds.append(time.perf_counter() - start)
            n_tokens = (chunk.get("usage") or {}).get("completion_tokens") or n_tokens
    connection.close()
    return Times(n_tokens or len(seconds), seconds)


def load(port: int, model: str, jobs: list[Job], n_clients: int) -> str:
    """Has so many clients send the jobs, and describes how it went."""
    start = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as clients:
        times = list(clients.map(lambda job: ask(port, model, job), jobs))
    rate = sum(each.n_tokens for each in times) / (time.perf_counter() - start)
    firsts = [each.seconds[0] for each in times if each.seconds]
    between = [later - before for each in times for before, later in zip(each.seconds, each.seconds[1:])]
    return f"{rate:8.0f} | {_half_and_most(firsts)} | {_half_and_most(between)}"


def _half_and_most(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [0.0]
    most = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1e3 * statistics.median(ordered):6.0f} / {1e3 * most:6.0f}"


@contextmanager
def server(words: list[str], path: str) -> Iterator[int]:
    """Runs a server until the end, once it answers at `path`; `{port}` in its words is a free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([word.format(port=port) for word in words], env=environment, **quiet)
    try:
        deadline = time.monotonic() + 120
        while not _answers(port, path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{words[0]} does not serve")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(port: int, path: str) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except OSError:
        return False


def engine_rate(checkpoint: Path, jobs: list[Job], n_rows: int) -> float:
    """Tokens a second of the Engine alone, as `predict` has it, with all jobs known beforehand."""
    whole, tokenizer = load_model(checkpoint)
    settings = GenerationConfig(do_sample=False)
    model = packed(whole, quantize=None, n_rows=n_rows)
    of_jobs = [replace(settings, max_new_tokens=job.n_new) for job in jobs]
    prompts = [tokenizer.encode(job.prompt) for job in jobs]
    requests = [Request(prompt, settings=each) for prompt, each in zip(prompts, of_jobs)]
    engine = Engine(model, settings, eos_token_id=tokenizer.eos_token_ids, batch_size=n_rows)
    warm_up = replace(settings, max_new_tokens=4)
    engine.complete([Request(prompt, settings=warm_up) for prompt in prompts[:n_rows]])
    start = time.perf_counter()
    n_tokens = sum(len(completion.token_ids) for completion in engine.complete(requests))
    return n_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", type=Path, required=True)
    parser.add_argument("--exported", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=64, help="words of a prompt, tokens of a completion")
    parser.add_argument("--jobs", type=int, default=2, help="of each client")
    parser.add_argument("--theirs", default="--continuous-batching --dtype float32", help="as one word")
    options: Any = parser.parse_args()
    name = "benchmark"
    ours = [sys.executable, "-m", "gpt_lightning", "serve", "--port", "{port}", "--name", name]
    ours += ["--ckpt_path", str(options.ckpt_path), "--rows", str(options.rows)]
    script = str(Path(sys.executable).with_name("transformers"))
    theirs = [script, "serve", "--port", "{port}", "--device", "cpu", *options.theirs.split()]
    print("server, clients | tokens/s | first token, ms: half / 99% | between tokens, ms: half / 99%")
    for n_clients in options.clients:
        jobs = make_jobs(options.jobs * n_clients, options.longest)
        rate = engine_rate(options.ckpt_path, jobs, min(n_clients, options.rows))
        print(f"engine alone, {n_clients:3d} rows wanted | {rate:8.0f}", flush=True)
    for words, path, model in ((ours, "/health", name), (theirs, "/health", str(options.exported))):
        if words is theirs and options.exported is None:
            continue
        with server(words, path) as port:
            ask(port, model, Job("The", 4))  # which loads what is not loaded yet
            for n_clients in options.clients:
                jobs = make_jobs(options.jobs * n_clients, options.longest)
                who = "ours" if words is ours else "transformers"
                load(port, model, jobs[: min(n_clients, options.rows)], n_clients)
                print(f"{who}, {n_clients:3d} | {load(port, model, jobs, n_clients)}", flush=True)


if __name__ == "__main__":
    main()
