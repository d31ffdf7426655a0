"""The shape of a GPT: one frozen, checked dataclass that everything else derives its sizes from."""

from dataclasses import dataclass

from gpt_lightning.exit_codes import UserError

ACTIVATIONS = ("gelu_tanh", "gelu")


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of the network; the defaults are GPT-2 small (124M parameters).

    Args:
        vocab_size: Rows of the token table. On the command line it follows from the tokenizer.
        max_position_embeddings: Rows of the position table: the longest context the model can see, in tokens.
        n_layers: Transformer blocks.
        n_heads: Attention heads per block; divides d_model.
        d_model: Width of the residual stream.
        d_ff: Width of the MLP's hidden layer; 4 * d_model when left out.
        dropout: Probability of dropping an activation in training.
        activation: gelu_tanh (GPT-2's approximation) or gelu (exact).
        bias: Whether linear layers and layer norms carry a bias.
        tie_embeddings: Whether lm_head shares the token table's weight.
        layer_norm_eps: Added to the variance inside the layer norms.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int | None = None
    dropout: float = 0.0
    activation: str = "gelu_tanh"
    bias: bool = True
    tie_embeddings: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "d_model", "d_ff"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.config.{name}={value} is below 1; choose a positive number")
        if self.d_model % self.n_heads:
            raise UserError(
                f"model.config.d_model={self.d_model} is not divisible by model.config.n_heads="
                f"{self.n_heads}; choose a multiple of {self.n_heads} or other n_heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.config.dropout={self.dropout} is not in [0, 1); choose e.g. 0.1")
        if self.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise UserError(f"model.config.activation={self.activation!r} is unknown; choose one of {names}")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise UserError(f"model.config.layer_norm_eps={self.layer_norm_eps} is not in (0, 1); use 1e-5")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def mlp_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff
