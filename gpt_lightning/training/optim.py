"""Builds AdamW, or Muon beside it, and a learning rate that warms up and comes down again."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from gpt_lightning.checkpoint.optimizer_state import problem_of_name
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.layers import ParallelLayer
from gpt_lightning.parallel.shard import is_shared
from gpt_lightning.training.muon import BlockMatrix, MuonWithAdamW

NAMES = ("adamw", "muon")
MOMENTUM = 0.95
SHAPES = ("cosine", "linear", "wsd")
DECAY_FRACTION = 0.5


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019), or Muon (Jordan et al., 2024) for the matrices of the blocks.

    Args:
        learning_rate: The peak, reached at the end of the warm-up.
        weight_decay: Decoupled decay of matrices (weights and embeddings); biases and layer norms have none.
        betas: Decay rates of AdamW's running means of the gradient and of its square.
        name: adamw, or muon, which takes orthogonal updates for the linear layers of the blocks, and AdamW's
            for embeddings, head, norms and biases.
        matrix_learning_rate: The peak for what Muon updates, at the scale of AdamW's; learning_rate when left
            out.
        momentum: Decay rate of Muon's running mean of the gradient.
    """

    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    name: str = "adamw"
    matrix_learning_rate: float | None = None
    momentum: float = MOMENTUM

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise _error("optimizer.learning_rate", self.learning_rate, "is not above 0; choose e.g. 6e-4")
        if not self.weight_decay >= 0:
            raise _error("optimizer.weight_decay", self.weight_decay, "is below 0; choose e.g. 0.1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise _error("optimizer.betas", list(self.betas), "are not in [0, 1); choose e.g. [0.9, 0.95]")
        if self.name not in NAMES:
            raise _error("optimizer.name", repr(self.name), f"is unknown; choose one of {', '.join(NAMES)}")
        if not 0 <= self.momentum < 1:
            raise _error("optimizer.momentum", self.momentum, "is not in [0, 1); choose e.g. 0.95")
        if self.matrix_learning_rate is not None and not self.matrix_learning_rate > 0:
            remedy = "is not above 0; choose e.g. 3e-3, or leave it out"
            raise _error("optimizer.matrix_learning_rate", self.matrix_learning_rate, remedy)
        for name, default in (("matrix_learning_rate", None), ("momentum", MOMENTUM)):
            if self.name != "muon" and getattr(self, name) != default:
                remedy = f"is for model.optimizer.name=muon, not {self.name}; leave it out"
                raise _error(f"optimizer.{name}", getattr(self, name), remedy)


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a way down; the horizon is the Trainer's (max_steps or max_epochs).

    Args:
        warmup_steps: Optimizer steps from (nearly) zero to the peak.
        min_lr_ratio: The learning rate at the horizon and after it, as a share of the peak.
        shape: The way from the peak to the horizon: cosine (half of one), linear, or wsd, which stays at the
            peak and is linear at the end. Until it comes down, a wsd run does not depend on the horizon:
            resumed with a greater trainer.max_steps it is the longer run.
        decay_fraction: The share of the horizon in which wsd comes down.
    """

    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    shape: str = "cosine"
    decay_fraction: float = DECAY_FRACTION

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise _error("schedule.warmup_steps", self.warmup_steps, "is below 0; choose 0 for no warm-up")
        if not 0 <= self.min_lr_ratio <= 1:
            raise _error("schedule.min_lr_ratio", self.min_lr_ratio, "is not in [0, 1]; choose e.g. 0.1")
        if self.shape not in SHAPES:
            raise _error("schedule.shape", repr(self.shape), f"is unknown; choose one of {', '.join(SHAPES)}")
        if not 0 < self.decay_fraction <= 1:
            raise _error("schedule.decay_fraction", self.decay_fraction, "is not in (0, 1]; choose e.g. 0.5")
        if self.shape != "wsd" and self.decay_fraction != DECAY_FRACTION:
            remedy = f"is for model.schedule.shape=wsd, not {self.shape}; leave it out, or change the shape"
            raise _error("schedule.decay_fraction", self.decay_fraction, remedy)


def _error(name: str, value: object, rule_and_remedy: str) -> UserError:
    return UserError(f"model.{name}={value} {rule_and_remedy}")


def learning_rate_factor(step: int, schedule: ScheduleConfig, horizon: float) -> float:
    """Returns the share of the peak learning rate that optimizer step `step` (from 0) uses."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if step >= horizon:
        return schedule.min_lr_ratio
    start = float(schedule.warmup_steps)
    if schedule.shape == "wsd":
        start = max(start, (1 - schedule.decay_fraction) * horizon)
    if step < start:
        return 1.0
    progress = (step - start) / (horizon - start)
    if schedule.shape == "cosine":
        return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * (1 - progress)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Separates matrices, which decay, from the rest, which does not."""
    parameters = [*parameters]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> Optimizer:
    matrices = block_matrices(model) if settings.name == "muon" else []
    orthogonal = {matrix.weight for matrix in matrices}
    parameters = [p for p in model.parameters() if p.requires_grad and p not in orthogonal]
    groups = parameter_groups(parameters, settings.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    # Left to itself a fused step takes over fp16's unscaling, and Lightning then refuses to clip gradients,
    # with bf16 too. So the scaler unscales before the step, as for any other optimizer.
    adamw._step_supports_amp_scaling = False
    optimizer: Optimizer = adamw
    if settings.name == "muon":
        meshes = (layer.mesh for layer in model.modules() if isinstance(layer, ParallelLayer))
        optimizer = MuonWithAdamW(
            adamw,
            matrices,
            next(meshes, None),
            lr=settings.matrix_learning_rate or settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    optimizer.register_load_state_dict_pre_hook(partial(_refuse_another, name=settings.name))
    keep_settings = partial(_keep_settings, n_groups=len(optimizer.param_groups))
    optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizer


def block_matrices(model: nn.Module) -> list[BlockMatrix]:
    """Finds the weights of the linear layers in the model's blocks, which may be cut over the peers."""
    found: dict[nn.Parameter, BlockMatrix] = {}
    for name, layer in model.get_submodule("blocks").named_modules():
        if not isinstance(layer, (nn.Linear, ParallelLayer)) or not layer.weight.requires_grad:
            continue
        weight = layer.weight
        is_whole = type(weight) is nn.Parameter or is_shared(weight)
        if not is_whole or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise UserError(
                f"model.optimizer.name=muon needs whole matrices, and blocks.{name}.weight is none (a "
                f"{type(weight).__name__} {list(weight.shape)}); choose adamw, or a trainer.strategy that "
                "leaves parameters as they are"
            )
        parts = getattr(layer, "parts", None) or (weight.shape[0],)
        shard = layer.shards["weight"] if isinstance(layer, ParallelLayer) else None
        found[weight] = BlockMatrix(weight, parts, shard)
    return [*found.values()]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Returns what is logged of the learning rates: the first group's, and that of Muon's matrices."""
    if isinstance(optimizer, MuonWithAdamW):
        return {"lr-AdamW": optimizer.param_groups[0]["lr"], "lr-Muon": optimizer.matrix_group["lr"]}
    # Lightning's stand-in for an optimizer that a child class has not is of no group.
    return {f"lr-{type(optimizer).__name__}": group["lr"] for group in optimizer.param_groups[:1]}


def _refuse_another(optimizer: Optimizer, saved: dict[str, Any], *, name: str) -> None:
    if (problem := problem_of_name(saved["param_groups"], name)) is not None:
        raise UserError(f"the checkpoint {problem}")


def _keep_settings(optimizer: Optimizer, saved: dict[str, Any], *, n_groups: int) -> dict[str, Any]:
    """Keeps this run's settings of the groups built here: PyTorch would restore those of the run that saved.

    What the schedule has made of the peak stays, as a share of it.
    """
    groups = [*saved["param_groups"]]
    for number, (own, group) in enumerate(zip(optimizer.param_groups[:n_groups], groups)):
        kept = {name: own[name] for name in ("betas", "momentum", "weight_decay") if name in own}
        groups[number] = {**group, **kept}
        if (peak := own.get("initial_lr")) is not None:
            share = peak / group["initial_lr"] if group.get("initial_lr") else 1.0
            groups[number].update(lr=group["lr"] * share, initial_lr=peak)
    return {**saved, "param_groups": groups}


class Schedule(LambdaLR):
    """Has, also after it was restored, the optimizer's peaks, and the shape and horizon of its own run."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        groups = self.optimizer.param_groups
        self.base_lrs = [group["initial_lr"] for group in groups]
        shares = [factor(self.last_epoch) for factor in self.lr_lambdas]
        peaks, rates = state_dict["base_lrs"], state_dict.get("_last_lr")
        if rates is None or rates == [peak * share for peak, share in zip(peaks, shares)]:
            return
        self._last_lr = [peak * share for peak, share in zip(self.base_lrs, shares)]
        rank_zero_warn(
            f"step {self.last_epoch}: the learning rate goes from the checkpoint's {rates[0]:.3g} to "
            f"{self._last_lr[0]:.3g}, as this run's model.schedule and horizon have it"
        )
        for group, rate in zip(groups, self._last_lr):
            group["lr"] = rate


def build_schedule(optimizer: Optimizer, settings: ScheduleConfig, horizon: float) -> LambdaLR:
    if settings.warmup_steps >= horizon:
        rank_zero_warn(
            f"model.schedule.warmup_steps={settings.warmup_steps} is not below the {horizon} "
            f"step{'s' if horizon != 1 else ''} of this run: the learning rate never reaches its peak"
        )
    return Schedule(optimizer, lambda step: learning_rate_factor(step, settings, horizon))


def with_peak(settings: OptimizerConfig, learning_rate: float) -> OptimizerConfig:
    """Returns the settings with one peak for all groups, which lr_find tries alike."""
    if (former := settings.matrix_learning_rate) is not None:
        given_up = f"model.optimizer.matrix_learning_rate={former}"
        rank_zero_warn(f"{given_up} gives way to learning_rate={learning_rate}")
    return replace(settings, learning_rate=learning_rate, matrix_learning_rate=None)


def raise_peak(trainer: Trainer, learning_rate: float) -> None:
    """Has the schedules of a run that begins lead to another peak; Lightning tells the optimizers alone."""
    for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [learning_rate for _ in schedule.base_lrs]
            for group in schedule.optimizer.param_groups:
                group["initial_lr"] = learning_rate
