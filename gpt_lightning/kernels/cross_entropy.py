"""Cross entropy straight from hidden states, without ever holding the logits of a whole batch.

The logits [N, V] of GPT-2's vocabulary are the largest tensor of a training step by far, several times over
(logits, softmax, gradient). Here they exist for a few rows at a time: each chunk's gradient is made in the
forward pass, where its softmax is at hand. Shapes: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning.kernels.linear import product

CHUNK_BYTES = 2**26  # of logits; fewer rows add up the weight's gradient more often, more take more memory
CHUNK_BYTES_ON_ACCELERATORS = 2**29  # and, where it is of half precision, twice as much for its softmax
_MULTIPLE = 64  # of columns and rows: products in half precision are slow with others, as GPT-2's 50257
SOFTMAX_ELEMENTS = 2**21  # at a time on a CPU, within its cache
_NOT_SCORED = -100  # F.cross_entropy's own default


class VocabShard(NamedTuple):
    """Tells where this process's rows of `weight` stand in the vocabulary, and joins with the other rows."""

    first_token: int
    vocab_size: int
    largest_shard: int
    max_over_shards: Callable[[Tensor], Tensor]
    sum_over_shards: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", shard: VocabShard | None = None
) -> Tensor:
    """Equals F.cross_entropy(hidden @ weight.T, targets): targets [N] of -100 are not scored.

    The sum is taken in float64 (float32 on devices without it) and `reduction="sum"` returns it so: sums of
    many batches stay exact enough to compare. With `shard`, `weight` is a part of the vocabulary's rows, the
    loss is that of the whole, and the gradient of `hidden` is what these rows add to it.
    """
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden.device.type)
    # Asked here: within `forward` gradients are always off, and `needs_input_grad` is on for any parameter.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total = _LinearCrossEntropy.apply(hidden, weight, targets, compute_dtype, shard, needs_grad)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose mean or sum")
    if reduction == "sum":
        return total
    return (total / (targets != _NOT_SCORED).sum()).float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        compute_dtype: torch.dtype,
        shard: VocabShard | None,
        needs_grad: bool,
    ) -> Tensor:
        device, V = hidden.device.type, weight.shape[0]
        sum_dtype = torch.float32 if device == "mps" else torch.float64
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        grad_dtype = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight, dtype=grad_dtype) if needs_grad else None
        # The same on all ranks that share the vocabulary, since they exchange numbers once a chunk.
        columns = V if shard is None else shard.largest_shard
        n_rows = chunk_rows(len(hidden), columns * compute_dtype.itemsize, device)
        n_softmax_rows = max(1, SOFTMAX_ELEMENTS // V) if device == "cpu" and shard is None else n_rows
        with torch.autocast(device, enabled=False):
            compute_weight = weight.to(compute_dtype)
            if compute_dtype.itemsize == 2 and V % _MULTIPLE:
                compute_weight = F.pad(compute_weight, (0, 0, 0, -V % _MULTIPLE))  # [V', D]
            for start in range(0, len(hidden), n_rows):
                chunk = slice(start, start + n_rows)
                compute_hidden = hidden[chunk].to(compute_dtype)
                logits = product(compute_hidden, compute_weight)  # [rows, V'], 0 where V' exceeds V
                parts = logits[:, :V].split(n_softmax_rows), targets[chunk].split(n_softmax_rows)
                for part, part_targets in zip(*parts):
                    total += _loss_and_gradient_(part, part_targets, shard, needs_grad).sum(dtype=sum_dtype)
                if hidden_grad is not None and weight_grad is not None:
                    hidden_grad[chunk] = product(logits, compute_weight.t())
                    weight_grad += (logits.t() @ compute_hidden)[:V]
        if needs_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; `once_differentiable` does not see it of a last step
            raise RuntimeError("linear_cross_entropy has no second derivative; leave out create_graph=True")
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        # Scaled out of place: the graph may be traversed a second time (retain_graph).
        hidden_grad = hidden_grad * scale.to(hidden_grad.dtype)
        weight_grad = (weight_grad * scale.to(weight_grad.dtype)).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def chunk_rows(n_rows: int, row_bytes: int, device_type: str) -> int:
    """Returns the rows of a chunk: as many as the memory allows, in chunks that are about even."""
    n_bytes = CHUNK_BYTES if device_type == "cpu" else CHUNK_BYTES_ON_ACCELERATORS
    most = max(1, n_bytes // row_bytes)
    rows = -(-n_rows // -(-n_rows // most)) if n_rows else 1
    return min(most, -(-rows // _MULTIPLE) * _MULTIPLE)


def _loss_and_gradient_(
    logits: Tensor, targets: Tensor, shard: VocabShard | None, needs_grad: bool
) -> Tensor:
    """Returns the loss [N]; makes the logits softmax - one_hot [N, V], zero in rows that are not scored."""
    scored = targets != _NOT_SCORED
    columns, here = targets, scored
    if shard is not None:
        columns = targets - shard.first_token
        here = scored & (columns >= 0) & (columns < logits.shape[1])
    columns = columns.masked_fill(~here, 0)
    softmax = logits.float() if logits.element_size() < 4 else logits
    greatest = softmax.amax(dim=-1, keepdim=True)
    softmax -= greatest if shard is None else shard.max_over_shards(greatest)
    picked = softmax.gather(1, columns[:, None]).masked_fill(~here[:, None], 0.0)
    sums = softmax.exp_().sum(dim=-1, keepdim=True)
    if shard is not None:
        # One exchange for both: the softmax's denominator and the target's logit.
        sums, picked = shard.sum_over_shards(torch.cat([sums, picked], dim=1)).split(1, dim=1)
        # A target that no shard has must not look like an easy one.
        unknown = (targets < 0) | (targets >= shard.vocab_size)
        picked = picked.masked_fill(unknown[:, None], torch.nan)
    loss = (sums.log() - picked)[:, 0].masked_fill(~scored, 0.0)
    if needs_grad:
        softmax *= scored[:, None] / sums
        softmax[torch.arange(len(targets), device=targets.device), columns] -= here.to(softmax.dtype)
        if softmax is not logits:
            logits.copy_(softmax)
    return loss
