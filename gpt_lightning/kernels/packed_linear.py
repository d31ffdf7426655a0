"""A copy of a model for decoding on a CPU, whose linear layers are the machine's fastest for few rows.

A step of decoding multiplies every weight with a few rows only, so what it costs is reading the weights.
Shapes: M rows of all sequences, D input features, N output features.
"""

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.choose import Shape, choose
from gpt_lightning.kernels.linear import is_plain_linear, onednn_multiplies
from gpt_lightning.kernels.products import IntegerProduct, float_kernels, integer_kernels, make_room

_TINY = torch.finfo(torch.float32).tiny
Model = TypeVar("Model", bound=nn.Module)
Layer = Callable[[Tensor], Tensor]


def packed(
    model: Model, *, quantize: str | None, n_rows: int, kernel: str | None = None
) -> Model:
    """Makes a copy for decoding `n_rows` at a time on a CPU; returns the model where that gains nothing.

    The copy is in evaluation mode and shares all but the linear layers with the model. It may hold their
    weights once more, in the layout of oneDNN or in 8 bits. Under autocast they are kept in its dtype. A
    `kernel` that is not named is chosen by measuring.
    """
    shapes = decoding_shapes(model, quantize=quantize, n_rows=n_rows)
    if not shapes:
        return model
    name = kernel or choose(shapes)
    if quantize is not None:
        # All layers use the rooms in turn: those of a step of decoding, and of the prompts before it.
        room = lru_cache(maxsize=5)(make_room)
        make = partial(integer_kernels()[name], n_rows=n_rows, room=room)
        return _with_layers(model, partial(Int8Linear, make_product=make))
    dtype = getattr(torch, shapes[0].dtype)
    return _with_layers(model, partial(FloatLinear, dtype=dtype, kernel=name, n_rows=n_rows))


def steady_kernel(model: nn.Module, *, quantize: str | None) -> str | None:
    """Names the kernel whose rows have the same bits however many are computed together; None: any has them.

    So it is with the sums of integers, and where a model is left as it is.
    """
    return "packed" if quantize is None and decoding_shapes(model, quantize=None, n_rows=1) else None


def decoding_shapes(model: nn.Module, *, quantize: str | None, n_rows: int) -> list[Shape]:
    """Returns the shape of each layer that a copy for decoding replaces; none where it gains nothing."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    is_whole = bool(layers) and all(map(is_plain_linear, layers)) and all(map(_is_known, model.modules()))
    if not is_whole or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        if quantize is None:
            return []
        raise UserError(
            f"generation.quantize={quantize} is for a whole model on a CPU; leave it out on a GPU, with "
            "tensor parallelism and with layers of your own"
        )
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    dtype = autocast or layers[0].weight.dtype
    if quantize is None and not onednn_multiplies(dtype):
        return []
    name = quantize or str(dtype).removeprefix("torch.")
    sizes = [(layer.out_features, layer.in_features, layer.bias is not None) for layer in layers]
    return [Shape(*size, n_rows, name) for size in sizes]


def _is_known(module: nn.Module) -> bool:
    """Tells whether a module has no hooks, which a copy would drop, and a class that calls its layers.

    Another class may read their weights, which are laid out anew.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    classes = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    return any(kind.__module__.partition(".")[0] in ("torch", "gpt_lightning") for kind in classes)


def _with_layers(model: Model, make: Callable[[nn.Linear], Layer]) -> Model:
    """Makes a copy that shares every tensor and has plain callables in the place of its layers."""
    shallow = copy.copy(model)
    shallow.training, shallow._modules = False, {}
    for name, child in model._modules.items():
        # As plain attributes, which nn.Module would look up in Python, each at every use.
        if isinstance(child, nn.Linear):
            vars(shallow)[name] = make(child)
        elif type(child) is nn.LayerNorm:
            vars(shallow)[name] = partial(
                torch.layer_norm,
                normalized_shape=child.normalized_shape,
                weight=child.weight,
                bias=child.bias,
                eps=child.eps,
            )
        elif isinstance(child, nn.Dropout | nn.Identity):  # drops nothing in evaluation
            vars(shallow)[name] = lambda x: x
        elif child is not None:
            shallow._modules[name] = vars(shallow)[name] = _with_layers(child, make)
    return shallow


class FloatLinear:
    """Multiplies in one dtype by the kernel of this name."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, kernel: str, n_rows: int) -> None:
        weight = layer.weight.detach().to(dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.dtype, self.kernel = dtype, kernel
        self._product = float_kernels(dtype)[kernel](weight, bias, n_rows)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x.to(self.dtype))  # [..., N]


class Int8Linear:
    """Multiplies 8-bit weights, with a scale an output feature, by 8-bit inputs, with a scale a row.

    A row is rounded by its own greatest value, so that its mates in the batch change no bit of it.
    """

    def __init__(self, layer: nn.Linear, make_product: Callable[[Tensor], IntegerProduct]) -> None:
        weight = layer.weight.detach().float()
        if not weight.isfinite().all():
            raise UserError("the model's weights are not finite: they diverged; use an earlier checkpoint")
        steps = weight.abs().amax(dim=1).clamp_min_(_TINY) / 127  # [N]
        self._product = make_product((weight / steps[:, None]).round_().to(torch.int8))
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        self._steps, self._bias = steps, bias.detach().float()
        self._tiny = torch.tensor(_TINY, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        x32 = x if x.dtype == torch.float32 else x.float()
        step = torch.add(self._tiny, x32.abs().amax(dim=-1, keepdim=True), alpha=1 / IntegerProduct.greatest)
        sums = self._product(x32, step)  # [..., N]
        y = torch.addcmul(self._bias, sums.mul_(self._steps), step)
        return y if y.dtype == x.dtype else y.to(x.dtype)
