"""Cross entropy straight from hidden states, without ever holding the logits of a whole batch.

Shapes: N tokens, D d_model, V vocabulary. The logits [N, V] of GPT-2's vocabulary are the largest tensor of a
training step by far, several times over (logits, softmax, gradient). Here they exist for a few rows at a
time: each chunk's gradient is made in the forward pass, where its softmax is at hand.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**24


class VocabShard(Protocol):
    """Where this process's rows of `weight` stand in the vocabulary, and how to join with the other rows."""

    @property
    def first_token(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def largest_shard(self) -> int: ...

    def max_over_shards(self, x: Tensor) -> Tensor: ...

    def sum_over_shards(self, x: Tensor) -> Tensor: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    *,
    shard: VocabShard | None = None,
) -> Tensor:
    """Cross entropy of softmax(hidden @ weight.T) against `targets` [N]; targets of -100 are not scored.

    The sum is taken in float64 (float32 on devices without it) and `reduction="sum"` returns it so: sums of
    many batches stay exact enough to compare. With `shard`, `weight` is a part of the vocabulary's rows, the
    loss is that of the whole, and the gradient of `hidden` is what these rows add to it.
    """
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden.device.type)
    total = _LinearCrossEntropy.apply(hidden, weight, targets, compute_dtype, shard)
    if reduction == "sum":
        return total
    return (total / (targets != IGNORE_INDEX).sum()).float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        compute_dtype: torch.dtype,
        shard: VocabShard | None,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        sum_dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(compute_dtype)
            # The same for all who share the vocabulary: they meet once a chunk.
            rows = max(1, CHUNK_ELEMENTS // (weight.shape[0] if shard is None else shard.largest_shard))
            for start in range(0, hidden.shape[0], rows):
                chunk = slice(start, start + rows)
                compute_hidden = hidden[chunk].to(compute_dtype)
                logits = F.linear(compute_hidden, compute_weight).float()  # [rows, V]
                loss, logits_grad = _loss_and_gradient_(logits, targets[chunk], shard, needs_grad)
                total += loss.sum(dtype=sum_dtype)
                if hidden_grad is not None and weight_grad is not None:
                    logits_grad = logits_grad.to(compute_dtype)
                    hidden_grad[chunk] = logits_grad @ compute_weight
                    weight_grad += logits_grad.t() @ compute_hidden
        if needs_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        # Scaled out of place: the graph may be traversed a second time (retain_graph).
        return (
            hidden_grad * scale.to(hidden_grad.dtype),
            (weight_grad * scale.float()).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _loss_and_gradient_(
    logits: Tensor, targets: Tensor, shard: VocabShard | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss [N] and softmax - one_hot [N, V], zero for rows that are not scored; overwrites the logits."""
    if shard is None:
        loss = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
        if needs_grad:
            torch.softmax(logits, dim=-1, out=logits)
        here, columns = targets != IGNORE_INDEX, targets.clamp(min=0)
    else:
        loss, here, columns = _sharded_loss_and_softmax_(logits, targets, shard)
    if needs_grad:
        every = torch.arange(targets.shape[0], device=targets.device)
        logits[every, columns] -= here.to(logits.dtype)
        logits *= (targets != IGNORE_INDEX)[:, None]
    return loss, logits


def _sharded_loss_and_softmax_(
    logits: Tensor, targets: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], which targets are in this shard and in which columns; the logits become the softmax."""
    scored = targets != IGNORE_INDEX
    columns = targets - shard.first_token
    here = scored & (columns >= 0) & (columns < logits.shape[1])
    columns = columns.masked_fill(~here, 0)
    logits -= shard.max_over_shards(logits.amax(dim=-1, keepdim=True))
    picked = logits.gather(1, columns[:, None]).masked_fill(~here[:, None], 0.0)
    logits.exp_()
    # One exchange for both: the softmax's denominator and the target's logit.
    sums = shard.sum_over_shards(torch.cat([logits.sum(dim=-1, keepdim=True), picked], dim=1))
    logits /= sums[:, :1]
    # A target that no shard has must not look like an easy one.
    unknown = (targets < 0) | (targets >= shard.vocab_size)
    loss = (sums[:, 0].log() - sums[:, 1]).masked_fill(unknown, torch.nan).masked_fill(~scored, 0.0)
    return loss, here, columns
