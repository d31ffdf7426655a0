"""Replicas that share out what they hold alike: parameters, gradients and moments, by torch's fully_shard.

Of every parameter, or of this tensor-parallel peer's part of it, each of the data-parallel ranks keeps some
rows, as a DTensor. A layer's are gathered while it computes, and its gradients are summed into rows. What
is called by the rows alone goes through `local`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter  # for a subclass
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.linear import is_plain_linear
from gpt_lightning.parallel.layers import ColumnParallelLinear, RowParallelLinear
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, is_shared

NONE, OPTIMIZER, FULL = KINDS = ("none", "optimizer", "full")


def shard_size(kind: str, replicas: int, nodes: int) -> int:
    """Returns how many replicas share one copy: those of a node, or all where a node has only one."""
    if kind == NONE:
        return 1
    in_node = replicas // nodes
    return in_node if in_node > 1 else replicas


def check_use(function: TrainerFn | None, kind: str) -> None:
    """Refuses to predict with what a fit has left, for which all ranks would need as many passes."""
    if function == TrainerFn.PREDICTING:
        left = f"of which a fit with trainer.strategy.shard_replicas={kind} has left each rank its rows"
        raise UserError(f"predict needs whole layers, {left}; build the module anew and give its ckpt_path")


# ---- the module


class ShardedReplica(nn.Module):
    """Takes DDP's place around a module, for `fully_shard` to hook into; `share_out` makes it."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        super().__init__()
        self.module, self.kind = module, kind
        self._stays_gathered = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _layers(self) -> Iterator[FSDPModule]:
        return (layer for layer in self.modules() if isinstance(layer, FSDPModule))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keeps the gradients of a micro-batch, whole, for the last one of the step to reduce."""
        self._synchronize(False)
        try:
            yield
        finally:
            self._synchronize(True)

    def _synchronize(self, at_once: bool) -> None:
        root = cast(FSDPModule, self)
        root.set_requires_gradient_sync(at_once)
        if self.kind == OPTIMIZER:  # gathered once a step, not once a micro-batch
            root.set_reshard_after_backward(at_once)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Has all parameters whole inside, for passes that do not begin at the root, or differ by rank."""
        self._stays_gathered = True
        for layer in self._layers():
            layer.unshard()
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            self._stays_gathered = False
            self.put_away()

    def put_away(self) -> None:
        """Leaves the module with its rows alone, whatever was gathered since the last backward pass."""
        for layer in self._layers():
            layer.reshard()
            layer.set_reshard_after_forward(self.kind == FULL and layer is not self, recurse=False)

    def after_forward(self, *_: Any) -> None:
        """Puts away, as a hook, what no backward pass will: nobody sees gathered parameters between steps."""
        if not torch.is_grad_enabled() and not self._stays_gathered:
            self.put_away()


class ReduceInBf16(DefaultReduceScatter):
    """Has gradients summed over the ranks in bfloat16, within a copy and between copies.

    They are rounded when fully_shard copies them into what is allocated here. With its own option for that,
    it would also add up the micro-batches of a step in bfloat16, which loses what is small beside the sum.
    """

    @override
    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return super().allocate(size, dtype=torch.bfloat16, device=device)


