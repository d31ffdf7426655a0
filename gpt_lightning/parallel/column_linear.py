"""The column-parallel product with its communication behind its arithmetic."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning.parallel.collectives import (
    all_gather_sequence,
    start_all_gather_sequence,
    start_all_reduce,
    start_reduce_scatter_sequence,
)
from gpt_lightning.parallel.mesh import ParallelMesh


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mesh: ParallelMesh, sequence_parallel: bool
) -> Tensor:
    """x @ weight.T + bias for this peer's rows of `weight`; the gradient of x is summed over the peers.

    With `sequence_parallel`, x is this peer's part of the sequence: all parts are gathered for the product,
    not kept, and gathered again in the backward pass.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _ColumnLinear.apply(x, weight, bias, mesh, sequence_parallel))


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mesh: ParallelMesh, sequence_parallel: bool
    ) -> Tensor:
        ctx.mesh, ctx.sequence_parallel = mesh, sequence_parallel
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        whole = all_gather_sequence(x, mesh) if sequence_parallel else x
        return F.linear(whole, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        y_grad = grad_outputs[0]
        gathering = start_all_gather_sequence(x, ctx.mesh) if ctx.sequence_parallel else None
        x_grad = y_grad @ weight.to(x.dtype)  # meanwhile
        whole = x if gathering is None else gathering()
        summing = (start_reduce_scatter_sequence if ctx.sequence_parallel else start_all_reduce)(
            x_grad, ctx.mesh
        )
        rows = y_grad.flatten(0, -2)  # meanwhile
        weight_grad = (rows.t() @ whole.flatten(0, -2)).to(weight.dtype)
        bias_grad = None if ctx.bias_dtype is None else rows.sum(dim=0).to(ctx.bias_dtype)
        return summing(), weight_grad, bias_grad, None, None
