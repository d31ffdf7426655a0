"""The shape of a GPT: one frozen, checked dataclass that everything else derives its sizes from."""

import math
from dataclasses import dataclass

from gpt_lightning.exit_codes import UserError

CHOICES = {
    "positions": ("learned", "rope"),
    "norm": ("layer", "rms"),
    "activation": ("gelu_tanh", "gelu", "swiglu"),
}
ROPE_THETA = 10_000.0
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
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.config.positions=rope turns pairs, and a head has a width of {self.head_dim}; choose "
                "an even model.config.d_head"
            )
        if not 0.0 < self.rope_theta < math.inf:
            raise UserError(f"model.config.rope_theta={self.rope_theta} is not above 0; choose e.g. 10000")
        if self.positions != "rope" and self.rope_theta != ROPE_THETA:
            raise UserError(
                f"model.config.rope_theta={self.rope_theta} is for model.config.positions=rope, not "
                f"{self.positions}; leave it out"
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

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def mlp_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        # Three matrices have as many weights as two then; a multiple of 8 can be cut over devices.
        return 8 * math.ceil(self.d_model / 3) if self.activation == "swiglu" else 4 * self.d_model
