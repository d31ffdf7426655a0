"""Contenders of gpu.py that train: this project by its Trainer, nanoGPT and transformers in loops of theirs.

All learn the same stream of synthetic tokens, of which each mostly decides the next, and all are timed
between two moments at which the device has nothing left to do.
"""

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from nanogpt_checkout import load_nanogpt
from torch import Tensor, nn

from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.token_cache import TokenSplit
from gpt_lightning.kernels.device import peak_memory_gib
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.flops import training_flops_per_token
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

MEAN_DOCUMENT = 400
ROOT = Path(__file__).resolve().parent.parent.parent


def recipe(name: str) -> dict[str, Any]:
    """Returns what configs/NAME.yaml says of the model."""
    return yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))["model"]


def tell(case: str, figures: dict[str, Any]) -> None:
    """Writes the line of JSON that gpu.py reads, at once: what was told, no time limit takes away."""
    print("CASE " + json.dumps([case, figures]), flush=True)


@dataclass(frozen=True)
class Scale:
    """What differs between the real benchmark and a trial of it."""

    device: str
    sizes: dict[str, dict[str, Any]]
    vocab_size: int
    seq_len: int
    n_tokens: int
    warm_up: int
    steps: int
    backend: str
    batches: tuple[int, int]  # equal for all, and as large as fits
    falls_by: float  # nats that a contender's loss must fall by

    def config(self, size: str) -> GPTConfig:
        sizes = {"vocab_size": self.vocab_size, "max_position_embeddings": self.seq_len}
        return GPTConfig(**{**self.sizes[size], **sizes})


FULL = Scale(
    device="cuda",
    sizes={
        "124M": {"n_layers": 12, "n_heads": 12, "d_model": 768},
        "350M": {"n_layers": 24, "n_heads": 16, "d_model": 1024},
        "1.5B": {"n_layers": 48, "n_heads": 25, "d_model": 1600},
        "135M": recipe("modern")["config"],
    },
    vocab_size=50257,
    seq_len=1024,
    n_tokens=20_000_000,
    warm_up=15,
    steps=30,
    backend="inductor",
    batches=(16, 64),
    falls_by=1.0,
)
TOY = Scale(
    device="cpu",
    sizes={
        name: {**sizes, "n_layers": 2, "n_heads": 2, "d_model": 32}
        | ({"n_kv_heads": 1, "d_ff": 96} if name == "135M" else {})
        for name, sizes in FULL.sizes.items()
    },
    vocab_size=509,
    seq_len=64,
    n_tokens=20_000,
    warm_up=8,
    steps=16,
    backend="aot_eager",
    batches=(2, 4),
    falls_by=0.1,
)


def synthetic_tokens(scale: Scale) -> np.ndarray:
    """Each token is decided by the one before it, nine times of ten; a thousand of the vocabulary occur."""
    random = np.random.default_rng(0)
    used = random.permutation(scale.vocab_size)[:1000]
    chance = random.random(scale.n_tokens) < 0.1
    chance[0] = True
    places = np.arange(scale.n_tokens)
    drawn = np.maximum.accumulate(np.where(chance, places, 0))  # where the last one came by chance
    steps = places - drawn
    followers = [np.arange(len(used))]  # after so many steps
    follower = random.permutation(len(used))
    for _ in range(steps.max()):
        followers.append(follower[followers[-1]])
    starts = random.integers(len(used), size=scale.n_tokens)
    return used[np.stack(followers)[steps, starts[drawn]]].astype(np.uint16)


def token_file(scale: Scale, folder: Path) -> Path:
    """Made by the first contender that asks."""
    path = folder / "train.tokens.bin"
    if not path.exists():
        synthetic_tokens(scale).tofile(path)
    return path


