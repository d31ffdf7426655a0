"""Tokens a second of training on a CPU, beside nanoGPT, transformers, litgpt and the processor's limit.

    python tests/benchmarks/train.py                     ours and transformers, litgpt if it is installed
    python tests/benchmarks/train.py --nanogpt PATH      also nanoGPT, from a checkout

Ours is the program's own `fit`, with logging, TensorBoard, throughput and guards as always; the others are
their models in the loop that nanoGPT has too: forward, backward, clipping, AdamW. All read the same text,
byte by byte. Each contender has a process of its own; they take turns, whose first step is not timed, and
medians are shown. The limit is the best rate of large bfloat16 products in the same rounds, and a
contender's share of it counts what its model needs (training/flops.py), not what it computes. Peak memory
is the operating system's, of the whole process. First each contender has to learn: the loss must fall. The
last line is the result as JSON.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from machine import Watch, describe
from train_contenders import CASES, CLOCKS, Case, serve

from gpt_lightning.model.flops import training_flops_per_token

LEARNS_BY = 0.5  # nats, in the first steps


def matmul_rate(clock: Callable[[], float]) -> float:
    """Operations a second of large bfloat16 products, the best of five."""
    matrix = torch.randn(2048, 2048).bfloat16()
    seconds = []
    for _ in range(5):
        begin = clock()
        torch.nn.functional.linear(matrix, matrix)
        seconds.append(clock() - begin)
    return 2 * 2048**3 / min(seconds)


def measure(title: str, options: argparse.Namespace) -> dict[str, float]:
    case = CASES[title]
    context = get_context("spawn")
    contenders: dict[str, Connection] = {}
    processes = []
    for name in options.names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, case, options), daemon=True)
        process.start()
        theirs.close()  # else the end of a process that is killed would not be noticed
        processes.append(process)
        learned = take_turn(ours, options.learn)  # one after the other: not beside another's measurement
        if learned is not None and learned[0][-1] < learned[0][0] - LEARNS_BY:
            contenders[name] = ours
        else:
            print(f"{title:12} {name:22} {'failed' if learned is None else 'does not learn'}: left out")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, float] = {}
    rate = 0.0
    watch = Watch(options.threads)
    for _ in range(options.rounds):
        watch.look()
        rate = max(rate, matmul_rate(CLOCKS[options.clock]))
        for name, connection in contenders.items():
            if (turn := take_turn(connection, 1 + case.steps)) is not None:
                _, took, peaks[name] = turn
                seconds[name].append(took)
    for process in processes:
        process.kill()
    whole = {name: values for name, values in seconds.items() if len(values) == options.rounds}
    medians = {name: statistics.median(values) for name, values in whole.items()}
    found = report(title, case, medians, peaks, rate)
    return found if options.clock == "cpu" or watch.was_quiet else {}


def take_turn(connection: Connection, steps: int) -> tuple[list[float], float, float] | None:
    """Losses, seconds a step, peak memory; None of a contender that failed."""
    try:
        connection.send(steps)
        told: tuple[list[float], float, float] | None = connection.recv()
        return told
    except (EOFError, OSError):
        return None


def report(
    title: str, case: Case, medians: dict[str, float], peaks: dict[str, float], rate: float
) -> dict[str, float]:
    """A line each contender, and the ratios of ours."""
    tokens = case.batch_size * case.seq_len
    needed = training_flops_per_token(case.config, case.seq_len) * tokens
    shares = {name: needed / median / rate for name, median in medians.items()}
    for name, median in medians.items():
        print(
            f"{title:12} {name:22} {tokens / median:8,.0f} tokens/s {1e3 * median:8,.0f} ms a step "
            f"{shares[name]:6.1%} of {rate / 1e9:,.0f} GFLOPS {peaks[name]:7,.0f} MiB"
        )
    best, plain = "ours bfloat16", "ours float32"
    if best not in medians or plain not in medians:
        return {}
    found: dict[str, float] = {"share_of_limit": shares[best]}
    for peer in ("nanoGPT", "transformers", "litgpt"):
        for precision, ending in (("float32", ""), ("bfloat16", "_bfloat16")):
            if f"{peer} {precision}" in medians:
                key = f"vs_{peer.lower()}{ending}"
                found[key] = medians[f"{peer} {precision}"] / medians[best]
                if precision == "float32":
                    found[f"float32_vs_{peer.lower()}"] = medians[f"{peer} {precision}"] / medians[plain]
                found[f"memory_{key}"] = peaks[best] / peaks[f"{peer} {precision}"]
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--learn", type=int, default=8, help="steps in which the loss has to fall")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of busy machines")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES)[:3])
    parser.add_argument("--text", help="a text file; by default Python's own documentation")
    parser.add_argument("--nanogpt", help="path of a checkout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = ["transformers"]
    peers += ["nanoGPT"] if options.nanogpt else []
    peers += ["litgpt"] if importlib.util.find_spec("litgpt") else []
    options.names = [f"{who} {dtype}" for who in [*peers, "ours"] for dtype in ("float32", "bfloat16")]
    describe(options.threads, ["transformers", "lightning", "litgpt"])
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        options.text = str(Path(options.text).resolve() if options.text else write_text(Path(folder)))
        print(json.dumps({title: measure(title, options) for title in options.case}))


def write_text(folder: Path) -> Path:
    from pydoc_data.topics import topics

    path = folder / "text.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
