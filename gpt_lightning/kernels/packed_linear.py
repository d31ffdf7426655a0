"""Linear layers for decoding on a CPU: weights laid out for products of few rows, or held in 8 bits.

A step of decoding multiplies every weight with a few rows only, so what it costs is reading the weights.
PyTorch's own layout reads them at less than half of the speed that the memory has.
Shapes: M rows of all sequences, D input features, N output features.
"""

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.linear import is_plain_linear, onednn_multiplies

_TINY = torch.finfo(torch.float32).tiny
Model = TypeVar("Model", bound=nn.Module)


def packed(model: Model, *, quantize: str | None, n_rows: int) -> Model:
    """Makes a copy for decoding `n_rows` at a time on a CPU; returns the model where that gains nothing.

    The copy is in evaluation mode and shares all but the linear layers with the model. It holds their weights
    once more, in the layout of oneDNN or in 8 bits. Under autocast they are kept in its dtype.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    is_whole = bool(layers) and all(map(is_plain_linear, layers)) and all(map(_is_known, model.modules()))
    if not is_whole or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        if quantize is None:
            return model
        raise UserError(
            f"generation.quantize={quantize} is for a whole model on a CPU; leave it out on a GPU, with "
            "tensor parallelism and with layers of your own"
        )
    if quantize is not None:
        # All layers use the rooms in turn: those of a step of decoding, and of the prompts before it.
        return _with_layers(model, partial(Int8Linear, room=lru_cache(maxsize=5)(make_room)))
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    dtype = autocast or layers[0].weight.dtype
    if not onednn_multiplies(dtype):
        return model
    return _with_layers(model, partial(PackedLinear, dtype=dtype, n_rows=n_rows))


def _is_known(module: nn.Module) -> bool:
    """Tells whether a module has no hooks, which a copy would drop, and a class that calls its layers.

    Another class may read their weights, which are laid out anew.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    classes = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    return any(kind.__module__.partition(".")[0] in ("torch", "gpt_lightning") for kind in classes)


def _with_layers(model: Model, make: Callable[[nn.Linear], "PackedLinear | Int8Linear"]) -> Model:
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


class PackedLinear:
    """Holds a linear layer's weight in the blocks that oneDNN multiplies fastest for so many rows."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, n_rows: int) -> None:
        self.dtype = dtype
        # What PyTorch's own compiler does with constant weights; there is no public name for it.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), n_rows)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x.to(self.dtype), self.weight, self.bias, "none", [], "")  # [..., N]


class Int8Linear:
    """Multiplies 8-bit weights, with a scale an output feature, by 8-bit inputs, with a scale a row.

    PyTorch's kernel finds one scale for all rows, so that a row would be rounded by its batch mates' greatest
    value. Every row is therefore scaled into [-1, 1], and two columns without weight hold these ends.
    """

    def __init__(self, layer: nn.Linear, room: Callable[[torch.Size], tuple[Tensor, Tensor]]) -> None:
        self._weight = _pack_int8(layer.weight.detach().float())
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        self._bias = bias.detach().float()
        self._room = room
        self._multiply = torch.ops.quantized.linear_dynamic.default
        # Without these instructions the kernel's sums of two products overflow at the full range.
        self._reduce_range = not torch.cpu._is_vnni_supported()

    def __call__(self, x: Tensor) -> Tensor:
        x32 = x if x.dtype == torch.float32 else x.float()
        scaled, inside = self._room(x.shape)
        greatest = x32.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)  # [..., 1]
        torch.div(x32, greatest, out=inside)
        product = self._multiply(scaled, self._weight, self._reduce_range)  # [..., N]
        y = torch.addcmul(self._bias, product, greatest)
        return y if y.dtype == x.dtype else y.to(x.dtype)


def _pack_int8(weight: Tensor) -> torch.ScriptObject:
    """Packs a weight [N, D] in 8 bits in the kernel's own layout, with the two columns without weight."""
    if not weight.isfinite().all():
        raise UserError("the model's weights are not finite: they diverged; use an earlier checkpoint")
    scales = weight.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / 127
    integers = nn.functional.pad((weight / scales).round_().to(torch.int8), (0, 2))
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        # PyTorch 2.13 says that quantized tensors will go; the kernel takes its weight in no other form.
        warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(integers, scales[:, 0].double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


def make_room(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Makes room for scaled rows [..., D]: [..., D + 2] that ends in -1 and 1, and its first D."""
    # The dtype is said outright: within a step, bf16-true makes half precision the default.
    scaled = torch.zeros(*shape[:-1], shape[-1] + 2, dtype=torch.float32)
    scaled[..., -2], scaled[..., -1] = -1.0, 1.0
    return scaled, scaled[..., :-2]
