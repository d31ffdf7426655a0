"""A configuration that cannot work is refused at once, with the option, its value, the rule and a remedy."""

import dataclasses

import pytest

from gpt_lightning.model.config import GPTConfig

LINEAR = {"rope_type": "linear", "factor": 4}
LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 64, "high_freq_factor": 4}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}


def scaled(**options: object) -> dict[str, object]:
    return {"positions": "rope", "rope_scaling": {**LINEAR, **options}}


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
        ({"n_kv_heads": 5}, "model.config.n_kv_heads=5 does not divide model.config.n_heads=12; choose "),
        ({"n_kv_heads": 24}, "model.config.n_kv_heads=24 does not divide model.config.n_heads=12; "),
        ({"n_kv_heads": 0}, "model.config.n_kv_heads=0 is below 1; "),
        ({"d_head": -2}, "model.config.d_head=-2 is below 1; "),
        ({"positions": "rope", "d_head": 7}, "model.config.positions=rope turns pairs, and a head has"),
        ({"positions": "alibi"}, "model.config.positions='alibi' is unknown; choose one of learned, rope"),
        ({"norm": "batch"}, "model.config.norm='batch' is unknown; choose one of layer, rms"),
        ({"rope_theta": float("nan"), "positions": "rope"}, "model.config.rope_theta=nan is below 1; "),
        ({"rope_theta": 1e-300, "positions": "rope"}, "model.config.rope_theta=1e-300 is below 1; choose "),
        ({"rope_theta": 5e5}, "model.config.rope_theta=500000.0 is for model.config.positions=rope, "),
        (
            {"rope_scaling": LINEAR},
            "model.config.rope_scaling={'rope_type': 'linear', 'factor': 4} is for model.config.positions=",
        ),
        (scaled(rope_type="ntk"), "model.config.rope_scaling.rope_type='ntk' is unknown; choose "),
        (scaled(rope_type=None), "model.config.rope_scaling.rope_type=None is unknown; choose "),
        (scaled(rope_type="yarn"), "model.config.rope_scaling lacks original_max_position_"),
        (scaled(beta_fast=2), "model.config.rope_scaling.beta_fast is no option of linear; leave it out"),
        (scaled(factor="4"), "model.config.rope_scaling.factor='4' is not a number above 0; give one"),
        (scaled(factor=True), "model.config.rope_scaling.factor=True is not a number above 0; give one"),
        (scaled(factor=10**400), "model.config.rope_scaling.factor=1000"),
        (scaled(factor=0.5), "model.config.rope_scaling.factor=0.5 is below 1; choose "),
        (scaled(**LLAMA3, low_freq_factor=4), "model.config.rope_scaling.low_freq_factor=4 is not below "),
        (scaled(**YARN, beta_slow=32), "model.config.rope_scaling.beta_slow=32 is not below beta"),
        ({**scaled(**YARN), "rope_theta": 1.0}, "model.config.rope_theta=1.0 is not above 1, as yarn"),
        ({"bias": "all"}, "model.config.bias='all' is unknown; choose one of true, false, qkv"),
        ({"bias": 1}, "model.config.bias=1 is unknown; choose one of true, false, qkv"),
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
    assert GPTConfig(d_model=96, activation="swiglu").mlp_width == 256
    assert GPTConfig(n_heads=4, d_model=128, activation="swiglu").mlp_width == 344
    assert GPTConfig(n_heads=5, d_model=36, d_head=8).head_dim == 8
    assert (GPTConfig().kv_heads, GPTConfig(n_kv_heads=4).kv_heads) == (12, 4)
