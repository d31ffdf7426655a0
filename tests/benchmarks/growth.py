"""How the time and memory of a training step grow with layers, width, text, vocabulary, batch and all of it.

    python tests/benchmarks/growth.py                                  float32
    python tests/benchmarks/growth.py --precision bf16-mixed

From a base of 4 layers, 256 wide, T 128, V 6282 and batch 4, one factor at a time is doubled; `model` goes
from 2 to 124 million parameters (GPT-2 small). Every point is a `fit` in a process of its own; the points of
a factor take turns, step by step, and medians are shown. Memory is the process's peak above what it had after
the imports. The exponents are least squares of the logarithms over the upper half of the range, where
constants have faded: of time, beside that of the operations by PaLM's count, and of memory, beside that of 16
bytes a parameter (weight, gradient, two moments) and what the graph keeps for the backward pass. Those of
`model` are by parameters. The last line is the result as JSON.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

WARM_UP = 2


@dataclass(frozen=True)
class Point:
    layers: int = 4
    width: int = 256
    T: int = 128
    V: int = 6282
    batch: int = 4


BASE = Point()
FACTORS = {
    "layers": [replace(BASE, layers=n) for n in (2, 4, 8, 16, 32)],
    "width": [replace(BASE, width=n) for n in (64, 128, 256, 512, 1024)],
    "T": [replace(BASE, T=n) for n in (64, 128, 256, 512, 1024)],
    "V": [replace(BASE, V=50257 >> n) for n in (4, 3, 2, 1, 0)],
    "batch": [replace(BASE, batch=n) for n in (1, 2, 4, 8, 16)],
    "model": [Point(n, 64 * n, 128, 50257 * n // 12, 4) for n in (2, 3, 4, 6, 8, 12)],
}


# ---- a point, in its own process


def fit_point(point: Point, options: argparse.Namespace) -> None:
    """Print the seconds of a step for each line read, then what the fit took and what theory says.

    Imports stand here: a process inherits the peak memory of the one that starts it, which stays small so.
    """
    import torch

    from gpt_lightning.data.loader import TokenBatch
    from gpt_lightning.model.config import GPTConfig
    from gpt_lightning.model.flops import training_flops_per_token
    from gpt_lightning.training.module import GPTLightningModule

    torch.set_num_threads(options.threads)
    peak_of_imports = peak_bytes()
    n_heads = point.width // 64
    config = GPTConfig(point.V, point.T, n_layers=point.layers, n_heads=n_heads, d_model=point.width)
    module = GPTLightningModule(config)
    ids = torch.randint(point.V, (point.batch, point.T + 1))
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], None)
    trainer = fit(module, batch, options)
    memory = peak_bytes() - peak_of_imports
    with trainer.strategy.precision_plugin.train_step_context():
        kept = bytes_kept(module, batch)
    result = {
        "parameters": module.n_parameters,
        "flops": training_flops_per_token(config, point.T) * point.T * point.batch,
        "memory": memory,
        "memory_theory": 16 * module.n_parameters + kept,
    }
    print(json.dumps(result), flush=True)


def fit(module: Any, batch: Any, options: argparse.Namespace) -> Any:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from gpt_lightning.cli.errors import quiet

    clock = time.process_time if options.clock == "cpu" else time.perf_counter

    class Turns(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step >= WARM_UP:
                print("ready", flush=True)
                sys.stdin.readline()
            self.begin = clock()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step > WARM_UP:
                print(clock() - self.begin, flush=True)

    quiet()
    steps = WARM_UP + options.rounds
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=options.precision,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns()],
    )
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    return trainer


def bytes_kept(module: Any, batch: Any) -> int:
    """What the graph of a step keeps for its backward pass, beside the parameters."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        module.model(batch.input_ids, batch.targets)
    return sum(size for place, size in kept.items() if place not in own)


def peak_bytes() -> int:
    """By the operating system."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- all points of a factor


def measure(points: list[Point], options: argparse.Namespace) -> list[dict[str, float]]:
    """What each process tells of its point, and the median seconds of a step."""
    with ExitStack() as stack:
        processes = [_start(point, stack) for point in points]
        seconds: list[list[float]] = [[] for _ in points]
        for _ in range(options.rounds):
            for process in processes:  # all of them first: one that gets ready would disturb a step
                _read(process)
            for process, taken in zip(processes, seconds):
                assert process.stdin is not None
                print(file=process.stdin, flush=True)
                taken.append(float(_read(process)))
        results = [json.loads(_read(process)) for process in processes]
    return [{**result, "seconds": statistics.median(taken)} for result, taken in zip(results, seconds)]


def _start(point: Point, stack: ExitStack) -> subprocess.Popen[str]:
    words = [sys.executable, *sys.argv, "--point", json.dumps(asdict(point))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended before its turn; run it alone to see why")
    return line


def exponent(sizes: list[float], values: list[float]) -> float:
    """Least squares of the logarithms over the upper half of the range of sizes."""
    middle = math.sqrt(sizes[0] * sizes[-1])
    pairs = [(math.log(s), math.log(v)) for s, v in zip(sizes, values) if s >= middle * 0.999]
    return statistics.linear_regression(*zip(*pairs)).slope


def exponents(factor: str, points: list[Point], results: list[dict[str, float]]) -> dict[str, float]:
    if factor == "model":
        sizes = [result["parameters"] for result in results]
    else:
        sizes = [float(getattr(point, factor)) for point in points]
    names = {"time": "seconds", "flops": "flops", "memory": "memory", "memory_theory": "memory_theory"}
    columns = {name: [result[key] for result in results] for name, key in names.items()}
    return {f"{name}_exponent": round(exponent(sizes, column), 2) for name, column in columns.items()}


def show(factor: str, points: list[Point], results: list[dict[str, float]], case: dict[str, float]) -> None:
    for point, result in zip(points, results):
        sizes = "  ".join(f"{value:6}" for value in asdict(point).values())
        parameters, gflops = result["parameters"] / 1e6, result["flops"] / 1e9
        time_columns = f"{1e3 * result['seconds']:8.1f} {gflops:8.1f} {gflops / result['seconds']:7.0f}"
        memory = f"{result['memory'] / 2**20:8.0f} {result['memory_theory'] / 2**20:8.0f}"
        print(f"{factor:7} {sizes} {parameters:7.1f} {time_columns} {memory}")
    print(
        f"{factor:7} exponents: time {case['time_exponent']:.2f}, operations {case['flops_exponent']:.2f}; "
        f"memory {case['memory_exponent']:.2f}, theory {case['memory_theory_exponent']:.2f}\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--factors", nargs="+", default=list(FACTORS), choices=list(FACTORS))
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu, on a busy machine")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        fit_point(Point(**json.loads(options.point)), options)
        return
    print("factor  layers   width       T       V   batch   10^6 P  ms/step   GFLOP  GFLOPS     MiB   theory")
    cases = {}
    for factor in options.factors:
        points = FACTORS[factor]
        results = measure(points, options)
        cases[factor] = exponents(factor, points, results)
        show(factor, points, results, cases[factor])
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
