"""The differentiable collectives of tensor-parallel peers.

In the forward pass a tensor is either replicated (all peers hold the same) or in parts: cut along features,
cut along the sequence, or summands. The backward pass of each collective is its transpose; replicated tensors
have equal gradients on all peers.
Shapes: B batch, T time, t = T / tp_size, D features.
"""

from collections.abc import Callable, Sequence
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


def exchange(
    to_peers: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[torch.Size]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Sends each rank of a group some tensors, and returns those of these shapes that each sends here.

    All have the dtype and the device of `like`, and go as bytes: not every backend knows bfloat16.
    """
    flat = [tensor.flatten() for tensors in to_peers for tensor in tensors]
    outgoing = torch.cat([like.new_empty(0), *flat]).view(torch.uint8)
    sent = [like.itemsize * sum(tensor.numel() for tensor in tensors) for tensors in to_peers]
    lengths = [[shape.numel() for shape in each] for each in shapes]
    received = [like.itemsize * sum(each) for each in lengths]
    arrived = outgoing.new_empty(sum(received))
    dist.all_to_all_single(arrived, outgoing, received, sent, group=group)
    pieces = iter(arrived.view(like.dtype).split([length for each in lengths for length in each]))
    return [[next(pieces).view(shape) for shape in each] for each in shapes]


def start_gather(x: Tensor, mesh: ParallelMesh, cut: bool) -> Callable[[], Tensor]:
    """Begins to join a sequence that is `cut` into [B, t, D]; the function waits for the whole [B, T, D]."""
    if not cut:
        return lambda: x
    B, t, D = _sequence_shape(x)
    parts = x.new_empty(mesh.tp_size * B, t, D)
    work = _all_gather(parts, x.contiguous(), group=mesh.tp_group, async_op=True)
    of_peers = parts.view(mesh.tp_size, B, t, D).transpose(0, 1)
    return lambda: _after(work, of_peers).reshape(B, mesh.tp_size * t, D)


def start_sum(x: Tensor, mesh: ParallelMesh, cut: bool) -> Callable[[], Tensor]:
    """Begins to add the peers' summands; of a sequence to be `cut`, the function waits for the own part."""
    if not cut:
        total = x.clone(memory_format=torch.contiguous_format)
        summing = dist.all_reduce(total, group=mesh.tp_group, async_op=True)
        return lambda: _after(summing, total)
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


# ---- with their gradients


def to_parts(x: Tensor, mesh: ParallelMesh) -> Tensor:
    """Takes a tensor whole into a region in parts, from which its gradient comes back in summands."""
    cut = mesh.cuts_sequence
    return _move(x, lambda x: start_gather(x, mesh, cut)(), lambda grad: start_sum(grad, mesh, cut)())


def from_parts(summand: Tensor, mesh: ParallelMesh) -> Tensor:
    """Adds the peers' summands; all peers have the sum or, where the sequence is cut, their part of it."""
    cut = mesh.cuts_sequence
    return _move(summand, lambda x: start_sum(x, mesh, cut)(), lambda grad: start_gather(grad, mesh, cut)())


def gather_features(x: Tensor, sizes: list[int], mesh: ParallelMesh) -> Tensor:
    """Joins the parts of the last dim, of these sizes; all peers have the whole."""

    def join(part: Tensor) -> Tensor:
        padded = part.new_zeros(*part.shape[:-1], max(sizes))
        padded[..., : part.shape[-1]] = part
        parts = part.new_empty(mesh.tp_size, *padded.shape)
        _all_gather(parts.view(-1), padded.view(-1), group=mesh.tp_group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes)], dim=-1)

    return _move(x, join, lambda whole: whole.split(sizes, -1)[mesh.tp_rank])


def _move(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    return cast(Tensor, _Move.apply(x, forward, backward))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transpose = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grad_outputs[0]), None, None
