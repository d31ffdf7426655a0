"""Computes with whole matrices of which tensor-parallel peers hold parts, each matrix on one peer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt_lightning.parallel.collectives import exchange
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard

Compute = Callable[[list[Tensor]], list[Tensor]]


def on_whole(
    compute: Compute, parts: Sequence[Tensor], shards: Sequence[Shard], mesh: ParallelMesh
) -> list[Tensor]:
    """Returns this peer's parts of what `compute` makes, in the same shapes, of the whole matrices.

    The matrices are dealt out, those of one shape evenly. Every part travels once to the peer that has the
    matrix, and once back.
    """
    peers, like = range(mesh.tp_size), parts[0]
    owners = _dealt_out([shard.full_shape(part) for part, shard in zip(parts, shards)], mesh.tp_size)
    dealt = [[index for index, owner in enumerate(owners) if owner == peer] for peer in peers]
    own = dealt[mesh.tp_rank]
    shapes = [[_shape_of_part(parts[index], shards[index], peer) for index in own] for peer in peers]
    arrived = exchange([[parts[index] for index in each] for each in dealt], shapes, like, mesh)
    wholes = [torch.cat(each, shards[index].dim) for index, each in zip(own, zip(*arrived))]
    made = [x.split(shards[index].sizes, shards[index].dim) for index, x in zip(own, compute(wholes))]
    shapes = [[parts[index].shape for index in each] for each in dealt]
    returned = exchange([[each[peer] for each in made] for peer in peers], shapes, like, mesh)
    found = {index: x for each, xs in zip(dealt, returned) for index, x in zip(each, xs)}
    return [found[index] for index in range(len(parts))]


def _dealt_out(shapes: Sequence[list[int]], peers: int) -> list[int]:
    """Returns which peer has each matrix."""
    owners = [0] * len(shapes)
    for place, index in enumerate(sorted(range(len(shapes)), key=lambda index: shapes[index])):
        owners[index] = place % peers
    return owners


def _shape_of_part(part: Tensor, shard: Shard, peer: int) -> torch.Size:
    return torch.Size([*part.shape[: shard.dim], shard.sizes[peer], *part.shape[shard.dim + 1 :]])
