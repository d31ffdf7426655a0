from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import gpt_lightning.kernels.cpu_attention as attention
from gpt_lightning.kernels.cpu_attention import BLOCK, attention_in_blocks
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import CausalSelfAttention, GPTModel

LENGTHS = [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 7]
LONG = 8 * BLOCK


def make_qkv(T: int, *, B: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    return torch.randn(B, T, 2, 3, 6, generator=generator).to(dtype).requires_grad_()


def by_pytorch(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(3, 0, 2, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def output_and_gradient(function: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    output = function(qkv)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    return output.detach(), torch.autograd.grad((output * weights).sum(), qkv)[0]


@pytest.mark.parametrize("keeps_scores", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [1, 2, 99])
@pytest.mark.parametrize("T", LENGTHS)
def test_output_and_gradient_equal_pytorchs(
    monkeypatch: pytest.MonkeyPatch, T: int, rows_at_a_time: int, keeps_scores: bool
) -> None:
    monkeypatch.setattr(attention, "_SCORES_KEPT", 2**24 if keeps_scores else 0)
    monkeypatch.setattr(attention, "_SCORE_BYTES_AT_A_TIME", rows_at_a_time * 8 * T * min(T, BLOCK))
    qkv = make_qkv(T)
    for actual, expected in zip(
        output_and_gradient(lambda x: attention_in_blocks(x, 0.0), qkv), output_and_gradient(by_pytorch, qkv)
    ):
        assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [*LENGTHS, LONG])
def test_bfloat16_errs_no_more_than_plain_products(T: int) -> None:
    """Which round scores and weights, as ours; the fused kernel holds them in float32."""

    def plain_products(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        future = torch.full((T, T), -torch.inf, dtype=qkv.dtype).triu(1)
        return ((q @ k.mT / 6**0.5 + future).softmax(-1) @ v).transpose(1, 2).flatten(2)

    exact = output_and_gradient(by_pytorch, make_qkv(T))
    low = make_qkv(T, dtype=torch.bfloat16)
    ours = output_and_gradient(lambda x: attention_in_blocks(x, 0.0), low)
    plain = output_and_gradient(plain_products, low)
    for actual, other, expected in zip(ours, plain, exact):
        # A single token's gradient of q and k is 0, and so is the difference of both from it.
        assert (actual - expected).norm() <= 1.05 * (other - expected).norm() + 1e-6


@pytest.mark.parametrize("keeps_scores", [True, False])
def test_no_token_sees_a_later_one(monkeypatch: pytest.MonkeyPatch, keeps_scores: bool) -> None:
    """Neither in the output nor, the other way round, in the gradient."""
    monkeypatch.setattr(attention, "_SCORES_KEPT", 2**24 if keeps_scores else 0)
    T, place = BLOCK + 40, BLOCK + 7
    qkv = make_qkv(T)
    changed = qkv.detach().clone()
    changed[:, place] += 100.0
    before, after = (attention_in_blocks(x, 0.0) for x in (qkv, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])
    gradient = torch.autograd.grad(before[:, :place].sum(), qkv)[0]
    assert not gradient[:, place:].any() and gradient[:, :place].any()


@pytest.mark.parametrize("T", [5, BLOCK + 1])
def test_dropout_has_the_gradient_of_what_it_drops(T: int) -> None:
    """Compared with the formula written out, and the drops that the seed gives."""

    def written_out(qkv: Tensor) -> Tensor:
        torch.manual_seed(3)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        scores = q @ k.mT / 6**0.5 + torch.full((T, T), -torch.inf).triu(1)
        stays = torch.zeros(3, 2, T, T)
        for start in range(0, T, BLOCK):
            end = min(T, start + BLOCK)
            drawn = torch.empty(6, end - start, end, dtype=torch.bool).bernoulli_(0.75)
            stays[:, :, start:end, :end] = drawn.view(3, 2, end - start, end)
        return (scores.softmax(-1) * stays / 0.75 @ v).transpose(1, 2).flatten(2)

    def ours(qkv: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_in_blocks(qkv, 0.25)

    qkv = make_qkv(T)
    for actual, expected in zip(output_and_gradient(ours, qkv), output_and_gradient(written_out, qkv)):
        assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_finite_differences() -> None:
    qkv = torch.randn(2, 5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: attention_in_blocks(x, 0.0), qkv)


def test_the_layer_attends_in_blocks_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no test of the model would see them."""
    monkeypatch.setattr("gpt_lightning.kernels.cpu_attention._LEAST_WORK", {torch.float32: 2 * 2 * 9 * 9 * 8})
    monkeypatch.setattr("gpt_lightning.kernels.cpu_attention.onednn_multiplies", lambda dtype: dtype == torch.float32)
    calls: list[Tensor] = []
    monkeypatch.setattr(
        "gpt_lightning.model.gpt.attention_in_blocks", lambda x, p: calls.append(x) or attention_in_blocks(x, p)
    )
    layer = CausalSelfAttention(GPTConfig(vocab_size=8, n_heads=2, d_model=16, dropout=0.0))
    x = torch.randn(2, 9, 16)
    trained = layer(x, None, None, 0)
    assert len(calls) == 1
    with torch.no_grad():
        assert_close(layer(x, None, None, 0), trained.detach(), atol=1e-5, rtol=1e-5)
    layer(x[:, :8], None, None, 0)
    layer.double()(x.double(), None, None, 0)
    assert len(calls) == 1


def test_dropout_keeps_the_mean() -> None:
    qkv = make_qkv(BLOCK).detach()
    qkv[:, :, :, 2] = 1.0
    torch.manual_seed(0)
    outputs = torch.stack([attention_in_blocks(qkv, 0.25) for _ in range(50)])
    assert abs(outputs.mean() - 1.0) < 0.01
    assert outputs.std() > 0.01


@pytest.mark.parametrize("least_work", [0, 2**30])
def test_the_layer_drops_in_training_alone(least_work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CausalSelfAttention(GPTConfig(vocab_size=8, n_heads=2, d_model=16, dropout=0.5))
    monkeypatch.setattr("gpt_lightning.kernels.cpu_attention._LEAST_WORK", {torch.float32: least_work})
    x = torch.randn(2, 9, 16)
    first, second = (layer(x, None, None, 0) for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    first, second = (layer(x, None, None, 0) for _ in range(2))
    assert torch.equal(first, second)


def test_scores_of_long_rows_are_not_kept() -> None:
    """What the backward pass holds grows with the tokens of a row, not with their square."""

    def held(T: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            attention_in_blocks(make_qkv(T, B=8), 0.0)
        return sum(sizes)

    assert held(2048) == 8 * 2048 * 36


def test_a_model_has_the_same_loss_and_gradients_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    T = BLOCK + 9
    model = GPTModel(GPTConfig(vocab_size=50, max_position_embeddings=T, n_layers=2, n_heads=2, d_model=16))
    tokens = torch.randint(50, (3, T))
    found = []
    for least_work in (0, 2**40):
        monkeypatch.setattr("gpt_lightning.kernels.cpu_attention._LEAST_WORK", {torch.float32: least_work})
        monkeypatch.setattr("gpt_lightning.kernels.linear._LEAST_WORK", least_work)
        loss = model(tokens, tokens).loss
        assert loss is not None
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, plain in zip(*found):
        assert_close(ours, plain, atol=1e-5, rtol=1e-4)
