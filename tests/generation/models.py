"""Small models of random weights, and prompts for them."""

from typing import Any

import torch

from gpt_lightning.config import GPTConfig
from gpt_lightning.model import GPTModel


def make_model(seed: int = 0, **changes: Any) -> GPTModel:
    """Odd sizes and weights large enough that every token, position and bias matters."""
    # A tied model of random weights repeats its last token.
    sizes = dict(vocab_size=101, max_position_embeddings=64, n_layers=2, n_heads=3, d_model=36)
    config = GPTConfig(**{**sizes, "dropout": 0.0, "tie_embeddings": False, **changes})
    model = GPTModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(101, (length,), generator=generator).tolist() for length in lengths]
