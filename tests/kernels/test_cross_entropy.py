"""What the chunked loss promises beside its value and gradients, which test_expressions.py checks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpt_lightning.kernels.cross_entropy as module
from gpt_lightning.kernels.cross_entropy import linear_cross_entropy


def make_inputs(n_tokens: int = 23, vocab_size: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets, of which a third is not scored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, 12, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, 12, generator=generator).requires_grad_()
    targets = torch.randint(vocab_size, (n_tokens,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets


def test_gradients_flow_through_a_tied_weight() -> None:
    _, weight, targets = make_inputs()
    ids = torch.arange(23) * 4
    loss = linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, targets)
    expected = F.cross_entropy(F.embedding(ids, weight).tanh() @ weight.t(), targets)
    actual_grad, expected_grad = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
    assert_close(actual_grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_sum_over_no_scored_token_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets = make_inputs()
    loss = linear_cross_entropy(hidden, weight, targets.fill_(-100), "sum")
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_sum_does_not_lose_digits() -> None:
    """The sum is held in float64, so that batches may be added up in any order."""
    hidden, weight, targets = make_inputs(n_tokens=5000)
    total = linear_cross_entropy(hidden, weight, targets, "sum")
    assert total.dtype == torch.float64
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="sum")
    assert_close(total, exact, atol=0.0, rtol=1e-7)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_computed(
    monkeypatch: pytest.MonkeyPatch, guard: type[torch.no_grad]
) -> None:
    """Also of parameters, which need gradients whatever the mode."""
    products: list[Tensor] = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        products.append(x)
        return F.linear(x, weight)

    monkeypatch.setattr(module, "product", product)
    hidden, weight, targets = make_inputs()
    weight = torch.nn.Parameter(weight.detach())
    with guard():
        loss = linear_cross_entropy(hidden.detach(), weight, targets)
    assert len(products) == 1
    linear_cross_entropy(hidden, weight, targets)
    assert len(products) == 3
    assert_close(loss, F.cross_entropy(hidden @ weight.t(), targets).detach())


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.n_elements = max([self.n_elements, *sizes])
        return result


@pytest.mark.parametrize("with_gradients", [True, False])
def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch, with_gradients: bool) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 2**16)
    hidden, weight, targets = make_inputs(n_tokens=1000, vocab_size=1009)
    with LargestTensor() as plain:
        F.cross_entropy(hidden @ weight.t(), targets).backward()
    assert plain.n_elements == 1000 * 1009
    with LargestTensor() as chunked, torch.set_grad_enabled(with_gradients):
        loss = linear_cross_entropy(hidden, weight, targets)
        if with_gradients:
            loss.backward()
    assert chunked.n_elements <= 2**16
