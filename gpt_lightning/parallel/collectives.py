"""The differentiable moves between tensor-parallel peers.

In the forward pass a tensor is either replicated (all peers hold the same) or in parts: cut along features,
cut along the sequence, or summands. Each move has its transpose in the backward pass, where replicated
tensors have equal gradients on all peers.
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


# ---- the moves themselves, without gradients


def all_reduce(x: Tensor, mesh: ParallelMesh, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Elementwise over the tensor-parallel peers, in place."""
    dist.all_reduce(x, op=op, group=mesh.tp_group)
    return x


def all_gather_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """[B, t, D] of each peer to [B, T, D]."""
    return start_all_gather_sequence(x, mesh)()


def start_all_gather_sequence(x: Tensor, mesh: ParallelMesh) -> Callable[[], Tensor]:
    """Begin `all_gather_sequence`; call what is returned for its result."""
    B, t, D = _sequence_shape(x)
    parts = x.new_empty(mesh.tp_size * B, t, D)
    work = _all_gather(parts, x.contiguous(), group=mesh.tp_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return parts.view(mesh.tp_size, B, t, D).transpose(0, 1).reshape(B, mesh.tp_size * t, D)

    return finish


def reduce_scatter_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """The sum of the peers' [B, T, D], of which each keeps its own part of the sequence, [B, t, D]."""
    return start_reduce_scatter_sequence(x, mesh)()


def start_reduce_scatter_sequence(x: Tensor, mesh: ParallelMesh) -> Callable[[], Tensor]:
    B, T, D = _sequence_shape(x)
    t = T // mesh.tp_size
    parts = x.reshape(B, mesh.tp_size, t, D).transpose(0, 1).contiguous()  # [tp, B, t, D]
    own = x.new_empty(B, t, D)
    work = _reduce_scatter(own, parts.view(mesh.tp_size * B, t, D), group=mesh.tp_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return own

    return finish


def _sequence_shape(x: Tensor) -> torch.Size:
    if x.dim() != 3:
        raise UserError(
            f"trainer.strategy.sequence_parallel=true needs activations [batch, time, features], not "
            f"{list(x.shape)}; leave it out for this module"
        )
    return x.shape


def start_all_reduce(x: Tensor, mesh: ParallelMesh) -> Callable[[], Tensor]:
    """Begin to sum over the peers, in place; call what is returned for the result."""
    work = dist.all_reduce(x, group=mesh.tp_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x

    return finish


def gather_uneven(x: Tensor, sizes: list[int], mesh: ParallelMesh) -> Tensor:
    """Parts [..., sizes[tp_rank]] of each peer to [..., sum(sizes)]."""
    padded = x.new_zeros(*x.shape[:-1], max(sizes))
    padded[..., : x.shape[-1]] = x
    parts = x.new_empty(mesh.tp_size, *padded.shape)
    _all_gather(parts.view(-1), padded.view(-1), group=mesh.tp_group)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes)], dim=-1)


# ---- with their gradients


def copy_to_peers(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """A replicated tensor into a region in parts: the gradients that come back are summands."""
    return cast(Tensor, _Copy.apply(x, mesh))


def sum_over_peers(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Summands to their sum on all peers."""
    return cast(Tensor, _Sum.apply(x, mesh))


def gather_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Parts of the sequence [B, t, D] into a region in parts that sees it whole, [B, T, D]."""
    return cast(Tensor, _GatherSequence.apply(x, mesh))


def sum_and_cut_sequence(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Summands [B, T, D] to their sum, cut along the sequence, [B, t, D]."""
    return cast(Tensor, _SumAndCutSequence.apply(x, mesh))


def gather_features(x: Tensor, sizes: list[int], mesh: ParallelMesh) -> Tensor:
    """Parts of the last dim, of these sizes, to the whole on all peers."""
    return cast(Tensor, _GatherFeatures.apply(x, sizes, mesh))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: ParallelMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad_outputs[0].clone(memory_format=torch.contiguous_format), ctx.mesh), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: ParallelMesh) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), mesh)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: ParallelMesh) -> Tensor:
        ctx.mesh = mesh
        return all_gather_sequence(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grad_outputs[0], ctx.mesh), None


class _SumAndCutSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: ParallelMesh) -> Tensor:
        ctx.mesh = mesh
        return reduce_scatter_sequence(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad_outputs[0], ctx.mesh), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], mesh: ParallelMesh) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: mesh.tp_rank]), sizes[mesh.tp_rank]
        return gather_uneven(x, sizes, mesh)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].narrow(-1, ctx.start, ctx.size), None, None
