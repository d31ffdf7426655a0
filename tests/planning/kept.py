"""Watches what autograd keeps of a forward pass, on a CPU, or there as on a GPU."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from gpt_lightning.kernels.attention import Attend
from gpt_lightning.model.rope import Turn


def bytes_kept(
    module: nn.Module, blocks: nn.ModuleList, forward: Callable[[], Tensor], *, bf16: bool
) -> int:
    """The storages of what is kept, without those of parameters, and with what checkpoints hold."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}
    inputs: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    for block in blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.extend(map(weakref.ref, _tensors(*given))))
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    for reference in inputs:
        if (given := reference()) is not None:
            keep(given)
    del loss
    return sum(storage.nbytes() for place, storage in found.items() if place not in own)


def _tensors(x: Tensor, attend: Attend, turn: Turn) -> list[Tensor]:
    """All that a checkpoint holds in order to compute a block again."""
    of_turn = [cell.cell_contents for cell in getattr(turn, "__closure__", None) or ()]
    return [value for value in (x, *vars(attend).values(), *of_turn) if isinstance(value, Tensor)]


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what a GPU's kernel does: its input, the weight and a scale for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale.float())
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError


class _AsOnGPU(TorchFunctionMode):
    """Converts what autocast converts on CUDA (the lists of autocast_mode.h), and fuses RMS norms."""

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16
        self.narrow: dict[int, Tensor] = {}  # autocast's cache of weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.bf16 and func in (F.linear, F.scaled_dot_product_attention):
            args = [self.narrowed(value) for value in args]
        if self.bf16 and func in (F.layer_norm, F.rms_norm):
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
            kwargs = {name: v.float() if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        if func is F.rms_norm:
            return _FusedRMSNorm.apply(args[0], kwargs["weight"], kwargs["eps"])
        return func(*args, **kwargs)

    def narrowed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if isinstance(value, nn.Parameter):
            return self.narrow.setdefault(id(value), value.bfloat16())
        return value.bfloat16()


@contextmanager
def as_on_gpu(bf16: bool) -> Iterator[None]:
    """Has a CPU take none of its own kernels."""
    places = ("linear", "rms_norm", "attention")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for place in places:
            patch.setattr(f"gpt_lightning.kernels.{place}.trains_on_cpu", lambda x: False)
        stack.enter_context(_AsOnGPU(bf16))
        yield