class SyntheticText(TextDataModule):
    """The tokens above in a cache folder, as if they had been tokenized; validation is left out."""

    def __init__(self, scale: Scale, folder: Path, **options: Any) -> None:
        super().__init__(train_files="synthetic", seq_len=scale.seq_len, **options)
        random = np.random.default_rng(1)
        starts = np.unique(random.integers(scale.n_tokens, size=scale.n_tokens // MEAN_DOCUMENT))
        starts[0] = 0
        token_file(scale, folder)
        starts.astype(np.uint64).tofile(folder / "train.documents.bin")
        self._vocab_size = scale.vocab_size
        self.sources[0].splits = {
            "train": TokenSplit(folder, "train", "uint16", scale.n_tokens, scale.n_tokens, len(starts))
        }

    @property
    def vocab_size(self) -> int:
        return self._vocab_size


class Stopwatch(pl.Callback):
    """First and last loss, and seconds from the end of the warm-up to the end of the run."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.first = self.last = torch.zeros(())
        self.warm_up_seconds = self.seconds = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.warm_up_seconds = -time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.warm_up:
            torch.get_device_module(pl_module.device).synchronize()
            now = time.perf_counter()
            self.warm_up_seconds += now
            self.seconds = -now

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            self.first = outputs["loss"].detach().clone()
        self.last = outputs["loss"].detach()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.get_device_module(pl_module.device).synchronize()
        self.seconds += time.perf_counter()


def train_ours(
    scale: Scale,
    size: str,
    batch: int,
    folder: Path,
    *,
    compiled: bool,
    document_mask: bool = False,
    activation_checkpointing: bool = False,
    callbacks: tuple[pl.Callback, ...] = (),
    log_every: int = 10,
) -> dict[str, Any]:
    watch = Stopwatch(scale.warm_up)
    data = SyntheticText(scale, folder, batch_size=batch, document_mask=document_mask)
    fit(
        scale,
        size,
        data,
        watch,
        *callbacks,
        compiled=compiled,
        activation_checkpointing=activation_checkpointing,
        log_every_n_steps=log_every,
    )
    figures = row(scale, size, batch, watch.seconds, float(watch.first), float(watch.last))
    return figures | {"warm_up_seconds": watch.warm_up_seconds}  # compilation included


def fit(
    scale: Scale,
    size: str,
    data: TextDataModule,
    watch: Stopwatch,
    *callbacks: pl.Callback,
    compiled: bool,
    activation_checkpointing: bool = False,
    optimizer: OptimizerConfig = OptimizerConfig(),
    **options: Any,
) -> None:
    """Trains as the program's `fit` does, with the callbacks and the logger that it has."""
    fresh_memory()
    torch.manual_seed(0)
    with torch.device(scale.device):
        module = GPTLightningModule(
            scale.config(size),
            optimizer,
            ScheduleConfig(warmup_steps=5, min_lr_ratio=1.0),
            activation_checkpointing=activation_checkpointing,
            compile_backend=scale.backend if compiled else "none",
        )
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="gpu" if scale.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            logger=TensorBoardLogger(root),
            callbacks=[FiniteGuard(), Throughput(), watch, *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
            **{"max_steps": scale.warm_up + scale.steps, "log_every_n_steps": 10, **options},
        )
        trainer.fit(module, data)


class Clock(Stopwatch):
    """Ends a run so many seconds after its warm-up; tells at each quarter the mean loss since the last one.

    It waits for the device at every tenth step alone.
    """

    def __init__(self, warm_up: int, time_limit: float, told: Callable[[float, float], None]) -> None:
        super().__init__(warm_up)
        self.time_limit, self.told = time_limit, told
        self.steps, self.losses = 0, list[Tensor]()
        self.curve: dict[float, float] = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step <= self.warm_up:
            return
        self.losses.append(self.last)
        moment = self.time_limit * (len(self.curve) + 1) / 4
        if trainer.global_step % 10 == 0 and self.elapsed(pl_module) >= moment:
            self.curve[moment] = float(torch.stack(self.losses).mean())
            self.losses.clear()
            self.told(moment, self.curve[moment])
            self.steps = trainer.global_step - self.warm_up
            trainer.should_stop = len(self.curve) == 4

    def elapsed(self, pl_module: Any) -> float:
        torch.get_device_module(pl_module.device).synchronize()
        return time.perf_counter() + self.seconds


def source_text(scale: Scale, folder: Path) -> TextDataModule:
    """Torch's own source, real text that is wherever this runs, in tokens of its own."""
    path = folder / "source.jsonl"
    if not path.exists():
        files = sorted(Path(torch.__file__).parent.rglob("*.py"))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        lines = (json.dumps({"text": text}) + "\n" for text in (texts if scale is FULL else texts[:30]))
        path.write_text("".join(lines), encoding="utf-8")
    return TextDataModule(
        train_files=str(path),
        val_fraction=0,
        tokenizer=f"bpe:{scale.vocab_size}",
        cache_dir=str(folder / "cache"),
        seq_len=scale.seq_len,
        batch_size=scale.batches[0],
    )


def train_for(
    scale: Scale,
    size: str,
    optimizer: OptimizerConfig,
    seconds: float,
    folder: Path,
    told: Callable[[float, float], None],
) -> dict[str, Any]:
    """As `fit` trains for so many seconds, after the warm-up and with it the compilation."""
    data, watch = source_text(scale, folder), Clock(scale.warm_up, seconds, told)
    # Compiling takes longer than a trial does.
    fit(scale, size, data, watch, compiled=scale is FULL, optimizer=optimizer, max_steps=1_000_000)
    batch, last = scale.batches[0], watch.curve[seconds]
    figures = row(scale, size, batch, watch.seconds, float(watch.first), last, watch.steps)
    epochs = (scale.warm_up + watch.steps) * batch * scale.seq_len / data.split_counts("train")[0]
    return figures | {"warm_up_seconds": watch.warm_up_seconds, "epochs": epochs, "curve": watch.curve}


def train_nanogpt(scale: Scale, path: str, batch: int, folder: Path, *, compiled: bool) -> dict[str, Any]:
    """Its model.py, and the loop of its train.py: a memory map, autocast, clipping, fused AdamW."""
    module = load_nanogpt(path)
    fresh_memory()
    torch.manual_seed(0)
    config = scale.config("124M")
    sizes = {"n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.d_model}
    # The vocabulary as it pads it: 50257 becomes 50304.
    padded = -(-scale.vocab_size // 64) * 64
    settings = module.GPTConfig(**sizes, block_size=scale.seq_len, vocab_size=padded, dropout=0.0, bias=True)
    model = module.GPT(settings).to(scale.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), scale.device)
    run = torch.compile(model, backend=scale.backend) if compiled else model
    return own_loop(scale, batch, folder, model, optimizer, lambda x, y: run(x, y)[1])


def train_transformers(scale: Scale, batch: int, folder: Path, *, compiled: bool) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt_lightning.huggingface.gpt2 import config_to_gpt2

    fresh_memory()
    torch.manual_seed(0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(**(config_to_gpt2(scale.config("124M")) | options)))
    model.to(scale.device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    run = torch.compile(model, backend=scale.backend) if compiled else model
    # Its labels are not shifted: it shifts them, and leaves the last out.
    return own_loop(scale, batch, folder, model, optimizer, lambda x, y: run(x, labels=x).loss)


def own_loop(
    scale: Scale,
    batch: int,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Any]:
    tokens = np.memmap(token_file(scale, folder), dtype=np.uint16, mode="r")
    device = torch.device(scale.device)
    torch.set_float32_matmul_precision("high")  # as nanoGPT does

    def get_batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - scale.seq_len, (batch,)).tolist()
        windows = [tokens[start : start + scale.seq_len + 1].astype(np.int64) for start in starts]
        both = torch.from_numpy(np.stack(windows))  # [B, T + 1]
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    model.train()
    x, y = get_batch()
    losses = []
    seconds = 0.0
    for step in range(scale.warm_up + scale.steps):
        if step == scale.warm_up:
            torch.get_device_module(device).synchronize()
            seconds = -time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 5)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(x, y)
        x, y = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    torch.get_device_module(device).synchronize()
    seconds += time.perf_counter()
    return row(scale, "124M", batch, seconds, float(losses[0]), float(losses[-1]))


def row(
    scale: Scale, size: str, batch: int, seconds: float, first: float, last: float, steps: int | None = None
) -> dict[str, Any]:
    """Refuses a contender that did not learn: it may be fast because its optimizer does nothing."""
    if not last < first - scale.falls_by:
        raise ValueError(f"did not learn: loss {first:.3f} at first, {last:.3f} at last")
    steps = steps or scale.steps
    per_second = batch * scale.seq_len * steps / seconds
    flops = training_flops_per_token(scale.config(size), scale.seq_len)
    return {
        "tokens_per_second": per_second,
        "step_ms": 1e3 * seconds / steps,
        "flops_per_second": per_second * flops,
        "peak_gib": peak_memory_gib(torch.device(scale.device)),
        "loss": [first, last],
        "batch": batch,
    }


def largest_that_fits(batches: list[int], train: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    for batch in batches:
        try:
            return train(batch)
        except torch.OutOfMemoryError:
            fresh_memory()
    raise torch.OutOfMemoryError(f"not even a batch of {batches[-1]} fits")


def fresh_memory() -> None:
    torch._dynamo.reset()  # else another batch size would be compiled for any size
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
