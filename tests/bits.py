"""Writes down, for five short runs, every step's loss, the samples it saw, and the hash of the final weights.

python -m tests.bits FOLDER_OF_TEXTS > bits.json   (the folder holds luxun/luxun.jsonl)
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

OUT = "GPT_LIGHTNING_BITS"
LUXUN = (
    *("--config", "configs/luxun.yaml", "--data.seq_len", "128", "--data.batch_size", "8"),
    *("--model.config.max_position_embeddings", "128", "--model.config.n_layers", "2"),
    *("--model.config.n_heads", "4", "--model.config.d_model", "128"),
    *("--trainer.max_steps", "30", "--trainer.val_check_interval", "30", "--data.tokenizer", "bpe:2048"),
)
LENGTH = ("--trainer.max_steps", "30", "--trainer.val_check_interval", "30")
QUICKSTART = ("--config", "configs/quickstart.yaml", *LENGTH)
STRATEGY = "--trainer.strategy"
RUNS: dict[str, tuple[str, ...]] = {
    "quickstart": QUICKSTART,
    "luxun": LUXUN,
    "accumulation": (*QUICKSTART, "--trainer.accumulate_grad_batches", "4"),
    "tp2dp2": (
        *QUICKSTART,
        *("--trainer.devices", "4", STRATEGY, "gpt_lightning.TensorParallelDDPStrategy"),
        *(f"{STRATEGY}.tensor_parallel_size", "2"),
    ),
    "bf16": (*QUICKSTART, "--trainer.precision", "bf16-mixed"),
}


class Bits(Callback):
    """Collects what every optimizer step logs and reads, on every rank."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.samples: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(batch.sample_ids.tolist())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            Path(os.environ[OUT]).write_text(json.dumps({"losses": self.losses, "samples": self.samples}))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Called before each step's backward pass: the loss logged by the step before."""
        self._note(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        if trainer.global_step > len(self.losses) and "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]).hex())


def run(words: tuple[str, ...], texts: Path, cache: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bits.json"
        luxun = ["--data.train_files", str(texts / "luxun" / "luxun.jsonl")]
        data = luxun if "configs/luxun.yaml" in words else []
        own = ["--allow_import", "tests", "--trainer.callbacks+=tests.bits.Bits"]
        own += ["--trainer.log_every_n_steps", "1"]
        own += ["--trainer.default_root_dir", folder, "--data.cache_dir", str(cache), "--run_name", "bits"]
        own += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
        command = [sys.executable, "-m", "gpt_lightning", "fit", *words, *data, *own]
        done = subprocess.run(command, env={**os.environ, OUT: str(out)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(out.read_text())
        path = Path(folder) / "checkpoints" / "bits" / "last.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(name.encode() + state[name].contiguous().view(torch.uint8).numpy().tobytes())
        samples = hashlib.sha256(json.dumps(result["samples"]).encode()).hexdigest()
        assert len(result["losses"]) == 30, len(result["losses"])
        return {"losses": result["losses"], "samples": samples, "weights": digest.hexdigest()}


if __name__ == "__main__":
    wanted = sys.argv[2:] or list(RUNS)
    cache = Path(tempfile.gettempdir()) / "gpt_lightning_bits_cache"
    print(json.dumps({name: run(RUNS[name], Path(sys.argv[1]), cache) for name in wanted}, indent=1))
