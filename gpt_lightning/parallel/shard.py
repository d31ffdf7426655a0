"""Says how tensors are cut over tensor-parallel peers, and which of a model and its optimizer are parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DTensorShard
from torch.optim import Optimizer
from typing_extensions import TypeIs

from gpt_lightning.exit_codes import UserError


@dataclass(frozen=True)
class Shard:
    """Describes a tensor that is cut along `dim` into `tp_size` parts, as `torch.chunk` and DTensor do.

    The first parts are equal and the last is what remains: a size that tp_size does not divide needs no
    padding.
    """

    dim: int
    full_size: int
    tp_rank: int
    tp_size: int

    @property
    def sizes(self) -> list[int]:
        """Returns how much of `dim` each peer has."""
        part = -(-self.full_size // self.tp_size)
        return [max(0, min(part, self.full_size - peer * part)) for peer in range(self.tp_size)]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.tp_rank])

    def cut(self, full: Tensor) -> Tensor:
        """Returns this rank's part, a view."""
        return full.split(self.sizes, self.dim)[self.tp_rank]

    def full_shape(self, part: Tensor) -> list[int]:
        return [*part.shape[: self.dim], self.full_size, *part.shape[self.dim + 1 :]]


def is_shared(tensor: Any) -> "TypeIs[DTensor]":
    """Tells whether replicas have the rows of a tensor between them, and nothing else is done to it."""
    if not isinstance(tensor, DTensor):
        return False
    *copies, shard = tensor.placements
    return shard == DTensorShard(0) and all(copy.is_replicate() for copy in copies)


def sharded_parameters(module: nn.Module) -> dict[nn.Parameter, Shard]:
    """Finds the parameters that are parts; their layers' `shards` say so, also after a copy or a move."""
    return {
        parameter: shard
        for layer in module.modules()
        for name, shard in getattr(layer, "shards", {}).items()
        if (parameter := layer._parameters.get(name)) is not None
    }


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Lists the parameters in the order by which a state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def model_state(module: nn.Module, change: Callable[[Tensor, Shard | None], Any]) -> dict[str, Any]:
    """Returns a module's state dict with `change` applied to each part, once to one that is tied.

    Parts are what the tensor-parallel peers have cut, with the shard that says how, and what replicas share.
    """
    shards = sharded_parameters(module)
    changed: dict[Tensor, Any] = {}
    for parameter in module.parameters():
        if parameter in shards or is_shared(parameter):
            changed[parameter] = change(parameter.detach(), shards.get(parameter))
    return {
        name: changed.get(value, value.detach()) if isinstance(value, Tensor) else value
        for name, value in module.state_dict(keep_vars=True).items()
    }


def optimizer_state(
    optimizer: Optimizer, module: nn.Module, change: Callable[[Tensor, Shard | None], Any]
) -> dict[str, Any]:
    """Returns an optimizer's state dict with `change` applied to all that is cut like its parameter."""
    shards, parameters = sharded_parameters(module), parameters_of(optimizer)

    def changed(value: Any, parameter: nn.Parameter) -> Any:
        is_part = parameter in shards or is_shared(parameter)
        if not is_part or not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape != parameter.shape:
            raise UserError(
                f"the optimizer keeps {list(value.shape)} numbers for a part {list(parameter.shape)} of a "
                "parameter, and nothing tells how to join them; choose one that works element by element"
            )
        return change(value, shards.get(parameter))

    state_dict = optimizer.state_dict()
    state = {
        index: {key: changed(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
