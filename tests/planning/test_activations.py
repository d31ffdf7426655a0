"""The formulas of what is kept for the backward pass equal what autograd is seen to keep."""

from dataclasses import replace

import pytest
import torch

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.planning.activations import kept_activations, total_bytes
from gpt_lightning.planning.setup import Setup
from tests.planning.kept import as_on_gpu, bytes_kept

GPT2 = GPTConfig(vocab_size=997, max_position_embeddings=300, n_layers=3, n_heads=6, d_model=192)
MODERN = replace(GPT2, n_kv_heads=2, positions="rope", norm="rms", activation="swiglu", qk_norm=True)
MODERN = replace(MODERN, bias=False)
SHAPES = {
    "gpt2": GPT2,
    "narrow gpt2": replace(GPT2, d_model=60, n_heads=5, n_layers=2, d_ff=100),
    "no biases": replace(GPT2, bias=False, tie_embeddings=False),
    "modern": MODERN,
    "llama": replace(MODERN, qk_norm=False, n_kv_heads=None),
    "qwen2": replace(MODERN, qk_norm=False, bias="qkv", d_head=48),
    "qk_norm alone": replace(GPT2, qk_norm=True),
    "grouped alone": replace(GPT2, n_kv_heads=3),
    "one head of keys": replace(GPT2, n_kv_heads=1),
}


def counted(setup: Setup) -> int:
    """All that is kept, without what the loss keeps: the gradients of its inputs."""
    torch.manual_seed(0)
    model = GPTModel(setup.config, setup.activation_checkpointing)
    ids = torch.randint(setup.config.vocab_size, (setup.batch_size, setup.seq_len))
    bf16 = setup.precision == "bf16-mixed"

    documents = (ids == 0).cumsum(1) + (ids == 1).cumsum(1) if setup.document_mask else None

    def forward() -> torch.Tensor:
        return model.hidden_states(ids, document_ids=documents)

    if setup.on_cpu:
        return bytes_kept(model, model.blocks, forward, bf16=bf16)
    with as_on_gpu(bf16):
        return bytes_kept(model, model.blocks, forward, bf16=False)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_equals_what_autograd_keeps(
    shape: str, on_cpu: bool, precision: str, checkpointing: bool
) -> None:
    setup = Setup(
        SHAPES[shape],
        seq_len=300,
        batch_size=2,
        precision=precision,
        activation_checkpointing=checkpointing,
        on_cpu=on_cpu,
    )
    assert total_bytes(kept_activations(setup), setup) == counted(setup)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_dropout_keeps_its_noise(precision: str) -> None:
    config = replace(GPT2, dropout=0.1, n_heads=3)
    setup = Setup(config, seq_len=300, batch_size=8, precision=precision, on_cpu=True)  # in blocks
    assert total_bytes(kept_activations(setup), setup) == counted(setup)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("seq_len", [300, 520], ids=["by a mask", "one by one"])
@pytest.mark.parametrize("shape", ["gpt2", "modern", "llama"])
def test_documents_keep_their_masks_or_outputs(
    shape: str, seq_len: int, precision: str, checkpointing: bool
) -> None:
    setup = Setup(
        replace(SHAPES[shape], max_position_embeddings=seq_len),
        seq_len,
        batch_size=3,
        precision=precision,
        activation_checkpointing=checkpointing,
        document_mask=True,
        on_cpu=True,
    )
    assert total_bytes(kept_activations(setup), setup) == counted(setup)
