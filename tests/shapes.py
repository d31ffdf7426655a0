"""Shapes of the network that tests are repeated for, beside GPT-2's: each choice is made in one of them."""

from typing import Any

GPT2: dict[str, Any] = {
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu_tanh",
    "qk_norm": False,
    "bias": True,
    "tie_embeddings": True,
}
# All but SHARED are for any number of heads; those of GROUPED share their keys and values.
MODERN: dict[str, Any] = {
    "positions": "rope",
    "norm": "rms",
    "activation": "swiglu",
    "qk_norm": True,
    "bias": False,
}
GROUPED = {**MODERN, "n_kv_heads": 1, "bias": "qkv"}
MIXED: dict[str, Any] = {"positions": "rope", "qk_norm": True, "d_head": 10}  # with layer norms, GELU, biases
SHARED = {**MODERN, "n_heads": 8, "n_kv_heads": 4, "d_head": 6}  # by up to four tensor-parallel peers
SHAPES = {"gpt2": {}, "grouped": GROUPED, "mixed": MIXED}


def by_gpt2s_recipe(model: dict[str, Any]) -> dict[str, Any]:
    """Adds GPT-2's shape and recipe where a configuration's model is silent: else it has the quickstart's."""
    return {
        **model,
        "config": {**GPT2, **model.get("config", {})},
        "optimizer": {"name": "adamw", "weight_decay": 0.1, **model.get("optimizer", {})},
        "schedule": {"shape": "cosine", "min_lr_ratio": 0.1, **model.get("schedule", {})},
    }
