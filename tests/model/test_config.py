"""A configuration that cannot work is refused at once, with the option, its value, the rule and a remedy."""

import dataclasses

import pytest

from gpt_lightning.model.config import GPTConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "model.config.vocab_size=0 is below 1; "),
        ({"max_position_embeddings": -1}, "model.config.max_position_embeddings=-1 is below 1; "),
        ({"n_layers": 0}, "model.config.n_layers=0 is below 1; "),
        ({"n_heads": 0}, "model.config.n_heads=0 is below 1; "),
        ({"d_model": 0}, "model.config.d_model=0 is below 1; "),
        ({"d_ff": 0}, "model.config.d_ff=0 is below 1; "),
        ({"d_model": 100}, "model.config.d_model=100 is not divisible by model.config.n_heads=12; choose "),
        ({"n_heads": 40, "d_model": 36}, "model.config.d_model=36 is not divisible by model"),
        ({"dropout": 1.0}, "model.config.dropout=1.0 is not in [0, 1); "),
        ({"dropout": -0.1}, "model.config.dropout=-0.1 is not in [0, 1); "),
        ({"activation": "relu"}, "model.config.activation='relu' is unknown; choose one of gelu_tanh, gelu"),
        ({"layer_norm_eps": 0.0}, "model.config.layer_norm_eps=0.0 is not in (0, 1); "),
    ],
)
def test_errors_name_option_value_rule_and_remedy(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        GPTConfig(**options)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_heads = 6  # type: ignore[misc]


def test_derived_sizes_follow_the_fields() -> None:
    assert GPTConfig().head_dim == 64
    assert GPTConfig(n_heads=3, d_model=36).head_dim == 12
    assert GPTConfig(n_heads=3, d_model=36).mlp_width == 144
    assert GPTConfig(n_heads=3, d_model=36, d_ff=50).mlp_width == 50
