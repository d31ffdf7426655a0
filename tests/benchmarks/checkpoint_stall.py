"""How long training stands still for a checkpoint: in the background, synchronously, as Lightning does it.

    python tests/benchmarks/checkpoint_stall.py                    GPT-2 small with its AdamW moments: 1.5 GB
    python tests/benchmarks/checkpoint_stall.py --params 10000000  a small one

All three save the same state with the same callback; the ways take turns, and the medians are shown.
Lightning does not flush to disk. The last line is the result as JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from torch.utils.data import DataLoader

from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.checkpoint.io import DurableCheckpointIO

TENSORS = 148  # as GPT-2 small has


class Weights(pl.LightningModule):
    """Parameters to save; there is nothing to learn."""

    def __init__(self, params: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(params // TENSORS) for _ in range(TENSORS))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return sum(weight[0] for weight in self.weights)  # type: ignore[return-value]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def attached_trainer(params: int, folder: str) -> tuple[pl.Trainer, RunCheckpoint]:
    """After a step, so that the optimizer has its moments."""
    callback = RunCheckpoint(dirpath=folder, save_top_k=0, save_last=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Weights(params), DataLoader(torch.ones(1, 1)))
    callback.save_last = True
    return trainer, callback


def stall_seconds(
    trainer: pl.Trainer, callback: RunCheckpoint, plugin: CheckpointIO, background: bool
) -> float:
    trainer.strategy.checkpoint_io = plugin
    callback._writer = plugin if isinstance(plugin, DurableCheckpointIO) else None
    callback._background, callback._saved_step = background, 0
    start = time.perf_counter()
    callback._save(trainer, judge=False)
    stall = time.perf_counter() - start
    if isinstance(plugin, DurableCheckpointIO):
        plugin.finish()
    return stall


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of the file.")
    parser.add_argument("--params", type=int, default=124_439_808)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="On the disk to measure; a temporary one by default.")
    options = parser.parse_args()
    durable, lightning = DurableCheckpointIO(), TorchCheckpointIO()
    ways = {"background": (durable, True), "synchronous": (durable, False), "lightning": (lightning, False)}
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer, callback = attached_trainer(options.params, folder)
        first = stall_seconds(trainer, callback, *ways["background"])
        for _ in range(options.repeats):
            for name, way in ways.items():
                stalls[name].append(stall_seconds(trainer, callback, *way))
        gigabytes = (Path(folder) / "last.ckpt").stat().st_size / 1e9
    medians = {name: statistics.median(values) for name, values in stalls.items()}
    print(f"{gigabytes:.2f} GB, {options.repeats} saves each")
    for name, median in medians.items():
        print(f"{name:12} {median:8.3f} s   {min(stalls[name]):.3f} to {max(stalls[name]):.3f} s")
    print(f"the first in the background, into fresh memory: {first:.3f} s")
    rounded = {f"{name}_seconds": round(median, 4) for name, median in medians.items()}
    result = {"params": options.params, "gigabytes": round(gigabytes, 3), **rounded}
    print(json.dumps({**result, "first_background_seconds": round(first, 4), "repeats": options.repeats}))


if __name__ == "__main__":
    main()
