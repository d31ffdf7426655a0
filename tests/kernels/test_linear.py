"""When a linear layer takes oneDNN's products; test_expressions.py holds what they compute to F.linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gpt_lightning.kernels.linear import FastLinear, is_plain_linear, onednn_multiplies
from gpt_lightning.model.gpt import Linear
from tests.kernels.test_expressions import fast_linear as linear


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


class Adapted(FastLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum()


def test_only_what_adds_nothing_is_plain() -> None:
    assert is_plain_linear(torch.nn.Linear(2, 3)) and is_plain_linear(Linear(2, 3, bias=True))
    assert not is_plain_linear(Adapted(2, 3)) and not is_plain_linear(torch.nn.Embedding(2, 3))


@pytest.mark.skipif(not onednn_multiplies(torch.float32), reason="of x86 alone")
def test_training_takes_onednn_for_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare F.linear with itself."""
    assert type(linear(*make_inputs()).grad_fn).__name__ == "_LinearBackward"
    monkeypatch.setattr("gpt_lightning.kernels.linear._LEAST_WORK", 3 * 5 * 7 * 11 + 1)
    assert type(linear(*make_inputs()).grad_fn).__name__ != "_LinearBackward"


@pytest.mark.parametrize("processor", ["Intel", "another"])
@pytest.mark.parametrize("n_outputs", [5, 11])  # narrower and wider than the inputs
def test_gradients_are_f_linears_on_every_processor(
    processor: str, n_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_lightning.kernels.linear.processor", lambda: processor)
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 5, 7), (n_outputs, 7), (n_outputs,)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    grad = torch.randn(3, 5, n_outputs, generator=generator)
    for found, expected in zip(
        torch.autograd.grad(linear(*inputs), inputs, grad),
        torch.autograd.grad(F.linear(*inputs), inputs, grad),
        strict=True,
    ):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dtypes_that_do_not_agree_are_refused_as_by_f_linear() -> None:
    x, weight, bias = make_inputs()
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.double(), weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*(y.double() for y in (x, weight, bias))).dtype == torch.float64
