from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gpt_lightning.kernels.linear import linear, onednn_multiplies

Linear = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_lightning.kernels.linear._LEAST_WORK", 0)


def make_inputs(*, bias: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 7), (11, 7), *([(11,)] if bias else [])]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def output_and_gradients(function: Linear, inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs, *[None] * (3 - len(inputs)))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), [x for x in inputs if x.requires_grad])]


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_f_linear(bias: bool) -> None:
    inputs = make_inputs(bias=bias)
    for actual, expected in zip(output_and_gradients(linear, inputs), output_and_gradients(F.linear, inputs)):
        assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_each_input_may_be_frozen(frozen: int) -> None:
    inputs = make_inputs()
    inputs[frozen].requires_grad_(False)
    for actual, expected in zip(output_and_gradients(linear, inputs), output_and_gradients(F.linear, inputs)):
        assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_autocast_errs_no_more_than_f_linear(bias: bool) -> None:
    """And gives the dtypes that it gives: the output in bfloat16, the gradients in float32."""
    inputs = make_inputs(bias=bias)
    exact = output_and_gradients(F.linear, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (output_and_gradients(function, inputs) for function in (linear, F.linear))
    for actual, other, expected in zip(ours, plain, exact):
        assert actual.dtype == other.dtype
        assert (actual - expected).norm() <= 1.1 * (other - expected).norm()


def test_float64_and_inference_are_f_linears() -> None:
    inputs = make_inputs()
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    for actual, expected in zip(
        output_and_gradients(linear, doubles), output_and_gradients(F.linear, doubles)
    ):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(linear(*inputs), F.linear(*inputs))


@pytest.mark.skipif(not onednn_multiplies(torch.float32), reason="of x86 alone")
def test_training_takes_onednn_for_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare F.linear with itself."""
    assert type(linear(*make_inputs()).grad_fn).__name__ == "_LinearBackward"
    monkeypatch.setattr("gpt_lightning.kernels.linear._LEAST_WORK", 3 * 5 * 7 * 11 + 1)
    assert type(linear(*make_inputs()).grad_fn).__name__ != "_LinearBackward"


def test_dtypes_that_do_not_agree_are_refused_as_by_f_linear() -> None:
    x, weight, bias = make_inputs()
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.double(), weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*(y.double() for y in (x, weight, bias))).dtype == torch.float64


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias = make_inputs()
    gradient = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
