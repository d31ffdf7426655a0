"""The products of a linear layer with the few rows of a step of decoding, on a CPU, by the names of kernels.

Which one is fastest depends on the processor, the shape and the dtype; `choose.py` measures it. In float32
and bfloat16 they round differently, within the dtype; the sums of integers are exact, whoever computes them.
Every private operator of PyTorch that decoding alone uses is called here; those for integers are left out
where this PyTorch lacks them.
Shapes: M rows of all sequences, D input features, N output features.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.device import is_x86
from gpt_lightning.kernels.linear import onednn_multiplies, product

Product = Callable[[Tensor], Tensor]  # [..., D] to [..., N]
Room = Callable[[torch.Size], tuple[Tensor, Tensor]]
# Without VNNI the kernels for x86 add two products in 16 bits, which overflow at the full range.
_INT8_FITS = torch.cpu._is_vnni_supported() or not is_x86()
_VECTORS = 32  # numbers that a loop over a tensor takes at once, with AVX-512
_ONE_SUM = 1024  # inputs, of which oneDNN adds up one row's products as those of several rows
_ZERO = 128  # stands for 0 where integers have no sign


def float_kernels(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor | None, int], Product]]:
    """Returns what makes a product of weight [N, D], bias and number of rows, the plainest first."""
    kernels: dict[str, Callable[[Tensor, Tensor | None, int], Product]] = {"linear": _linear}
    if dtype != torch.float32:  # where F.linear is no slower with one row
        kernels["one_row"] = OneRowProduct
    if onednn_multiplies(dtype):
        kernels["packed"] = PackedProduct
    return kernels


def _linear(weight: Tensor, bias: Tensor | None, n_rows: int) -> Product:
    return partial(F.linear, weight=weight, bias=bias)


class OneRowProduct:
    """Multiplies one row as a vector, and the many of a prompt as in training."""

    def __init__(self, weight: Tensor, bias: Tensor | None, n_rows: int) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1]:
            return product(x, self._weight, self._bias)
        y = torch.mv(self._weight, x.flatten())
        return (y if self._bias is None else y.add_(self._bias)).view(*x.shape[:-1], -1)


class PackedProduct:
    """Holds the weight in the blocks that oneDNN multiplies fastest for so many rows.

    Where it is made for several, a row has the same bits however many of them there are. One row alone is
    computed twice where its sum is so long that it would be added up in another order. Rows lie apart by
    whole vectors of the processor: what is computed of each number then, such as SiLU, would else round by
    where in a vector that lies.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, n_rows: int) -> None:
        self._n_outputs, n_inputs = weight.shape
        self._is_apart = bool(n_more := -self._n_outputs % _VECTORS)
        if self._is_apart:
            weight = F.pad(weight, (0, 0, 0, n_more))
            bias = None if bias is None else F.pad(bias, (0, n_more))
        # What PyTorch's own compiler does with constant weights; there is no public name for it.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
        self._bias, self._doubles = bias, n_rows > 1 and n_inputs > _ONE_SUM
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        is_one = self._doubles and x.numel() == x.shape[-1]
        rows = x.expand(2, *x.shape[1:]) if is_one else x
        output: Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        if self._is_apart:
            output = output[..., : self._n_outputs]
        return output[:1] if is_one else output


class IntegerProduct:
    """Rounds x / step to integers of at most `greatest` a side, and sums their products with the weight's.

    The sums, [..., N] in float32, have the same bits whatever kernel computes them, and whatever is beside.
    """

    greatest = 127 if _INT8_FITS else 63

    def __init__(self, integers: Tensor, n_rows: int, room: Room) -> None:
        self._integers = integers  # [N, D]

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        # In float64, which holds any such sum.
        return F.linear(torch.div(x, step).round_().double(), self._integers.double()).float()


