"""When a gradient that is not finite is the scale's fault, and how samples are named."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from gpt_lightning.callbacks.finite_guard import FiniteGuard, NonFiniteError, _ranges
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule


def step(
    guard: FiniteGuard, scale: float | None, gradient: float, dtype: torch.dtype = torch.float32
) -> GPTLightningModule:
    """One optimizer step, as the Trainer would announce it, with fp16's scaler or without."""
    module = GPTLightningModule(GPTConfig(4, 2, n_layers=1, n_heads=1, d_model=2)).to(dtype)
    module.step.nlls.append(torch.tensor(1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    precision = MixedPrecision("16-mixed", "cpu", scaler) if scaler else MixedPrecision("bf16-mixed", "cpu")
    rank = {"is_global_zero": True, "world_size": 1}
    trainer: Any = SimpleNamespace(precision_plugin=precision, global_step=4, **rank)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    if scaler is not None:
        scaler.scale(torch.ones(()))  # which makes the scale a tensor, as the first step does
    guard.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters(), lr=0.1))
    return module


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_gradients_are_the_scalers_business_until_its_scale_is_1(value: float) -> None:
    step(FiniteGuard(), scale=2.0, gradient=value)
    for scale in (1.0, 0.5, None):
        with pytest.raises(NonFiniteError, match="step 5: the gradient is not finite"):
            step(FiniteGuard(), scale=scale, gradient=value)
    step(FiniteGuard(), scale=0.5, gradient=1.0)


def test_a_step_that_is_left_out_has_no_gradients() -> None:
    guard = FiniteGuard(max_skipped_steps=1)
    assert all(p.grad is None for p in step(guard, None, float("nan")).parameters())
    assert all(p.grad is not None for p in step(guard, None, 1.0).parameters())
    with pytest.raises(NonFiniteError):
        step(guard, None, float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_gradient_whose_square_is_infinite_is_refused(dtype: torch.dtype) -> None:
    """AdamW would take no step with these weights ever again, and clipping would take none now."""
    assert torch.isfinite(torch.tensor(1e22, dtype=dtype))
    with pytest.raises(NonFiniteError, match="step 5: the gradient is not finite"):
        step(FiniteGuard(), None, 1e22, dtype)


def test_half_precision_may_have_a_norm_that_it_cannot_hold() -> None:
    step(FiniteGuard(), None, 6e4, torch.float16)


def test_samples_are_named_as_ranges() -> None:
    assert _ranges({3, 4, 5, 9, 1000}) == "3-5, 9, 1,000"


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="non_finite.max_skipped_steps=-1 is below 0"):
        FiniteGuard(max_skipped_steps=-1)
