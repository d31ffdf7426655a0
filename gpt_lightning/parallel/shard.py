"""How one tensor is cut over the tensor-parallel peers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """A tensor cut along `dim` into `tp_size` parts, the first ones of equal size and the last what remains.

    That is `torch.chunk`'s rule and DTensor's; a vocabulary that tp_size does not divide needs no padding.
    """

    dim: int
    full_size: int
    tp_rank: int
    tp_size: int

    def bounds(self, tp_rank: int) -> tuple[int, int]:
        """Where a peer's part starts and stops along `dim`."""
        part = -(-self.full_size // self.tp_size)
        return min(tp_rank * part, self.full_size), min((tp_rank + 1) * part, self.full_size)

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in map(self.bounds, range(self.tp_size))]

    @property
    def start(self) -> int:
        return self.bounds(self.tp_rank)[0]

    def cut(self, full: Tensor) -> Tensor:
        """This rank's part, a view."""
        start, stop = self.bounds(self.tp_rank)
        return full.narrow(self.dim, start, stop - start)

    def full_shape(self, part: Tensor) -> list[int]:
        return [*part.shape[: self.dim], self.full_size, *part.shape[self.dim + 1 :]]


class ParallelLayer(Protocol):
    """A layer that holds parts of its parameters: name -> Shard. What is not named is replicated."""

    shards: dict[str, Shard]


def sharded_parameters(module: nn.Module) -> dict[nn.Parameter, Shard]:
    """The parameters of which this rank holds a part, as the layers tell, which survive copies and moves."""
    return dict(_sharded_parameters(module))


def _sharded_parameters(module: nn.Module) -> Iterator[tuple[nn.Parameter, Shard]]:
    for layer in module.modules():
        for name, shard in getattr(layer, "shards", {}).items():
            if (parameter := layer._parameters.get(name)) is not None:
                yield parameter, shard
