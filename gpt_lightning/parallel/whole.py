"""Computes with whole matrices of which ranks hold parts, each matrix on one rank of a group."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_lightning.parallel.collectives import exchange
from gpt_lightning.parallel.shard import Shard

# Takes the numbers of some matrices and these, and returns what it makes of each.
Compute = Callable[[list[int], list[Tensor]], list[Tensor]]


def on_whole(
    compute: Compute, parts: Sequence[Tensor], shards: Sequence[Shard], group: dist.ProcessGroup
) -> list[Tensor]:
    """Returns this rank's parts of what `compute` makes, in the same shapes, of the whole matrices.

    The matrices are dealt out, those of one shape evenly. Every part travels once to the rank that has the
    matrix, and once back.
    """
    ranks, like = range(dist.get_world_size(group)), parts[0]
    owners = _dealt_out([shard.full_shape(part) for part, shard in zip(parts, shards)], len(ranks))
    dealt = [[index for index, owner in enumerate(owners) if owner == rank] for rank in ranks]
    own = dealt[dist.get_rank(group)]
    shapes = [[_shape_of_part(parts[index], shards[index], rank) for index in own] for rank in ranks]
    arrived = exchange([[parts[index] for index in each] for each in dealt], shapes, like, group)
    wholes = [torch.cat(each, shards[index].dim) for index, each in zip(own, zip(*arrived))]
    made = [x.split(shards[i].sizes, shards[i].dim) for i, x in zip(own, compute(own, wholes))]
    shapes = [[parts[index].shape for index in each] for each in dealt]
    returned = exchange([[each[rank] for each in made] for rank in ranks], shapes, like, group)
    found = {index: x for each, xs in zip(dealt, returned) for index, x in zip(each, xs)}
    return [found[index] for index in range(len(parts))]


def on_whole_once(
    compute: Compute,
    parts: Sequence[Tensor],
    shards: Sequence[Shard],
    group: dist.ProcessGroup,
    copies: dist.ProcessGroup,
) -> list[Tensor]:
    """Does so where several groups hold the same parts: each has some of the matrices, and tells the others.

    `copies` are the ranks, one of each group, that hold what this one holds.
    """
    numbers = range(dist.get_world_size(copies))
    owners = _dealt_out([shard.full_shape(part) for part, shard in zip(parts, shards)], len(numbers))
    dealt = [[index for index, owner in enumerate(owners) if owner == copy] for copy in numbers]
    own, made = dealt[dist.get_rank(copies)], list[Tensor]()
    if own:  # else there are more groups than matrices

        def compute_own(places: list[int], wholes: list[Tensor]) -> list[Tensor]:
            return compute([own[place] for place in places], wholes)

        made = on_whole(compute_own, [parts[i] for i in own], [shards[i] for i in own], group)
    shapes = [[parts[index].shape for index in each] for each in dealt]
    arrived = exchange([made for _ in numbers], shapes, parts[0], copies)
    found = {index: x for each, xs in zip(dealt, arrived) for index, x in zip(each, xs)}
    return [found[index] for index in range(len(parts))]


def _dealt_out(shapes: Sequence[list[int]], ranks: int) -> list[int]:
    """Returns which rank has each matrix."""
    owners = [0] * len(shapes)
    for place, index in enumerate(sorted(range(len(shapes)), key=lambda index: shapes[index])):
        owners[index] = place % ranks
    return owners


def _shape_of_part(part: Tensor, shard: Shard, rank: int) -> torch.Size:
    return torch.Size([*part.shape[: shard.dim], shard.sizes[rank], *part.shape[shard.dim + 1 :]])