class OneDNNIntegerProduct(IntegerProduct):
    """Calls oneDNN, as PyTorch's compiler does for a quantized model.

    It is given x + 128, without a sign: of signed numbers it has no fast product without AMX (ref_int8, some
    thousand times slower on a Zen 4).
    """

    def __init__(self, integers: Tensor, n_rows: int, room: Room) -> None:
        n_outputs, n_inputs = integers.shape
        self._weight = torch.ops.onednn.qlinear_prepack(integers, [n_rows, n_inputs])
        self._scales = torch.ones(n_outputs, dtype=torch.float32)
        self._zeros = torch.zeros(n_outputs, dtype=torch.int32)
        self._multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        rows = torch.div(x, step).round_().add_(_ZERO).to(torch.uint8)
        weight = self._weight, self._scales, self._zeros
        output: Tensor = self._multiply(
            rows, 1.0, _ZERO, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return output


class QuantizedTensorProduct(IntegerProduct):
    """Calls the kernel for quantized tensors, which finds one scale for all rows by their ends.

    Two columns without weight hold the ends with which that scale is 1.
    """

    def __init__(self, integers: Tensor, n_rows: int, room: Room) -> None:
        padded, zeros = F.pad(integers, (0, 2)), torch.zeros(len(integers), dtype=torch.long)
        with warnings.catch_warnings():
            # PyTorch 2.13 says that quantized tensors will go; the kernel takes its weight in no other form.
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            scales = torch.ones(len(integers), dtype=torch.float64)
            quantized = torch._make_per_channel_quantized_tensor(padded, scales, zeros, 0)
            self._weight = torch.ops.quantized.linear_prepack(quantized, None)
        self._multiply = torch.ops.quantized.linear_dynamic.default
        self._reduce_range, self._room = not _INT8_FITS, room

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        scaled, inside = self._room(x.shape)
        # Rounded here: some of the kernels round after adding 128, which turns what is nearly a tie.
        torch.round(torch.div(x, step), out=inside)
        try:
            output: Tensor = self._multiply(scaled, self._weight, self._reduce_range)
        except RuntimeError as error:  # which it raises where it finds no ends
            if not inside.isnan().any():
                raise
            raise UserError(
                "the model's activations are not finite: its weights diverged; use an earlier checkpoint"
            ) from error
        return output


class FewRowsProduct(IntegerProduct):
    """Calls the kernel for quantized tensors with few rows, and oneDNN with those of a prompt.

    With many rows the former takes up to eight times as long. The weight is held twice, in a byte each.
    """

    def __init__(self, integers: Tensor, n_rows: int, room: Room) -> None:
        self._n_rows = n_rows
        self._few = QuantizedTensorProduct(integers, n_rows, room)
        self._many = OneDNNIntegerProduct(integers, n_rows, room)

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        kernel = self._few if x.numel() <= self._n_rows * x.shape[-1] else self._many
        return kernel(x, step)


@torch.inference_mode(False)  # whose tensors no later call without it could write
def make_room(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Makes room for rows [..., D]: [..., D + 2] that ends in the ends, and its first D."""
    # The dtype is said outright: within a step, bf16-true makes half precision the default.
    scaled = torch.zeros(*shape[:-1], shape[-1] + 2, dtype=torch.float32)
    scaled[..., -2], scaled[..., -1] = -1.0 - IntegerProduct.greatest, IntegerProduct.greatest
    return scaled, scaled[..., :-2]


def integer_kernels() -> dict[str, type[IntegerProduct]]:
    """Returns what makes a product of 8-bit weights on this machine, the plainest first."""
    kernels: dict[str, type[IntegerProduct]] = {"plain": IntegerProduct}
    # oneDNN adds 128 to the inputs, with which they overflow without VNNI whatever their range.
    if _INT8_FITS and onednn_multiplies(torch.float32) and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        kernels["onednn"] = OneDNNIntegerProduct
    if torch.backends.quantized.engine != "none" and hasattr(torch.ops.quantized, "linear_dynamic"):
        kernels["quantized"] = FewRowsProduct if "onednn" in kernels else QuantizedTensorProduct
    return kernels
