"""The whole network, top to bottom: GPT-2 (Radford et al., 2019), exactly enough to load its weights.

Shapes: B batch, T time, D d_model, H heads, K head_dim, V vocabulary.
Pre-layer-norm blocks, learned positions, fused attention, a head tied to the token table.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt_lightning.kernels.attention import Attend, KVCache
from gpt_lightning.kernels.cross_entropy import linear_cross_entropy
from gpt_lightning.kernels.linear import FastLinear, in_compute_dtype
from gpt_lightning.model.config import GPTConfig

INIT_STD = 0.02


class GPTOutput(NamedTuple):
    """Holds `logits` [B, T, V] without targets, `loss` (a scalar) with them; the other one is None."""

    logits: Tensor | None
    loss: Tensor | None


class Linear(FastLinear):
    """Starts as GPT-2's linear layers do: normal weights, biases of zero."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Starts as GPT-2's embeddings do: normal weights."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class CausalSelfAttention(nn.Module):
    """Lets each token attend to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        # The rows lie head by head (q, k, v of head 0, then of head 1, ...): a share of them is whole heads.
        self.qkv_proj = Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.out_proj = Linear(config.d_model, config.d_model, bias=config.bias, std=_residual_std(config))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv_proj(x)
        q, k, v = qkv.view(*qkv.shape[:2], -1, 3, self.head_dim).unbind(3)  # each [B, T, H, K]
        y = attend(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.flatten(2))


class MLP(nn.Module):
    """Widens each token's vector, applies GELU, and narrows it again."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.d_model, config.mlp_width, bias=config.bias)
        self.down_proj = Linear(config.mlp_width, config.d_model, bias=config.bias, std=_residual_std(config))
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), attend))
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
        self.head_dim = config.head_dim
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding = Embedding(config.max_position_embeddings, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias)
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
        """Returns the residual stream after the last layer norm, [B, T, D], which `lm_head` reads."""
        dropout_p = self.config.dropout if self.training else 0.0
        attend = Attend(input_ids, document_ids, kv_cache, head_dim=self.head_dim, dropout_p=dropout_p)
        x = self.token_embedding(input_ids) + self.position_embedding(attend.positions)
        x = self.dropout(in_compute_dtype(x) if self.training else x)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, attend, use_reentrant=False, preserve_rng_state=dropout_p > 0)
            else:
                x = block(x, attend)
        if kv_cache is not None:
            kv_cache.lengths += input_ids.shape[1]  # at the end: a pass that fails may be taken again
        return self.ln_f(x)


def _residual_std(config: GPTConfig) -> float:
    """Returns a std, for the projections that add to the residual stream, that keeps its variance level."""
    return INIT_STD / math.sqrt(2 * config.n_layers)
