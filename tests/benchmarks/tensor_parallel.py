"""What tensor parallelism costs a step, and what it saves a rank. Two processes on this machine's CPU.

    python tests/benchmarks/tensor_parallel.py [--repeats 5] [--steps 20]

Time: against plain DDP at the same work per rank (DDP: the whole model on half of the batch; tensor parallel:
half of the model on the whole batch), interleaved repeats, medians. Memory: counted, for the whole batch on
one replica. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt_lightning.data.datamodule import TextDataModule  # noqa: E402
from gpt_lightning.model.config import GPTConfig  # noqa: E402
from gpt_lightning.parallel.replicas import check_replicas  # noqa: E402
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy  # noqa: E402
from gpt_lightning.training.module import GPTLightningModule  # noqa: E402
from tests.distributed import run_ranks  # noqa: E402
from tests.parallel.runs import kept_bytes  # noqa: E402

GLOBAL_BATCH, SEQ_LEN = 4, 256
UNCHECKED = {"tensor_parallel_size": 2, "replica_check_every_n_steps": 0}
CASES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "tp": lambda: TensorParallelDDPStrategy(**UNCHECKED),
    "tp + sequence": lambda: TensorParallelDDPStrategy(**UNCHECKED, sequence_parallel=True),
}


class Clock(pl.Callback):
    """Wall and CPU seconds of each step after the first few."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def measure(make_strategy: Callable[[], Any], folder: Path, steps: int) -> dict[str, float]:
    """In a rank: one short fit."""
    strategy = make_strategy()
    data_parallel = 2 if strategy == "ddp" else 1
    datamodule = TextDataModule(
        train_files="python:docs",
        tokenizer="bpe:1024",
        seq_len=SEQ_LEN,
        batch_size=GLOBAL_BATCH // data_parallel,
        cache_dir=str(folder),
    )
    pl.seed_everything(1, verbose=False)
    sizes = {"n_layers": 4, "n_heads": 8, "d_model": 256}
    module = GPTLightningModule(GPTConfig(datamodule.vocab_size, SEQ_LEN, **sizes))
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=steps + 3,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule)
    result = {
        "ms": 1e3 * statistics.median(clock.wall[3:]),
        "cpu_ms": 1e3 * statistics.median(clock.cpu[3:]),
        "loss": float(trainer.callback_metrics.get("train/loss", torch.nan)),
        "parameter_mib": sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20,
        "activation_mib": kept_bytes(module, torch.zeros(GLOBAL_BATCH, SEQ_LEN, dtype=torch.long)) / 2**20,
    }
    if strategy != "ddp":
        start = time.perf_counter()
        for _ in range(10):
            check_replicas(module, trainer.strategy.mesh, "here")
        result["check_ms"] = 1e2 * (time.perf_counter() - start)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(measure, 2, CASES["ddp"], Path(folder), 1)  # fills the token cache
        for _ in range(options.repeats):
            for name, make_strategy in CASES.items():
                results[name].append(run_ranks(measure, 2, make_strategy, Path(folder), options.steps)[0])
    summary = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in results.items()
    }
    columns = ["ms", "cpu_ms", "check_ms", "parameter_mib", "activation_mib"]
    print(f"{'':16}" + "".join(f"{column:>16}" for column in columns))
    for name, row in summary.items():
        print(f"{name:16}" + "".join(f"{row.get(column, float('nan')):16.1f}" for column in columns))
    ddp = summary["ddp"]
    ratios = {
        name: {
            "vs_ddp": round(row["ms"] / ddp["ms"], 3),
            "cpu_vs_ddp": round(row["cpu_ms"] / ddp["cpu_ms"], 3),
            "check_share": round(row["check_ms"] / row["ms"], 4),
        }
        for name, row in summary.items()
        if name != "ddp"
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
