"""Counts the bytes that autograd keeps of a forward pass for the backward pass, beside the parameters.

The formulas follow the layers of `model/gpt.py` and their kernels, tensor by tensor; tests compare them with
what autograd is seen to keep. Compiled blocks keep about as much or less.
Shapes: n tokens of a pass, m those of them between the parallel layers (a part under sequence parallelism),
D d_model, H heads, N heads of keys and values, K head_dim, F the MLP's width, T the length of a row.
"""

from typing import NamedTuple

import torch

from gpt_lightning.kernels.attention import LONG_ROW, MIN_HEAD_DIM, runs_in_blocks
from gpt_lightning.kernels.cpu_attention import scores_kept
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.planning.setup import Setup

INDEX_BYTES = 8
STATISTIC_BYTES = 4


class Activations(NamedTuple):
    """Holds bytes: of a block, of its input, which alone is kept to compute it again, and of all else.

    `narrow_weights` are those of the block's bytes that hold weights as autocast rounds them.
    """

    block: int
    block_input: int
    outside: int
    narrow_weights: int


def kept_activations(setup: Setup) -> Activations:
    config, m = setup.part, _outer_tokens(setup)
    stream = residual_bytes(setup)
    narrow_weights = _converted_weights(setup)
    block = _attention(setup) + _mlp(setup) + 2 * _norm(config, m, stream) + narrow_weights
    outside = _norm(config, m, stream) + setup.pass_tokens * INDEX_BYTES + _positions(setup)
    if setup.tensor_parallel_size > 1:
        outside += setup.pass_tokens  # a byte a token: which of them this peer has the vectors of
    if config.dropout > 0:
        noise = m * config.d_model * (stream if setup.on_cpu else 1)
        block, outside = block + 2 * noise, outside + noise
    return Activations(block, m * config.d_model * stream, outside, narrow_weights)


def total_bytes(kept: Activations, setup: Setup) -> int:
    """Adds up what is kept at the end of a forward pass."""
    a_block = kept.block_input if setup.activation_checkpointing else kept.block
    return setup.config.n_layers * a_block + kept.outside


def residual_bytes(setup: Setup) -> int:
    """Returns the size of a number between the blocks: autocast leaves sums wide, but for ours on a CPU."""
    return setup.compute_bytes if setup.on_cpu else setup.weight_bytes


def _outer_tokens(setup: Setup) -> int:
    return setup.pass_tokens // (setup.tensor_parallel_size if setup.cuts_sequence else 1)


def _norm(config: GPTConfig, tokens: int, item: int) -> int:
    """Counts a norm's input, and its statistics: one a token, or two with the mean."""
    statistics = 1 if config.norm == "rms" else 2
    return tokens * (config.d_model * item + statistics * STATISTIC_BYTES)


def _positions(setup: Setup) -> int:
    """Counts indices into the table, or the angles' sines and cosines, and masks that wait for their use."""
    indices = _n_positions(setup) * INDEX_BYTES
    # Checkpointing holds all that a block is called with.
    mask = _mask_numbers(setup) if setup.activation_checkpointing else 0
    if setup.config.positions == "learned":
        return indices + mask
    tables = 2 * _n_positions(setup) * setup.config.head_dim * 4
    if setup.activation_checkpointing:
        return tables + indices + mask
    return 0 if _turns_narrow(setup) else tables


def _n_positions(setup: Setup) -> int:
    """Counts positions, which each row has of its own where they restart with documents."""
    return setup.pass_tokens if setup.document_mask else setup.seq_len


def _mask_numbers(setup: Setup) -> int:
    """Counts those of a mask of documents, where no kernel does without one."""
    if not setup.document_mask:
        return 0
    if setup.on_cpu:
        needs_none = setup.seq_len >= LONG_ROW
    else:
        needs_none = setup.config.head_dim >= MIN_HEAD_DIM and setup.config.dropout == 0
    return 0 if needs_none else setup.pass_tokens * setup.seq_len


def _turns_narrow(setup: Setup) -> bool:
    """Tells whether sines and cosines are rounded for each layer, which then keeps them."""
    return setup.compute_bytes < 4 and not _normed_wide(setup)


def _normed_wide(setup: Setup) -> bool:
    """Tells whether autocast has the norms of queries and keys computed wide."""
    return setup.config.qk_norm and setup.is_mixed and not setup.on_cpu


def _attention(setup: Setup) -> int:
    config, n, e = setup.part, setup.pass_tokens, setup.compute_bytes
    H, N, K = config.n_heads, config.kv_heads, config.head_dim
    total = _outer_tokens(setup) * config.d_model * e  # the input
    is_grouped, is_changed = H > N, config.positions == "rope" or config.qk_norm
    is_copied = is_grouped and N > 1  # the queries, that lie apart from each other
    tensors = 1 + (is_changed or is_copied) + (is_changed or is_grouped) + is_grouped  # output, q, k, v
    keeps_qkv = not is_grouped or not (is_changed or is_copied)  # of which the others are parts
    if config.qk_norm:
        total += n * (H + N) * STATISTIC_BYTES
        if _normed_wide(setup):
            total += (n * (H + N) + 2) * K * setup.weight_bytes  # the inputs, and the two norms' weights
        else:
            keeps_qkv, tensors = True, tensors + is_copied
    total += n * K * e * (H * tensors + (H + 2 * N) * keeps_qkv)
    if config.positions == "rope" and _turns_narrow(setup):
        total += 4 * _n_positions(setup) * K * e
    return total + _scores(setup)


def _scores(setup: Setup) -> int:
    """Counts the softmax's sums, or its results where a CPU computes them block by block."""
    H, e, T = setup.part.n_heads, setup.compute_bytes, setup.seq_len
    sums = setup.pass_tokens * H * STATISTIC_BYTES
    sums += _mask_numbers(setup) * e
    if not setup.on_cpu:
        return sums
    dropout = setup.config.dropout
    if setup.document_mask and setup.seq_len >= LONG_ROW and dropout == 0:
        return sums + setup.pass_tokens * H * setup.part.head_dim * e  # each document's output, and the row's
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[e]
    shape = (setup.batch_size, T, H, setup.part.head_dim)
    if not setup.document_mask and runs_in_blocks(torch.empty((), dtype=dtype).expand(shape)):
        return scores_kept(*shape[:3], dropout) * (e + (dropout > 0))
    # PyTorch's own kernel has no dropout: it then keeps weights, dropped weights and noise, at most of rows.
    return sums if dropout == 0 else 3 * setup.pass_tokens * H * T * e


def _mlp(setup: Setup) -> int:
    config, e = setup.part, setup.compute_bytes
    inputs = 1
    if config.activation == "swiglu":  # gate, its SiLU, the other factor, the product
        kept = 4
        inputs = 2 if setup.is_mixed and not setup.on_cpu else 1  # autocast converts it for each layer
    else:
        kept = 2
    outer = _outer_tokens(setup) * config.d_model
    return inputs * outer * e + kept * setup.pass_tokens * config.mlp_width * e


def _converted_weights(setup: Setup) -> int:
    """Counts the narrow copies of the weights; a column-parallel layer makes its own for each product.

    What is gathered narrow needs none, and is gathered again for the backward pass.
    """
    if not setup.is_mixed or setup.gathers_rounded:
        return 0
    config = setup.part
    width, F = config.n_heads * config.head_dim, config.mlp_width
    rows = width + F
    if setup.tensor_parallel_size == 1:
        rows += width + 2 * config.kv_heads * config.head_dim
        rows += F * (2 if config.activation == "swiglu" else 1)
    return config.d_model * rows * setup.compute_bytes
