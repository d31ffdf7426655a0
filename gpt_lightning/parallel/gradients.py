"""The gradient of a model that tensor-parallel peers share: its norm, sums over the peers, loss scaling."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.linalg import vector_norm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.collectives import all_reduce
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, is_shared, parameters_of
from gpt_lightning.parallel.sharded_replicas import local, sharing_group

WHOLE_TENSOR_OPTIMIZERS = ("LBFGS", "Muon", "Adafactor")


def norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns their 2-norm, in float32 at least: half precision would round it, or not hold it.

    Of what replicas share it is that of this rank's rows.
    """
    return get_total_norm(
        vector_norm(gradient, dtype=torch.float32) if gradient.element_size() < 4 else gradient
        for gradient in map(local, gradients)
    )


def gradient_norm(
    parameters: Iterable[nn.Parameter], shards: Mapping[nn.Parameter, Shard], mesh: ParallelMesh
) -> Tensor:
    """Returns the 2-norm of the whole model's gradient, in which a replicated tensor counts once.

    Replicas share the gradient of every parameter or of none.
    """
    gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    cut = norm(gradient for parameter, gradient in gradients if parameter in shards)
    replicated = norm(gradient for parameter, gradient in gradients if parameter not in shards)
    first = gradients[0][1]
    device = first.device  # the norm of no tensors is on the host
    square = all_reduce(cut.to(device).square(), mesh) + replicated.to(device).square()
    if is_shared(first):
        dist.all_reduce(square, group=sharing_group(first))
    return square.sqrt()


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: ParallelMesh) -> None:
    """Sums the parameters' gradients over the tensor-parallel peers, in place and in one message."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = all_reduce(torch.cat([gradient.flatten().to(dtype) for gradient in gradients]), mesh)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(total.view_as(gradient))


def check_optimizer(optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard]) -> None:
    """Refuses optimizers whose step for one element depends on others: a rank has only some of them."""
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    if not any(kind in kinds for kind in WHOLE_TENSOR_OPTIMIZERS):
        return
    parameters = parameters_of(optimizer)
    for is_cut, whose, remedy in (
        (any(p in shards for p in parameters), "tensor-parallel ranks", "tensor_parallel_size=1"),
        (any(map(is_shared, parameters)), "data-parallel ranks", "shard_replicas=none"),
    ):
        if is_cut:
            raise UserError(
                f"{type(optimizer).__name__} needs whole parameters, and {whose} hold parts; "
                f"choose one that works element by element, or trainer.strategy.{remedy}"
            )


def reduce_in_bf16(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Is torch's hook, which by its own name DDP would take with NCCL alone."""
    return bf16_compress_hook(group, bucket)


def register_hook(
    model: DistributedDataParallel,
    group: dist.ProcessGroup,
    hook: Callable[..., Any] | None,
    state: Any,
    wrapper: Callable[..., Any] | None,
) -> None:
    """Has DDP reduce gradients by a hook, over this group: torch's own take all ranks by themselves."""
    if hook is None:
        return
    if getattr(state, "process_group", group) is None:  # as PowerSGDState has it unless told otherwise
        state.process_group = group
    model.register_comm_hook(group if state is None else state, hook if wrapper is None else wrapper(hook))


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
    """Skips a step on all ranks that share the model when the gradient of any rank's part overflows."""

    def __init__(self, scaler: torch.amp.GradScaler, mesh: ParallelMesh) -> None:
        super().__init__(scaler._device, enabled=scaler.is_enabled())
        self.load_state_dict(scaler.state_dict())
        self._mesh = mesh

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found_inf = super()._unscale_grads_(*args, **kwargs)
        for found in found_inf.values():
            all_reduce(found, self._mesh, dist.ReduceOp.MAX)
            if self._mesh.shard_size > 1:
                dist.all_reduce(found, dist.ReduceOp.MAX, self._mesh.parts_mesh.get_group("shard"))
        return found_inf
