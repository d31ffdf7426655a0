"""What `plan` foretells of a step on this machine, beside what a step is measured to take.

    python tests/benchmarks/plan.py                        all sizes, some eight minutes
    python tests/benchmarks/plan.py --sizes small gpt2     some

Six sizes, each as one process, with activation checkpointing, and as two processes that share the model
(tp 2), the batch (dp 2), or the batch and what they hold (sharded). A case is a short fit in processes of its
own, with clipping and the guard against NaN; memory is the peak of the first process by the operating system,
time the median of its steps. The plan is made before it, by the functions of the verb: it measures for two
seconds. The last line is JSON. The machine has to be quiet: two threads on a busy core wait for each other.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt_lightning.model.config import GPTConfig  # noqa: E402
from gpt_lightning.planning.setup import Setup  # noqa: E402

WARM_UP, SECONDS, FEWEST = 2, 4.0, 4
MODERN: dict[str, Any] = {
    **{"positions": "rope", "norm": "rms", "activation": "swiglu", "qk_norm": True, "bias": False},
}
SIZES = {
    "quickstart": Setup(
        GPTConfig(2048, 128, n_layers=2, n_heads=4, d_model=128, tie_embeddings=False, **MODERN),
        128,
        8,
        on_cpu=True,
    ),
    "small": Setup(GPTConfig(6282, 128, n_layers=4, n_heads=4, d_model=256), 128, 8, on_cpu=True),
    "nanogpt": Setup(
        GPTConfig(8192, 256, n_layers=6, n_heads=6, d_model=384), 256, 12, precision="bf16-mixed", on_cpu=True
    ),
    "vocabulary": Setup(
        GPTConfig(50257, 256, n_layers=6, n_heads=6, n_kv_heads=2, d_model=384, **MODERN), 256, 4, on_cpu=True
    ),
    "long": Setup(
        GPTConfig(16384, 1024, n_layers=8, n_heads=8, d_model=512),
        1024,
        2,
        precision="bf16-mixed",
        on_cpu=True,
    ),
    "gpt2": Setup(GPTConfig(), 512, 2, precision="bf16-mixed", on_cpu=True),
}
CASES: dict[str, dict[str, Any]] = {
    "1": {},
    "checkpointing": {"activation_checkpointing": True},
    "tp 2": {"devices": 2, "tensor_parallel_size": 2},
    "dp 2": {"devices": 2},
    "sharded": {"devices": 2, "shard_replicas": "full"},
}


# ---- a case, in its own process


def run_case(setup: Setup) -> None:
    """Prints the first rank's peak of memory and seconds of a step; Lightning starts the second rank."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from gpt_lightning.callbacks.finite_guard import FiniteGuard
    from gpt_lightning.cli.errors import quiet
    from gpt_lightning.data.loader import TokenBatch
    from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
    from gpt_lightning.training.module import GPTLightningModule
    from gpt_lightning.training.trainer import GPTTrainer

    seconds: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)
            timed = seconds[WARM_UP:]
            enough = sum(timed) > SECONDS and len(timed) >= FEWEST
            if trainer.strategy.reduce_boolean_decision(enough, all=False):
                trainer.should_stop = True

    quiet()
    pl.seed_everything(1, verbose=False)
    base = kibibytes("VmRSS")
    size = setup.tensor_parallel_size
    ours = TensorParallelDDPStrategy(size, setup.shard_replicas)  # type: ignore[arg-type]
    trainer = GPTTrainer(
        accelerator="cpu",
        devices=setup.devices,
        strategy=ours if setup.devices > 1 else "auto",
        precision=setup.precision,
        max_steps=1000,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FiniteGuard(), Clock()],
    )
    with trainer.init_module(empty_init=size > 1):
        module = GPTLightningModule(setup.config, activation_checkpointing=setup.activation_checkpointing)
    ids = torch.randint(setup.config.vocab_size, (setup.batch_size, setup.seq_len + 1))
    batch = TokenBatch(ids[:, :-1], ids[:, 1:])
    trainer.fit(module, DataLoader([batch] * 1000, batch_size=None))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        peak, median = kibibytes("VmHWM"), statistics.median(seconds[WARM_UP:])
        print(json.dumps({"peak": peak * 1024, "base": base * 1024, "step": median}), flush=True)


def kibibytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def foretell(setup: Setup) -> None:
    import lightning.pytorch  # noqa: F401  # which a process of `plan` has, too
    import torch

    from gpt_lightning.planning.devices import this_device
    from gpt_lightning.planning.memory import memory_of
    from gpt_lightning.planning.probe import probe
    from gpt_lightning.planning.speed import speed_of

    begin = time.perf_counter()
    measured = probe(setup, torch.device("cpu"))
    took = time.perf_counter() - begin
    speed = speed_of(setup, this_device(setup), measured)
    memory = memory_of(setup).as_dict()
    print(json.dumps({"memory": memory, "step": speed.step, "exposed": speed.exposed, "probe": took}))


# ---- all cases


def measured(setup: Setup, what: str) -> dict[str, Any]:
    words = [sys.executable, __file__, what, json.dumps(asdict(setup))]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(words, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def setup_from(text: str) -> Setup:
    options = json.loads(text)
    return Setup(**{**options, "config": GPTConfig(**options["config"])})


def row(size: str, case: str) -> dict[str, Any]:
    setup = replace(SIZES[size], **CASES[case])
    plan, fit = measured(setup, "--foretell"), measured(setup, "--case")
    found = {
        "peak": [plan["memory"]["peak"], fit["peak"]],
        "step": [plan["step"], fit["step"]],
        "base": fit["base"],
        "memory": plan["memory"],
        "exposed": plan["exposed"],
        "probe": plan["probe"],
    }
    memory, step = (found[name][0] / found[name][1] - 1 for name in ("peak", "step"))
    mib = [n_bytes / 2**20 for n_bytes in found["peak"]]
    print(
        f"{size:12}{case:14}{mib[0]:9,.0f}{mib[1]:9,.0f} {memory:+6.0%}"
        f"{1e3 * plan['step']:10,.1f}{1e3 * fit['step']:10,.1f} {step:+6.0%}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    for name in ("--case", "--foretell"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(setup_from(options.case))
    elif options.foretell:
        foretell(setup_from(options.foretell))
    else:
        print(f"{'':26}{'MiB: plan':>9}{'fit':>9}       {'ms: plan':>10}{'fit':>10}")
        found = {size: {case: row(size, case) for case in options.cases} for size in options.sizes}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
