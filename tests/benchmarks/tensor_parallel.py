"""What tensor parallelism and shared replicas cost a step, and save a rank. Processes on this machine's CPU.

    python tests/benchmarks/tensor_parallel.py [--repeats 5] [--steps 20] [--only "ddp 2" "full 2"]

Time: against plain DDP on as many ranks at the same work per rank (of the whole batch a rank computes the
1/ranks-th part, by whole samples or by parts of the model), interleaved repeats, medians. Memory: counted;
activations for the whole batch on one replica. Messages: counted in one step, as a ring sends them. The last
line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpt_lightning.data.datamodule import TextDataModule  # noqa: E402
from gpt_lightning.model.config import GPTConfig  # noqa: E402
from gpt_lightning.parallel.replicas import check_replicas  # noqa: E402
from gpt_lightning.parallel.sharded_replicas import local  # noqa: E402
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy  # noqa: E402
from gpt_lightning.training.module import GPTLightningModule  # noqa: E402
from tests.distributed import run_ranks  # noqa: E402
from tests.parallel.runs import kept_bytes  # noqa: E402

GLOBAL_BATCH, SEQ_LEN = 4, 256


class Case(NamedTuple):
    ranks: int
    options: dict[str, Any] | None = None  # of the strategy; None is Lightning's own DDP

    @property
    def replicas(self) -> int:
        return self.ranks // (self.options or {}).get("tensor_parallel_size", 1)


TP = {"tensor_parallel_size": 2}
CASES = {
    "ddp 2": Case(2),
    "tp 2": Case(2, TP),
    "tp 2 + sequence": Case(2, {**TP, "sequence_parallel": True}),
    "optimizer 2": Case(2, {"shard_replicas": "optimizer"}),
    "full 2": Case(2, {"shard_replicas": "full"}),
    "ddp 4": Case(4),
    "optimizer 4": Case(4, {"shard_replicas": "optimizer"}),
    "full 4": Case(4, {"shard_replicas": "full"}),
    "tp 2 x dp 2": Case(4, TP),
    "tp 2 x full 2": Case(4, {**TP, "shard_replicas": "full"}),
}
# Of each collective the argument that holds all of what is moved, and the share of it that a ring sends.
SENT = {"allreduce_": (0, 2), "_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1)}


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends by a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in SENT:
            argument, times = SENT[name]
            moved = args[argument] if isinstance(args[argument], list) else [args[argument]]
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            n = dist.ProcessGroup.unbox(group).size()
            self.sent += times * (n - 1) / n * sum(tensor.nbytes for tensor in moved)
        return func(*args, **(kwargs or {}))


class Clock(pl.Callback):
    """Wall and CPU seconds of each step after the first few; in the second, what is sent and held."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.traffic = Traffic()
        self.held = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.traffic.__enter__()
        self._start = time.perf_counter(), time.process_time()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        moments = [value for entry in optimizer.state.values() for value in entry.values()]
        tensors = [*module.parameters(), *(p.grad for p in module.parameters()), *moments]
        self.held = sum(local(tensor).nbytes for tensor in tensors)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])
        if trainer.global_step == 2:
            self.traffic.__exit__(None, None, None)


def measure(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """In a rank: one short fit."""
    strategy: Any = "ddp"
    if case.options is not None:
        strategy = TensorParallelDDPStrategy(replica_check_every_n_steps=0, **case.options)
    datamodule = TextDataModule(
        train_files="python:docs",
        tokenizer="bpe:1024",
        seq_len=SEQ_LEN,
        batch_size=GLOBAL_BATCH // case.replicas,
        cache_dir=str(folder),
    )
    pl.seed_everything(1, verbose=False)
    sizes = {"n_layers": 4, "n_heads": 8, "d_model": 256}
    module = GPTLightningModule(GPTConfig(datamodule.vocab_size, SEQ_LEN, **sizes))
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=case.ranks,
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
        "held_mib": clock.held / 2**20,
        "sent_mib": clock.traffic.sent / 2**20,
    }
    if case.options is None or "shard_replicas" not in case.options:
        ids = torch.zeros(GLOBAL_BATCH, SEQ_LEN, dtype=torch.long)
        result["activation_mib"] = kept_bytes(module, ids) / 2**20
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
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(measure, 2, CASES["ddp 2"], Path(folder), 1)  # fills the token cache
        for _ in range(options.repeats):
            for name, rows in results.items():
                case = CASES[name]
                rows.append(run_ranks(measure, case.ranks, case, Path(folder), options.steps)[0])
    summary = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in results.items()
    }
    columns = ["ms", "cpu_ms", "check_ms", "held_mib", "sent_mib", "activation_mib"]
    print(f"{'':16}" + "".join(f"{column:>16}" for column in columns))
    for name, row in summary.items():
        print(f"{name:16}" + "".join(f"{row.get(column, float('nan')):16.3f}" for column in columns))
    ratios = {}
    for name, row in summary.items():
        if (ddp := summary.get(f"ddp {CASES[name].ranks}")) is not None and ddp is not row:
            both = {"vs_ddp": row["ms"] / ddp["ms"], "cpu_vs_ddp": row["cpu_ms"] / ddp["cpu_ms"]}
            ratios[name] = {**both, "check_share": row["check_ms"] / row["ms"]}
    rounded = {name: {key: round(value, 4) for key, value in row.items()} for name, row in ratios.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
