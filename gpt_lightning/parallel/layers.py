"""The layers that tensor-parallel peers hold parts of (Shoeybi et al. 2019, Korthikanti et al. 2022).

A column-parallel layer is cut along its outputs and the row-parallel layer after it along its inputs, so that
nothing is communicated between them: the pair needs one all-reduce in the forward pass and one in the
backward pass. With sequence parallelism, the activations outside of such pairs are cut along the sequence in
training steps, which keep them for the backward pass; an all-gather and a reduce-scatter take the place of
each all-reduce.
Shapes: B batch, T time, D d_model, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.cross_entropy import VocabShard, linear_cross_entropy
from gpt_lightning.parallel.collectives import (
    all_reduce,
    from_parts,
    gather_features,
    start_gather,
    start_sum,
    to_parts,
)
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard


class ParallelLayer(nn.Module):
    """Takes the place of a plain layer, and has its parameters; `shards` says how they are cut."""

    weight: nn.Parameter
    dims: Mapping[str, int] = {"weight": 0}  # along which each parameter is cut
    size: str = "out_features"  # what the plain layer calls its size along them

    def __init__(self, layer: Any, mesh: ParallelMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        self.parts: tuple[int, ...] | None = getattr(layer, "parts", None)
        self.shards = {
            name: Shard(dim, getattr(layer, self.size), mesh.tp_rank, mesh.tp_size)
            for name, dim in self.dims.items()
        }


class ColumnParallelLinear(ParallelLayer):
    """Holds rows of the weight: computes some of the output features from all input features.

    The gradient of the input is summed over the peers. Under sequence parallelism the input is this peer's
    part of the sequence: all parts are gathered for the product, not kept, and gathered again in the backward
    pass. Messages travel during the arithmetic.
    """

    dims = {"weight": 0, "bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y = _ColumnLinear.apply(x, self.weight, self.bias, self.mesh)
        return cast(Tensor, y)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mesh: ParallelMesh) -> Tensor:
        ctx.mesh, ctx.cut = mesh, mesh.cuts_sequence
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        whole = start_gather(x, mesh, ctx.cut)()
        return F.linear(whole, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        y_grad = grad_outputs[0]
        gathering = start_gather(x, ctx.mesh, ctx.cut)
        x_grad = y_grad @ weight.to(x.dtype)  # while the parts arrive
        whole = gathering()
        summing = start_sum(x_grad, ctx.mesh, ctx.cut)
        rows = y_grad.flatten(0, -2)  # while the sum is taken
        weight_grad = (rows.t() @ whole.flatten(0, -2)).to(weight.dtype)
        bias_grad = None if ctx.bias_dtype is None else rows.sum(dim=0).to(ctx.bias_dtype)
        return summing(), weight_grad, bias_grad, None


class RowParallelLinear(ParallelLayer):
    """Holds columns of the weight: its products are summands, which it adds up over the peers."""

    dims, size = {"weight": 1}, "in_features"

    def forward(self, x: Tensor) -> Tensor:
        y = from_parts(F.linear(x, self.weight), self.mesh)
        # The bias is added after the sum, else every peer would add it once.
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabParallelEmbedding(ParallelLayer):
    """Holds rows of the weight; a token's vector comes from the one peer that has its row."""

    size = "num_embeddings"

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids - self.shards["weight"].start
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        vectors = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        # An id that no peer has would silently get zeros; to raise would mean to wait for the device.
        unknown = (input_ids < 0) | (input_ids >= self.shards["weight"].full_size)
        other = torch.zeros_like(input_ids, dtype=vectors.dtype).masked_fill(unknown, torch.nan)
        summand = torch.where(elsewhere[..., None], other[..., None], vectors)  # [B, T, D]
        if self.mesh.cuts_sequence:
            check_sequence(input_ids.shape[-1], self.mesh.tp_size)
        return from_parts(summand, self.mesh)


class VocabParallelHead(ParallelLayer):
    """Holds rows of the output layer's weight; gathers logits on demand, and never for the loss."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns all logits, [..., V], on all peers."""
        logits = F.linear(to_parts(hidden, self.mesh), self.weight)
        return gather_features(logits, self.shards["weight"].sizes, self.mesh)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Computes cross entropy of [B, T, D] against [B, T]; the peers exchange three numbers a token."""
        rows, own = to_parts(hidden, self.mesh).flatten(0, 1), self.shards["weight"]
        total = partial(all_reduce, mesh=self.mesh)
        greatest = partial(total, op=dist.ReduceOp.MAX)
        shard = VocabShard(own.start, own.full_size, max(own.sizes), greatest, total)
        return linear_cross_entropy(rows, self.weight, targets.flatten(), reduction, shard)


def cut_positions(mesh: ParallelMesh, embedding: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
    """Makes learned positions, as their hook, look up this peer's part of a sequence that is cut."""
    (positions,) = inputs
    if not mesh.cuts_sequence:
        return None
    check_sequence(positions.shape[-1], mesh.tp_size)
    return positions.chunk(mesh.tp_size, dim=-1)[mesh.tp_rank]


def check_sequence(length: int, tp_size: int) -> None:
    if length % tp_size:
        raise UserError(
            f"data.seq_len={length} is not divisible by trainer.strategy.tensor_parallel_size={tp_size}, as "
            f"trainer.strategy.sequence_parallel needs; choose a multiple of {tp_size}"
        )
