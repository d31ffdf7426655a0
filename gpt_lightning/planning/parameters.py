"""Counts a model's parameters by its parts, without building it."""

from typing import NamedTuple

from gpt_lightning.model.config import GPTConfig


class Parameters(NamedTuple):
    """Counts parameters: of the token table, of positions, of blocks, of the last norm, of an untied head.

    `matrices` are the weights of the blocks' linear layers, which Muon updates, `biases` and `norms` all else
    in the blocks.
    """

    tokens: int
    positions: int
    matrices: int
    biases: int
    norms: int
    last_norm: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def blocks(self) -> int:
        return self.matrices + self.biases + self.norms

    @property
    def rounded(self) -> int:
        """Counts those that `gather_dtype` rounds: of the blocks' linear layers."""
        return self.matrices + self.biases

    @property
    def multiplied(self) -> int:
        """Counts those that multiply in a forward pass; a head that is tied multiplies too."""
        return self.matrices + (self.head or self.tokens)


def count_parameters(config: GPTConfig) -> Parameters:
    D, width = config.d_model, config.n_heads * config.head_dim
    rows = width + 2 * config.kv_heads * config.head_dim
    has_gate = config.activation == "swiglu"
    matrices = D * (rows + width + (3 if has_gate else 2) * config.mlp_width)
    norm = norm_parameters(config)
    biases = rows if config.has_qkv_bias else 0
    if config.has_other_biases:
        biases += 2 * D + (2 if has_gate else 1) * config.mlp_width
    return Parameters(
        tokens=config.vocab_size * D,
        positions=config.max_position_embeddings * D if config.positions == "learned" else 0,
        matrices=config.n_layers * matrices,
        biases=config.n_layers * biases,
        norms=config.n_layers * (2 * norm + (2 * config.head_dim if config.qk_norm else 0)),
        last_norm=norm,
        head=0 if config.tie_embeddings else config.vocab_size * D,
    )


def norm_parameters(config: GPTConfig) -> int:
    """Counts those of one norm of the residual stream."""
    return config.d_model * (2 if config.norm == "layer" and config.has_other_biases else 1)
