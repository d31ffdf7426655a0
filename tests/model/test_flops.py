"""The formula against PyTorch's own count of what a training step does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.flops import training_flops_per_token
from gpt_lightning.model.gpt import GPTModel
from tests.shapes import GROUPED

WIDE = GPTConfig(300, 64, n_layers=2, n_heads=2, d_model=64)
LONG = GPTConfig(50, 128, n_layers=3, n_heads=4, d_model=32, d_ff=100, tie_embeddings=False, bias=False)
GATED = GPTConfig(50, 96, n_layers=2, n_heads=6, d_model=36, d_head=10, **{**GROUPED, "n_kv_heads": 2})
HEAD = GPTConfig(3001, 16, n_layers=1, n_heads=1, d_model=24)


@pytest.fixture(autouse=True)
def plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch cannot count oneDNN's products, and attention in blocks leaves out what is masked."""
    monkeypatch.setattr("gpt_lightning.kernels.linear.onednn_multiplies", lambda dtype: False)
    monkeypatch.setattr("gpt_lightning.kernels.attention.runs_in_blocks", lambda q: False)


def counted(config: GPTConfig, batch: int, seq_len: int, *, recompute: bool = False) -> int:
    model = GPTModel(config, activation_checkpointing=recompute)
    tokens = torch.randint(config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0))
    # PyTorch counts no fused attention on the CPU, and what flash attention computes twice, twice.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens, tokens).loss
        assert loss is not None
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "config, batch, seq_len", [(WIDE, 3, 64), (LONG, 2, 100), (HEAD, 5, 7), (GATED, 2, 90)]
)
def test_flops_are_those_that_pytorch_counts(config: GPTConfig, batch: int, seq_len: int) -> None:
    expected = training_flops_per_token(config, seq_len) * batch * seq_len
    assert counted(config, batch, seq_len) == pytest.approx(expected, rel=0.02)


def test_what_is_computed_again_is_no_work_of_the_model() -> None:
    expected = training_flops_per_token(WIDE, 64) * 2 * 64
    assert counted(WIDE, 2, 64, recompute=True) > 1.1 * expected


def test_gpt2_small_at_1024() -> None:
    """12 * 12 * 768^2 + 768 * 50257 weights that multiply, and attention to 1024 places."""
    n_weights = 84_934_656 + 38_597_376
    assert training_flops_per_token(GPTConfig(), 1024) == 6 * n_weights + 12 * 12 * 768 * 1024
