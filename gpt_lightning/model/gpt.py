"""The whole network, top to bottom: GPT-2, Llama or Qwen, exactly enough to load their weights.

Pre-norm blocks of attention and an MLP. GPT-2 (Radford et al., 2019): learned positions, layer norms, GELU, a
head tied to the token table. Llama (Touvron et al., 2023): rotary positions, RMS norms, SwiGLU, grouped
queries, no biases. Qwen2 (2024): Llama with biases of queries, keys and values; Qwen3 (2025): with a norm of
queries and keys. Constructors choose between them.
Shapes: B batch, T time, D d_model, H heads, N heads of keys and values, G = H / N, K head_dim, V vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt_lightning.kernels.attention import Attend, KVCache
from gpt_lightning.kernels.cross_entropy import linear_cross_entropy
from gpt_lightning.kernels.linear import FastLinear, in_compute_dtype
from gpt_lightning.kernels.rms_norm import FastRMSNorm
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.rope import NoPositionEmbedding, NoRotary, Rotary, Turn

INIT_STD = 0.02


class GPTOutput(NamedTuple):
    """Holds `logits` [B, T, V] without targets, `loss` (a scalar) with them; the other one is None."""

    logits: Tensor | None
    loss: Tensor | None


class Linear(FastLinear):
    """Starts as GPT-2's linear layers do: normal weights, biases of zero.

    `parts` says of a layer that holds several matrices how its rows take turns: so many of each.
    """

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, std: float = INIT_STD, parts: Sequence[int] | None = None
    ) -> None:
        self.std, self.parts = std, parts
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Starts as GPT-2's embeddings do: normal weights."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


def norm(config: GPTConfig, size: int, *, rms: bool) -> nn.Module:
    if rms:
        return FastRMSNorm(size, config.layer_norm_eps)
    return nn.LayerNorm(size, config.layer_norm_eps, bias=config.has_other_biases)


class CausalSelfAttention(nn.Module):
    """Lets each token attend to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        K = self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.group = config.n_heads // config.kv_heads
        # The rows lie group by group (the q heads that share a k and a v, then these): a share of them is
        # whole groups.
        parts = (self.group * K, K, K)
        rows, width, bias = config.kv_heads * sum(parts), config.n_heads * K, config.has_other_biases
        self.qkv_proj = Linear(config.d_model, rows, bias=config.has_qkv_bias, parts=parts)
        self.out_proj = Linear(width, config.d_model, bias=bias, std=_residual_std(config))
        self.q_norm = norm(config, K, rms=True) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, K, rms=True) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, attend: Attend, turn: Turn) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(2, (-1, self.group + 2, self.head_dim))  # [B, T, N, G + 2, K]
        q, k, v = (part.flatten(2, 3) for part in qkv.split((self.group, 1, 1), dim=3))  # q [B, T, H, K]
        q, k = turn(self.q_norm(q)), turn(self.k_norm(k))
        y = attend(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.flatten(2))


class MLP(nn.Module):
    """Widens each token's vector, applies GELU, and narrows it again."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        bias = config.has_other_biases
        self.up_proj = Linear(config.d_model, config.mlp_width, bias=bias)
        self.down_proj = Linear(config.mlp_width, config.d_model, bias=bias, std=_residual_std(config))
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))


class GatedMLP(nn.Module):
    """Widens each token's vector twice, multiplies both, one through SiLU, and narrows the product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        bias = config.has_other_biases
        self.gate_proj = Linear(config.d_model, config.mlp_width, bias=bias)
        self.up_proj = Linear(config.d_model, config.mlp_width, bias=bias)
        self.down_proj = Linear(config.mlp_width, config.d_model, bias=bias, std=_residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = norm(config, config.d_model, rms=config.norm == "rms")
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config, config.d_model, rms=config.norm == "rms")
        self.mlp = GatedMLP(config) if config.activation == "swiglu" else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend, turn: Turn) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), attend, turn))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class LMHead(Linear):
    """Maps hidden states to logits, or straight to the loss, which never holds all logits at once."""

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), reduction)


class GPTModel(nn.Module):
    """Maps token ids to logits, or to the loss against targets.

    Each layer draws its own weights (`reset_parameters`) in the order of `modules()`, so that a model built
    on the meta device gets the very same weights later, layer by layer.
    """

    def __init__(self, config: GPTConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding: nn.Module
        self.rotary: nn.Module
        if config.positions == "rope":
            self.position_embedding = NoPositionEmbedding()
            self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        else:
            self.position_embedding = Embedding(config.max_position_embeddings, config.d_model)
            self.rotary = NoRotary()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = norm(config, config.d_model, rms=config.norm == "rms")
        # A tied head draws no weight of its own.
        with torch.device("meta") if config.tie_embeddings else nullcontext():
            self.lm_head = LMHead(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        document_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> GPTOutput:
        """Returns the logits or, with `targets`, the loss.

        Args:
            targets: [B, T], the token that follows each input; -100 is not scored.
            reduction: "mean", or "sum" in float64, of the loss over the scored tokens.
            document_ids: [B, T]; a token attends to its own document only, and positions restart with it.
            kv_cache: Earlier tokens of each row; `input_ids` are the tokens that follow them.
        """
        hidden = self.hidden_states(input_ids, document_ids=document_ids, kv_cache=kv_cache)
        if targets is None:
            return GPTOutput(self.lm_head(hidden), None)
        return GPTOutput(None, self.lm_head.loss(hidden, targets, reduction))

    def hidden_states(
        self, input_ids: Tensor, *, document_ids: Tensor | None = None, kv_cache: KVCache | None = None
    ) -> Tensor:
        """Returns the residual stream after the last norm, [B, T, D], which `lm_head` reads."""
        head_dim, dropout_p = self.config.head_dim, self.config.dropout if self.training else 0.0
        attend = Attend(input_ids, document_ids, kv_cache, head_dim=head_dim, dropout_p=dropout_p)
        x = self.token_embedding(input_ids) + self.position_embedding(attend.positions)
        x = self.dropout(in_compute_dtype(x) if self.training else x)
        turn = self.rotary(attend.positions)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, attend, turn, use_reentrant=False, preserve_rng_state=dropout_p > 0)
            else:
                x = block(x, attend, turn)
        if kv_cache is not None:
            kv_cache.lengths += input_ids.shape[1]  # at the end: a pass that fails may be taken again
        return self.ln_f(x)


def _residual_std(config: GPTConfig) -> float:
    """Returns a std, for the projections that add to the residual stream, that keeps its variance level."""
    return INIT_STD / math.sqrt(2 * config.n_layers)
