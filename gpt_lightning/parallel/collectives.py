"""The differentiable collectives of tensor-parallel peers.

In the forward pass a tensor is either replicated (all peers hold the same) or in parts: cut along features,
cut along the sequence, or summands. The backward pass of each collective is its transpose; replicated tensors
have equal gradients on all peers.
Shapes: B batch, T time, t = T / tp_size, D features.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.mesh import ParallelMesh

# Renamed in torch 2.13, which warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- without gradients


def all_reduce(x: Tensor, mesh: ParallelMesh, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduces elementwise over the tensor-parallel peers, in place."""
    dist.all_reduce(x, op=op, group=mesh.tp_group)
    return x


def start_all_reduce(x: Tensor, mesh: ParallelMesh) -> Callable[[], Tensor]:
    """Begins to add in place; the function that it returns waits for the result."""
    work = dist.all_reduce(x, group=mesh.tp_group, async_op=True)
    return lambda: _after(work, x)


def all_gather_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Joins the peers' parts of the sequence, [B, t, D] each, to [B, T, D]."""
    return start_all_gather_sequence(x, mesh)()


def start_all_gather_sequence(x: Tensor, mesh: ParallelMesh) -> Callable[[], Tensor]:
    """Begins `all_gather_sequence`; the function that it returns waits for the result."""
    B, t, D = _sequence_shape(x)
    parts = x.new_empty(mesh.tp_size * B, t, D)
    work = _all_gather(parts, x.contiguous(), group=mesh.tp_group, async_op=True)
    of_peers = parts.view(mesh.tp_size, B, t, D).transpose(0, 1)
    return lambda: _after(work, of_peers).reshape(B, mesh.tp_size * t, D)


def reduce_scatter_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Adds the peers' [B, T, D]; each keeps its own part of the sequence, [B, t, D]."""
    return start_reduce_scatter_sequence(x, mesh)()


def start_reduce_scatter_sequence(x: Tensor, mesh: ParallelMesh) -> Callable[[], Tensor]:
    """Begins `reduce_scatter_sequence`; the function that it returns waits for the result."""
    B, T, D = _sequence_shape(x)
    t = T // mesh.tp_size
    parts = x.reshape(B, mesh.tp_size, t, D).transpose(0, 1).contiguous()  # [tp, B, t, D]
    own = x.new_empty(B, t, D)
    work = _reduce_scatter(own, parts.view(mesh.tp_size * B, t, D), group=mesh.tp_group, async_op=True)
    return lambda: _after(work, own)


def _after(work: dist.Work, result: Tensor) -> Tensor:
    work.wait()
    return result


def _sequence_shape(x: Tensor) -> torch.Size:
    if x.dim() != 3:
        raise UserError(
            f"trainer.strategy.sequence_parallel=true needs activations [batch, time, features], not "
            f"{list(x.shape)}; leave it out for this module"
        )
    return x.shape


def gather_uneven(x: Tensor, sizes: list[int], mesh: ParallelMesh) -> Tensor:
    """Joins the peers' parts, [..., sizes[tp_rank]] each, to [..., sum(sizes)]."""
    padded = x.new_zeros(*x.shape[:-1], max(sizes))
    padded[..., : x.shape[-1]] = x
    parts = x.new_empty(mesh.tp_size, *padded.shape)
    _all_gather(parts.view(-1), padded.view(-1), group=mesh.tp_group)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes)], dim=-1)


# ---- with their gradients

Collective = Callable[[Tensor, ParallelMesh], Tensor]


def copy_to_peers(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Takes a replicated tensor into a region in parts, from which its gradient comes back in summands."""
    return _move(x, mesh, _same, _summed)


def sum_over_peers(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Adds the peers' summands; all peers have the sum."""
    return _move(x, mesh, _summed, _same)


def gather_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Takes parts of the sequence [B, t, D] into a region in parts that sees it whole, [B, T, D]."""
    return _move(x, mesh, all_gather_sequence, reduce_scatter_sequence)


def sum_and_cut_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Adds the peers' summands [B, T, D], and cuts the sum along the sequence, [B, t, D]."""
    return _move(x, mesh, reduce_scatter_sequence, all_gather_sequence)


def gather_features(x: Tensor, sizes: list[int], mesh: ParallelMesh) -> Tensor:
    """Joins the parts of the last dim, of these sizes; all peers have the whole."""
    start, size = sum(sizes[: mesh.tp_rank]), sizes[mesh.tp_rank]

    def join(part: Tensor, mesh: ParallelMesh) -> Tensor:
        return gather_uneven(part, sizes, mesh)

    return _move(x, mesh, join, lambda whole, mesh: whole.narrow(-1, start, size))


def _same(x: Tensor, mesh: ParallelMesh) -> Tensor:
    return x.view_as(x)


def _summed(x: Tensor, mesh: ParallelMesh) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), mesh)


def _move(x: Tensor, mesh: ParallelMesh, forward: Collective, backward: Collective) -> Tensor:
    return cast(Tensor, _Move.apply(x, mesh, forward, backward))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: ParallelMesh, forward: Collective, backward: Collective) -> Tensor:
        ctx.mesh, ctx.transpose = mesh, backward
        return forward(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transpose(grad_outputs[0], ctx.mesh), None, None, None
