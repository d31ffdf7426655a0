"""The speeds of rotary positions that are scaled for longer texts, against transformers' own."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpt_lightning.model.rope import speeds_of

YARN: dict[str, Any] = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "Llama 3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {**YARN, "factor": 16.0},
    "yarn, by nothing": {**YARN, "factor": 1.0},
    "yarn, told more": {**YARN, "factor": 4.0, "attention_factor": 0.9, "beta_fast": 8, "beta_slow": 0.5},
    "yarn, few positions": {**YARN, "factor": 4.0, "original_max_position_embeddings": 3},
    "yarn, all pairs fast": {**YARN, "factor": 4.0, "original_max_position_embeddings": 10**9},
}


@pytest.mark.parametrize("theta, head_dim", [(1e4, 64), (5e5, 128), (1e6, 6), (150.0, 2)])
@pytest.mark.parametrize("name", SCALINGS)
def test_speeds_and_lengths_are_those_of_transformers(name: str, theta: float, head_dim: int) -> None:
    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters={**scaling, "rope_theta": theta}
    )
    expected, length = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    speeds, ours = speeds_of(theta, head_dim, scaling, torch.device("cpu"))
    assert_close(speeds, expected, rtol=2e-6, atol=0)
    assert ours == pytest.approx(length, rel=1e-12)
