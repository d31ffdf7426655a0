"""A small training run that every topology can repeat, and what it left behind."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.full_layout import gather_to_first
from gpt_lightning.parallel.shard import sharded_parameters
from gpt_lightning.parallel.sharded_replicas import local
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.metrics import TokenLoss
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig
from tests.distributed import run_ranks

GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Run:
    """One training run: its topology, and what may vary. Sizes are odd, biases are not zero."""

    tp: int = 1
    dp: int = 1
    steps: int = 20
    accumulate: int = 2
    seq_len: int = 15
    config: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    stop_after: int | None = None  # of `steps`, which set the learning rate's schedule
    resume_from: str | None = None
    save_to: str | None = None
    strategy_class: type[TensorParallelDDPStrategy] = TensorParallelDDPStrategy
    plugins: Any = None  # a function that makes them, in the rank
    callbacks: Any = None  # likewise


class RecordingModule(GPTLightningModule):
    """Keeps, per optimizer step, the gradient of the whole model on the first rank, before clipping."""

    gradients: list[dict[str, Tensor]]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.gradients.append(dict(whole_gradients(self)))


def whole_gradients(module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
    shards = sharded_parameters(module)
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad.clone()
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        if parameter in shards:
            gradient = gather_to_first(gradient, shards[parameter], module.trainer.strategy.mesh)
        if gradient is not None:
            yield name, gradient


class Recorder(pl.Callback):
    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.scales: list[float] = []
        self.evaluated: list[float] = []
        self._step = None

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self._step and "train/loss" in trainer.callback_metrics:
            self._step = trainer.global_step
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
        trainer.should_stop = trainer.global_step == self.stop_after
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self.evaluated.append(float(trainer.callback_metrics["val/loss"]))


def build(corpus: Path, run: Run) -> tuple[RecordingModule, TextDataModule]:
    settings = {"tokenizer": "bpe:301", "seq_len": run.seq_len, "val_fraction": 0.2, **run.data}
    datamodule = TextDataModule(
        train_files=[str(corpus)],
        cache_dir=str(corpus.parent / "cache"),
        batch_size=GLOBAL_BATCH // run.dp,
        **settings,
    )
    pl.seed_everything(1, verbose=False)
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 36, "d_ff": 60, **run.config}
    module = RecordingModule(
        GPTConfig(datamodule.vocab_size, settings["seq_len"], **sizes),
        OptimizerConfig(**{"learning_rate": 0.003, **run.optimizer}),
        ScheduleConfig(warmup_steps=3),
        **run.module,
    )
    module.gradients = []
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module, datamodule


def trainer_of(run: Run, folder: Path, recorder: Recorder) -> pl.Trainer:
    strategy: Any = "auto"
    if run.tp * run.dp > 1 or run.strategy:
        strategy = run.strategy_class(tensor_parallel_size=run.tp, **run.strategy)
    settings = {
        "max_steps": run.steps,
        "accumulate_grad_batches": run.accumulate,
        "gradient_clip_val": 0.3,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "devices": run.tp * run.dp,
        "plugins": run.plugins() if run.plugins else None,
        **run.trainer,
    }
    return pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        callbacks=[recorder, *(run.callbacks() if run.callbacks else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )


def fit(run: Run, corpus: Path) -> dict[str, Any]:
    """Runs in a rank."""
    module, datamodule = build(corpus, run)
    recorder = Recorder(run.stop_after)
    trainer = trainer_of(run, corpus.parent, recorder)
    trainer.fit(module, datamodule, ckpt_path=run.resume_from, weights_only=True)
    if run.save_to is not None:
        trainer.save_checkpoint(run.save_to)
    shards = sharded_parameters(module)
    own = {n: local(p.detach()) for n, p in module.named_parameters()}
    return {
        "losses": recorder.losses,
        "norms": recorder.norms,
        "scales": recorder.scales,
        "evaluated": recorder.evaluated,
        "gradients": module.gradients,
        "replicated": {n: own[n] for n, p in module.named_parameters() if p not in shards},
        "parts": {n: own[n] for n, p in module.named_parameters() if p in shards},
        "bytes": state_bytes(module, trainer),
    }


def state_bytes(module: pl.LightningModule, trainer: pl.Trainer) -> int:
    """Of parameters and of the optimizer's tensors on this rank."""
    tensors: list[Any] = list(module.parameters())
    for optimizer in trainer.optimizers:
        tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def run_everywhere(run: Run, corpus: Path) -> list[dict[str, Any]]:
    return run_ranks(fit, run.tp * run.dp, run, corpus)


def validate(run: Run, corpus: Path) -> dict[str, float]:
    """Runs in a rank: loss, perplexity and the number of held-out tokens of a model that nobody trained."""
    module, datamodule = build(corpus, run)
    trainer = trainer_of(replace(run, trainer={"limit_val_batches": 1.0}), corpus.parent, Recorder(None))
    compute, counted = TokenLoss.compute, []

    def compute_and_count(held_out: TokenLoss, strategy: Any) -> Tensor:
        loss = compute(held_out, strategy)
        counted.append(int(held_out.tokens))  # of all ranks
        return loss

    setattr(TokenLoss, "compute", compute_and_count)
    (metrics,) = trainer.validate(module, datamodule, verbose=False)
    (tokens,) = counted
    return {**metrics, "tokens": tokens, "in the split": datamodule.split_counts("val")[0]}


def kept_bytes(module: GPTLightningModule, input_ids: Tensor) -> int:
    """Bytes that a training step's forward pass, up to the hidden states, keeps for the backward pass.

    Parameters are not counted.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # else an address is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    module.train()
    strategy = module.trainer.strategy
    if isinstance(strategy, TensorParallelDDPStrategy):
        strategy.mesh.cuts_sequence = strategy.sequence_parallel
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.model.hidden_states(input_ids)
    return sum(kept.values())
