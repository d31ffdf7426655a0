"""When attention goes block by block, and what it keeps; test_expressions.py holds it to plain products."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import gpt_lightning.kernels.attention as attention
import gpt_lightning.kernels.cpu_attention as cpu_attention
from gpt_lightning.kernels.cpu_attention import BLOCK, attention_in_blocks
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import CausalSelfAttention, GPTModel


def make_qkv(T: int, *, B: int = 3) -> Tensor:
    """Queries, keys and values [3, B, T, H, K]."""
    return torch.randn(3, B, T, 2, 6, generator=torch.Generator().manual_seed(T)).requires_grad_()


@pytest.mark.parametrize("kept", [2**24, 0])
def test_no_token_sees_a_later_one(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Neither in the output nor, the other way round, in the gradient."""
    monkeypatch.setattr(cpu_attention, "_SCORES_KEPT", kept)
    T, place = BLOCK + 40, BLOCK + 7
    qkv = make_qkv(T)
    changed = qkv.detach().clone()
    changed[:, :, place] += 100.0
    before, after = (attention_in_blocks(*x, 0.0) for x in (qkv, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])
    gradient = torch.autograd.grad(before[:, :place].sum(), qkv)[0]
    assert not gradient[:, :, place:].any() and gradient[:, :, :place].any()


def attend(layer: CausalSelfAttention, x: Tensor) -> Tensor:
    return layer(x, attention.Attend(x, head_dim=layer.head_dim, dropout_p=0.0), lambda x: x)


def test_the_layer_attends_in_blocks_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no test of the model would see them."""
    monkeypatch.setattr(attention, "_LEAST_WORK", {torch.float32: 2 * 2 * 9 * 9 * 8})
    monkeypatch.setattr(attention, "onednn_multiplies", lambda dtype: dtype == torch.float32)
    calls: list[Tensor] = []
    monkeypatch.setattr(
        attention, "attention_in_blocks", lambda q, *rest: calls.append(q) or attention_in_blocks(q, *rest)
    )
    layer = CausalSelfAttention(GPTConfig(vocab_size=8, n_heads=2, d_model=16, dropout=0.0))
    x = torch.randn(2, 9, 16)
    trained = attend(layer, x)
    assert len(calls) == 1
    with torch.no_grad():
        assert_close(attend(layer, x), trained.detach(), atol=1e-5, rtol=1e-5)
    attend(layer, x[:, :8])
    attend(layer.double(), x.double())
    assert len(calls) == 1


@pytest.mark.parametrize("least_work", [0, 2**30])
def test_the_layer_drops_in_training_alone(least_work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CausalSelfAttention(GPTConfig(vocab_size=8, n_heads=2, d_model=16, dropout=0.5))
    monkeypatch.setattr(attention, "_LEAST_WORK", {torch.float32: least_work})
    x = torch.randn(2, 9, 16)
    for training in (True, False):
        layer.train(training)
        assert torch.equal(attend(layer, x), attend(layer, x)) is not training


def test_scores_of_long_rows_are_not_kept() -> None:
    """What the backward pass holds grows with the tokens of a row, not with their square."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attention_in_blocks(*make_qkv(2048, B=8), 0.0)
    assert sum(sizes) == 8 * 2048 * 36


def test_a_model_has_the_same_loss_and_gradients_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    T = BLOCK + 9
    model = GPTModel(GPTConfig(vocab_size=50, max_position_embeddings=T, n_layers=2, n_heads=2, d_model=16))
    tokens = torch.randint(50, (3, T))
    found = []
    for least_work in (0, 2**40):
        monkeypatch.setattr(attention, "_LEAST_WORK", {torch.float32: least_work})
        monkeypatch.setattr("gpt_lightning.kernels.linear._LEAST_WORK", least_work)
        loss = model(tokens, tokens).loss
        assert loss is not None
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, plain in zip(*found):
        assert_close(ours, plain, atol=1e-5, rtol=1e-4)
