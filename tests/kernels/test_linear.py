"""When a linear layer takes oneDNN's products; test_expressions.py holds what they compute to F.linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gpt_lightning.kernels.linear import FastLinear, linear, onednn_multiplies


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_lightning.kernels.linear._LEAST_WORK", 0)


def make_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in [(3, 5, 7), (11, 7), (11,)]]


def test_float64_and_inference_are_f_linears() -> None:
    inputs = make_inputs()
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    for function_inputs, grad in ((doubles, True), (inputs, False)):
        with torch.set_grad_enabled(grad):
            assert torch.equal(linear(*function_inputs), F.linear(*function_inputs))


def test_the_layer_equals_nn_linear() -> None:
    layer = FastLinear(7, 11)
    x = make_inputs()[0]
    assert_close(layer(x), torch.nn.Linear.forward(layer, x), atol=1e-5, rtol=1e-5)


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
