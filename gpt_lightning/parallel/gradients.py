"""The gradient of a model that tensor-parallel peers share: its norm, sums over the peers, loss scaling."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.collectives import all_reduce
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard

WHOLE_TENSOR_OPTIMIZERS = ("LBFGS", "Muon", "Adafactor")


def norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns their 2-norm, in float32 at least: half precision would round it, or not hold it."""
    return get_total_norm(
        vector_norm(gradient, dtype=torch.float32) if gradient.element_size() < 4 else gradient
        for gradient in gradients
    )


def gradient_norm(
    parameters: Iterable[nn.Parameter], shards: Mapping[nn.Parameter, Shard], mesh: ParallelMesh
) -> Tensor:
    """Returns the 2-norm of the whole model's gradient, in which a replicated tensor counts once."""
    gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    cut = norm(gradient for parameter, gradient in gradients if parameter in shards)
    replicated = norm(gradient for parameter, gradient in gradients if parameter not in shards)
    device = gradients[0][1].device  # the norm of no tensors is on the host
    return (all_reduce(cut.to(device).square(), mesh) + replicated.to(device).square()).sqrt()


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: ParallelMesh) -> None:
    """Sums the parameters' gradients over the tensor-parallel peers, in place and in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = all_reduce(torch.cat([gradient.flatten().to(dtype) for gradient in gradients]), mesh)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(total.view_as(gradient))


def check_optimizer(optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard]) -> None:
    """Refuses optimizers whose step for one element depends on others: a peer has only some of them."""
    names = [kind.__name__ for kind in type(optimizer).__mro__]
    cut = any(parameter in shards for group in optimizer.param_groups for parameter in group["params"])
    if cut and any(name in names for name in WHOLE_TENSOR_OPTIMIZERS):
        raise UserError(
            f"{type(optimizer).__name__} needs whole parameters, and tensor-parallel ranks hold parts; "
            "choose one that works element by element, or trainer.strategy.tensor_parallel_size=1"
        )


class ClippingByWholeNorm(Precision):
    """Clips by the norm of the whole model's gradient, of which this rank has a part."""

    whole_norm: Callable[[Iterable[nn.Parameter]], Tensor]

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        parameters = list(self.main_params(optimizer))
        clip_grads_with_norm_(parameters, float(clip_val), self.whole_norm(parameters))


def by_whole_norm(
    plugin: Precision, mesh: ParallelMesh, whole_norm: Callable[[Iterable[nn.Parameter]], Tensor]
) -> ClippingByWholeNorm:
    """Returns a plugin like this one that clips by `whole_norm` and skips a step on all peers together."""
    if isinstance(plugin, ClippingByWholeNorm):
        return plugin
    # Named like the plugin's own class: a checkpoint holds the scaler's state under that name.
    adapted: Any = copy.copy(plugin)
    adapted.__class__ = type(type(plugin).__qualname__, (ClippingByWholeNorm, type(plugin)), {})
    adapted.whole_norm = whole_norm
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        adapted.scaler = TensorParallelGradScaler(plugin.scaler, mesh)
    return cast(ClippingByWholeNorm, adapted)


class TensorParallelGradScaler(torch.amp.GradScaler):
    """Skips a step on all peers when the gradient of any peer's part overflows."""

    def __init__(self, scaler: torch.amp.GradScaler, mesh: ParallelMesh) -> None:
        super().__init__(scaler._device, enabled=scaler.is_enabled())
        self.load_state_dict(scaler.state_dict())
        self._mesh = mesh

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found_inf = super()._unscale_grads_(*args, **kwargs)
        for found in found_inf.values():
            all_reduce(found, self._mesh, dist.ReduceOp.MAX)
        return found_inf
