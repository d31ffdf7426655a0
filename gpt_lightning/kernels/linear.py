"""Linear layers that train on a CPU: oneDNN's products, with the bias in the same pass.

F.linear first fills its result with the bias in bfloat16, and takes MKL in float32, which is a tenth slower.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt_lightning.kernels.device import is_x86, processor, trains_on_cpu

_LEAST_WORK = 2**25  # multiplications, below which the calls from Python cost more than they spare
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast converts


class FastLinear(nn.Linear):
    """Computes what nn.Linear does and nothing more; elsewhere than in training on a CPU it is nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not trains_on_cpu(x) or x.numel() * weight.shape[0] < _LEAST_WORK:
            return F.linear(x, weight, bias)
        tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
        if torch.is_autocast_enabled("cpu") and all(tensor.dtype in _AUTOCAST for tensor in tensors):
            tensors = [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1 or not onednn_multiplies(*dtypes):
            return F.linear(x, weight, bias)
        output: Tensor = _Linear.apply(*tensors, *[None] * (3 - len(tensors)))
        return output


def is_plain_linear(layer: nn.Module) -> bool:
    """Tells whether another layer may take its place without dropping what a child class adds."""
    return type(layer).forward in (nn.Linear.forward, FastLinear.forward)


def in_compute_dtype(x: Tensor) -> Tensor:
    """Converts x once as autocast would: on a CPU each layer does it anew, which is a twentieth of a step."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


@cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Tells whether oneDNN has products of its own for this dtype on this machine."""
    if not torch.backends.mkldnn.is_available() or not is_x86():
        return False
    supports_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return dtype == torch.float32 or (dtype == torch.bfloat16 and supports_bf16())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x @ weight.T + bias without a gradient, by oneDNN where it is the fastest."""
    if x.device.type != "cpu" or not onednn_multiplies(x.dtype):
        return F.linear(x, weight, bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Computes grad @ weight: on Intel's processors float32 is up to twice as fast by its own library."""
    if grad.dtype == torch.float32 and torch.backends.mkl.is_available() and "Intel" in processor():
        return grad @ weight
    return product(grad, weight.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad_outputs[0]
        rows = grad.reshape(-1, grad.shape[-1])
        x_grad = _input_gradient(grad, weight) if needs_x else None
        weight_grad = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return x_grad, weight_grad, rows.sum(0) if needs_bias else None
