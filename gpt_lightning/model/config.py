"""The shape of a GPT: one frozen, checked dataclass that everything else derives its sizes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt_lightning.exit_codes import UserError

CHOICES = {
    "positions": ("learned", "rope"),
    "norm": ("layer", "rms"),
    "activation": ("gelu_tanh", "gelu", "swiglu"),
}
ROPE_THETA = 10_000.0
_POSITIONS = "original_max_position_embeddings"
# Of each type the options that it needs, and those that it may have.
ROPE_SCALING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", _POSITIONS, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor", _POSITIONS), ("attention_factor", "beta_fast", "beta_slow")),
}
SIZES = (
    *("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "n_kv_heads"),
    *("d_model", "d_head", "d_ff"),
)


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of the network; the defaults are GPT-2 small (124M parameters).

    Args:
        vocab_size: Rows of the token table. On the command line it follows from the tokenizer.
        max_position_embeddings: The longest context the model can see, in tokens; with learned positions the
            rows of their table.
        n_layers: Transformer blocks.
        n_heads: Attention heads per block.
        n_kv_heads: Heads of keys and values, each of which serves as many heads of queries; n_heads when left
            out (grouped queries, Ainslie et al., 2023).
        d_model: Width of the residual stream.
        d_head: Width of a head; d_model / n_heads when left out.
        d_ff: Width of the MLP's hidden layer; when left out 4 * d_model, of swiglu two thirds of that.
        dropout: Probability of dropping an activation in training.
        positions: learned, or rope: queries and keys turned by their positions (Su et al., 2021).
        rope_theta: Base of rope's wave lengths; greater ones for longer contexts.
        rope_scaling: How rope serves more positions than a model was trained with, as Hugging Face writes it:
            rope_type linear, llama3 or yarn, factor, and what else the type takes.
        norm: layer, or rms without mean and bias (Zhang & Sennrich, 2019).
        qk_norm: Whether each head's queries and keys pass an RMS norm.
        activation: gelu_tanh (GPT-2's approximation), gelu (exact) or swiglu (Shazeer, 2020).
        bias: Whether linear layers and layer norms carry a bias; qkv: queries, keys and values alone do.
        tie_embeddings: Whether lm_head shares the token table's weight.
        layer_norm_eps: Added to the variance inside the norms.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int | None = None
    dropout: float = 0.0
    activation: str = "gelu_tanh"
    bias: bool | str = True
    tie_embeddings: bool = True
    layer_norm_eps: float = 1e-5
    n_kv_heads: int | None = None
    d_head: int | None = None
    positions: str = "learned"
    rope_theta: float = ROPE_THETA
    norm: str = "layer"
    qk_norm: bool = False
    rope_scaling: dict[str, int | float | str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.config.{name}={value} is below 1; choose a positive number")
        if self.d_head is None and self.d_model % self.n_heads:
            raise UserError(
                f"model.config.d_model={self.d_model} is not divisible by model.config.n_heads="
                f"{self.n_heads}; choose a multiple of {self.n_heads} or other n_heads"
            )
        if self.n_heads % self.kv_heads:
            raise UserError(
                f"model.config.n_kv_heads={self.n_kv_heads} does not divide model.config.n_heads="
                f"{self.n_heads}; choose one that does"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.config.dropout={self.dropout} is not in [0, 1); choose e.g. 0.1")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(
                    f"model.config.{name}={value!r} is unknown; choose one of {', '.join(choices)}"
                )
        if type(self.bias) is not bool and self.bias != "qkv":
            raise UserError(f"model.config.bias={self.bias!r} is unknown; choose one of true, false, qkv")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise UserError(f"model.config.layer_norm_eps={self.layer_norm_eps} is not in (0, 1); use 1e-5")
        _check_rope(self)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias is True or self.bias == "qkv"

    @property
    def has_other_biases(self) -> bool:
        return self.bias is True

    @property
    def mlp_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        # Three matrices have as many weights as two then; a multiple of 8 can be cut over devices.
        return 8 * math.ceil(self.d_model / 3) if self.activation == "swiglu" else 4 * self.d_model


def _check_rope(config: GPTConfig) -> None:
    if config.positions != "rope":
        for name, default in (("rope_theta", ROPE_THETA), ("rope_scaling", None)):
            if (value := getattr(config, name)) != default:
                rule = f"is for model.config.positions=rope, not {config.positions}"
                raise UserError(f"model.config.{name}={value} {rule}; leave it out")
        return
    if config.head_dim % 2:
        raise UserError(
            f"model.config.positions=rope turns pairs, and a head has a width of {config.head_dim}; choose "
            "an even model.config.d_head"
        )
    if not 1.0 <= config.rope_theta < math.inf:  # below, pairs turn ever faster, until float32 has no number
        raise UserError(f"model.config.rope_theta={config.rope_theta} is below 1; choose e.g. 10000")
    if config.rope_scaling is not None:
        _check_rope_scaling(config.rope_scaling, config.rope_theta)


def _check_rope_scaling(scaling: Mapping[str, int | float | str], theta: float) -> None:
    option, kind = "model.config.rope_scaling", scaling.get("rope_type")
    if kind not in tuple(ROPE_SCALING):
        listing = ", ".join(ROPE_SCALING)
        raise UserError(f"{option}.rope_type={kind!r} is unknown; choose one of {listing}")
    needed, further = ROPE_SCALING[str(kind)]
    values: dict[str, Any] = {name: value for name, value in scaling.items() if name != "rope_type"}
    for name in needed:
        if name not in values:
            raise UserError(f"{option} lacks {name}, which {kind} needs; add it")
    for name, value in values.items():
        if name not in (*needed, *further):
            raise UserError(f"{option}.{name} is no option of {kind}; leave it out")
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise UserError(f"{option}.{name}={value!r} is not a number above 0; give one")
    if values["factor"] < 1:
        raise UserError(f"{option}.factor={values['factor']} is below 1; choose e.g. 4")
    values = {"beta_fast": 32, "beta_slow": 1, **values}
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in values and values[low] >= values[high]:
            raise UserError(f"{option}.{low}={values[low]} is not below {high}={values[high]}; lower it")
    if kind == "yarn" and theta <= 1:
        raise UserError(f"model.config.rope_theta={theta} is not above 1, as yarn needs; choose e.g. 10000")