def share_out(
    module: nn.Module, mesh: ParallelMesh, kind: str, *, reduce_dtype: str | None, gather_dtype: str | None
) -> ShardedReplica:
    """Leaves in the module this rank's rows of every parameter; the parameters are other objects then.

    With `gather_dtype` a layer's linear layers are a group of their own: what autocast would round is
    gathered rounded. The rows stay float32, and so do sums of gradients.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            rows = "which trainer.strategy.shard_replicas cuts by rows"
            raise UserError(f"{name} is a single number, {rows}; give it the shape [1]")
    replica = ShardedReplica(module, kind)
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in [*gathered_apart(module), replica]:
        again = kind == FULL and layer is not replica  # what the root has is needed again at once
        share = partial(fully_shard, mesh=mesh.replica_mesh, reshard_after_forward=again)
        linear = rounded_layers(layer) if gather_dtype and layer is not replica else []
        if linear:
            for each in linear:
                each.register_forward_hook(_leave_base)  # before fully_shard's own
            share(linear, mp_policy=rounded)
        if layer not in linear:
            share(layer)
        if reduce_dtype is not None:
            for group in {layer, *linear[:1]}:
                cast(FSDPModule, group).set_custom_reduce_scatter(ReduceInBf16())
    replica.register_forward_hook(replica.after_forward)  # after fully_shard's own
    return replica


def gathered_apart(module: nn.Module) -> list[nn.Module]:
    """Finds the layers that are gathered one at a time: the members of the outermost lists of layers.

    One that shares a tensor with the rest is left to the root: in two groups it would be two tensors.
    """
    of_all = _uses(module)

    def found_in(parent: nn.Module) -> Iterator[nn.Module]:
        for child in parent.children():
            is_called = type(child).forward is not nn.Module.forward  # which a list of layers is not
            is_listed = isinstance(parent, (nn.ModuleList, nn.Sequential)) and is_called
            own = _uses(child)
            if is_listed and own and all(of_all[parameter] == n for parameter, n in own.items()):
                yield child
            else:
                yield from found_in(child)

    return [*found_in(module)]


def rounded_layers(layer: nn.Module) -> list[nn.Module]:
    """Finds the linear layers in a layer, or itself, whose parameters autocast rounds, and nobody else reads.

    Other classes, or parametrized weights, may do anything with theirs.
    """
    of_all = _uses(layer)
    found = [each for each in layer.modules() if _is_rounded(each)]
    of_found = sum((_uses(each) for each in found), Counter[nn.Parameter]())
    return [each for each in found if all(of_all[own] == of_found[own] for own in each.parameters())]


def _is_rounded(layer: nn.Module) -> bool:
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight, and never calls it
    is_linear = is_plain_linear(layer) or isinstance(layer, (ColumnParallelLinear, RowParallelLinear))
    names = {name for name, _ in layer.named_parameters()}
    return is_linear and "weight" in names and names <= {"weight", "bias"}


def _leave_base(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Makes the output none of autograd's views, as that of F.linear is.

    From a view, what changes it in place takes the hook that gathers the weights for the backward pass.
    """
    return torch.ops.aten._unsafe_view(output, output.shape)


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


# ---- its tensors


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's rows of a tensor that replicas share, without communication; others as they are."""
    return tensor.to_local() if is_shared(tensor) else tensor


def rows_of(tensor: DTensor) -> Shard:
    """Says which rows of a tensor that replicas share this rank has."""
    mesh = tensor.device_mesh
    return Shard(0, tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))


def sharing_group(tensor: DTensor) -> dist.ProcessGroup:
    """Returns the ranks that have the rows of one copy between them."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)


def copies_group(tensor: DTensor) -> dist.ProcessGroup | None:
    """Returns the ranks that have the same rows, one of each copy, where there are several copies."""
    return tensor.device_mesh.get_group(0) if tensor.device_mesh.ndim > 1 else None


def with_rows(rows: Tensor, like: DTensor) -> DTensor:
    """Returns the tensor, shared as another one is, of which these are this rank's rows."""
    mesh, placements = like.device_mesh, like.placements
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def shared_like(whole: Any, own: Any) -> Any:
    """Takes this rank's rows of a tensor that replicas have whole, where they share `own` of that shape."""
    if isinstance(whole, Tensor) and is_shared(own) and whole.shape == own.shape:
        return with_rows(rows_of(own).cut(whole), own)
    return whole


def share_out_like(copy: nn.Module, shared: nn.Module) -> None:
    """Leaves in a copy of a module, made before replicas shared it, this rank's rows of every parameter."""
    rows: dict[Tensor, nn.Parameter] = {}
    for name, own in shared.named_parameters(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        layer = copy.get_submodule(parent)
        whole = layer._parameters[leaf]
        if is_shared(own) and whole is not None and not is_shared(whole):
            if whole not in rows:
                part = with_rows(rows_of(own).cut(whole.detach()).clone(), own)
                rows[whole] = nn.Parameter(part, requires_grad=whole.requires_grad)
            layer._parameters[leaf] = rows[whole]
