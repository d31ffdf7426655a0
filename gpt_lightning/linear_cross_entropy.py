"""Cross entropy straight from hidden states, without ever holding the logits of a whole batch.

Shapes: N tokens, D d_model, V vocabulary. The logits [N, V] of GPT-2's vocabulary are the largest tensor of a
training step by far, several times over (logits, softmax, gradient). Here they exist for a few rows at a
time: each chunk's gradient is made in the forward pass, where its softmax is at hand.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**24


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of softmax(hidden @ weight.T) against `targets` [N]; targets of -100 are not scored.

    The sum is taken in float64 (float32 on devices without it) and `reduction="sum"` returns it so: sums of
    many batches stay exact enough to compare.
    """
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden.device.type)
    total = _LinearCrossEntropy.apply(hidden, weight, targets, compute_dtype)
    if reduction == "sum":
        return total
    return (total / (targets != IGNORE_INDEX).sum()).float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, compute_dtype: torch.dtype
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        sum_dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(compute_dtype)
            rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
            for start in range(0, hidden.shape[0], rows):
                chunk = slice(start, start + rows)
                compute_hidden = hidden[chunk].to(compute_dtype)
                logits = F.linear(compute_hidden, compute_weight).float()  # [rows, V]
                total += F.cross_entropy(logits, targets[chunk], reduction="none").sum(dtype=sum_dtype)
                if hidden_grad is not None and weight_grad is not None:
                    logits_grad = _logits_gradient_(logits, targets[chunk]).to(compute_dtype)
                    hidden_grad[chunk] = logits_grad @ compute_weight
                    weight_grad += logits_grad.t() @ compute_hidden
        if needs_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        # Scaled out of place: the graph may be traversed a second time (retain_graph).
        return (
            hidden_grad * scale.to(hidden_grad.dtype),
            (weight_grad * scale.float()).to(ctx.weight_dtype),
            None,
            None,
        )


def _logits_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """softmax - one_hot, in place of the logits; rows that are not scored get zero."""
    gradient = torch.softmax(logits, dim=-1, out=logits)
    scored = targets != IGNORE_INDEX
    rows = torch.arange(targets.shape[0], device=targets.device)
    gradient[rows, targets.clamp(min=0)] -= 1.0
    return gradient.mul_(scored[:, None])
