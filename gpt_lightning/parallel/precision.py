"""Gradient norms and loss scaling that see the parts of all tensor-parallel peers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from gpt_lightning.parallel.collectives import all_reduce
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard


def gradient_norm(
    parameters: Iterable[nn.Parameter], shards: Mapping[nn.Parameter, Shard], mesh: ParallelMesh
) -> Tensor:
    """The 2-norm of the whole model's gradient, in float32: every part counts, a replicated tensor once."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    cut = [parameter.grad for parameter in with_gradient if parameter in shards]
    replicated = [parameter.grad for parameter in with_gradient if parameter not in shards]
    device = with_gradient[0].device
    return (all_reduce(_sum_of_squares(cut, device), mesh) + _sum_of_squares(replicated, device)).sqrt()


def _sum_of_squares(gradients: list[Any], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()


def clip_gradients(
    parameters: list[nn.Parameter], max_norm: float, shards: Mapping[nn.Parameter, Shard], mesh: ParallelMesh
) -> None:
    clip_grads_with_norm_(parameters, max_norm, gradient_norm(parameters, shards, mesh))


class TensorParallelGradScaler(torch.amp.GradScaler):
    """Skips a step on all peers when the gradient of any peer's part overflows."""

    def __init__(self, scaler: torch.amp.GradScaler, mesh: ParallelMesh) -> None:
        super().__init__(
            scaler._device,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            enabled=scaler.is_enabled(),
        )
        self._mesh = mesh

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found_inf = super()._unscale_grads_(*args, **kwargs)
        for found in found_inf.values():
            all_reduce(found, self._mesh, dist.ReduceOp.MAX)
        return found_inf
