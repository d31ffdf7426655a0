"""Counts the floating-point operations that the model needs for a token, however it is computed."""

from gpt_lightning.model.config import GPTConfig


def training_flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Counts both passes as PaLM's appendix B does (Chowdhery et al., 2022): 6 N + 12 L H Q T.

    N are the weights that multiply: those of the blocks and the head, tied or not, but no rows that are only
    looked up, no biases and no norms. L layers of H heads of the width Q attend over T tokens; all T x T
    pairs count, also those that the causal or the document mask leaves out. Nothing is counted twice that is
    computed again, as activation checkpointing and flash attention's backward pass do.
    """
    n_mlp = 3 if config.activation == "swiglu" else 2
    rows = (2 * config.n_heads + 2 * config.kv_heads) * config.head_dim + n_mlp * config.mlp_width
    n_weights = config.d_model * (config.n_layers * rows + config.vocab_size)
    return 6 * n_weights + 12 * config.n_layers * config.n_heads * config.head_dim * seq_len
