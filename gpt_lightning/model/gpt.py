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

from gpt_lightning.kernels.attention import (
    Mask,
    attend_within_documents,
    document_mask,
    document_positions,
)
from gpt_lightning.kernels.cpu_attention import attention_in_blocks, runs_in_blocks
from gpt_lightning.kernels.cross_entropy import linear_cross_entropy
from gpt_lightning.kernels.linear import linear
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.kv_cache import CacheStep, KVCache

INIT_STD = 0.02


class GPTOutput(NamedTuple):
    """`logits` [B, T, V] without targets, `loss` (a scalar) with them; the other one is None."""

    logits: Tensor | None
    loss: Tensor | None


class Projection(nn.Linear):
    """A linear layer that starts as GPT-2's do: normal weights, no bias."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    forward.computes_as_parent = True  # type: ignore[attr-defined]  # tensor parallelism replaces the layer


class Table(nn.Embedding):
    """An embedding that starts as GPT-2's do."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class CausalSelfAttention(nn.Module):
    """Attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        # The rows lie head by head (q, k, v of head 0, then of head 1, ...), so any cut gives whole heads.
        self.qkv_proj = Projection(config.d_model, 3 * config.d_model, bias=config.bias)
        self.out_proj = Projection(
            config.d_model, config.d_model, bias=config.bias, std=_residual_std(config)
        )

    def forward(self, x: Tensor, mask: Mask, cached: CacheStep | None, layer: int) -> Tensor:
        qkv = self.qkv_proj(x)
        B, T, _ = qkv.shape  # not of x, which may be a part of the sequence that qkv_proj gathers
        qkv = qkv.view(B, T, -1, 3, self.head_dim)
        dropout_p = self.dropout if self.training else 0.0
        if mask is None and cached is None and runs_in_blocks(qkv):
            return self.out_proj(attention_in_blocks(qkv, dropout_p))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [B, H, T, K]
        if cached is not None:
            k, v = cached.write(layer, k, v)  # each [B, H, S, K]
        if mask is None or isinstance(mask, Tensor):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None and T > 1
            )
        else:
            y = attend_within_documents(q, k, v, mask, dropout_p)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.out_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = Projection(config.d_model, config.mlp_width, bias=config.bias)
        self.down_proj = Projection(
            config.mlp_width, config.d_model, bias=config.bias, std=_residual_std(config)
        )
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Mask, cached: CacheStep | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cached, layer))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class LMHead(Projection):
    """Hidden states to logits, or straight to the loss, which never holds all logits at once."""

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), reduction)


class GPTModel(nn.Module):
    """Token ids in; logits, or the loss against targets, out.

    Each layer draws its own weights (`reset_parameters`) in the order of `modules()`, so that a model built
    on the meta device gets the very same weights later, layer by layer.
    """

    def __init__(self, config: GPTConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.token_embedding = Table(config.vocab_size, config.d_model)
        self.position_embedding = Table(config.max_position_embeddings, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model, config.layer_norm_eps, bias=config.bias)
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
        """Logits without `targets`; with them the loss over the targets [B, T], already shifted, save -100.

        Args:
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
        """The residual stream after the last layer norm, [B, T, D]: what `lm_head` reads."""
        T, device = input_ids.shape[1], input_ids.device
        mask: Mask = None
        cached = kv_cache.begin(T, device) if kv_cache is not None else None
        if cached is not None:
            positions, mask = cached.positions, cached.mask
        elif document_ids is not None:
            positions = document_positions(document_ids)
            dropout_p = self.config.dropout if self.training else 0.0
            mask = document_mask(positions, self.config.head_dim, dropout_p)
        else:
            positions = torch.arange(T, device=device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        if self.training and device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Else every layer would read and write it in float32 and convert it: a twentieth of a step.
            x = x.to(torch.get_autocast_dtype("cpu"))
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                draws = self.config.dropout > 0
                x = checkpoint(block, x, mask, cached, layer, use_reentrant=False, preserve_rng_state=draws)
            else:
                x = block(x, mask, cached, layer)
        if cached is not None:
            cached.finish()
        return self.ln_f(x)


def _residual_std(config: GPTConfig) -> float:
    """For the two projections a block that write to the residual stream, whose variance adds up."""
    return INIT_STD / math.sqrt(2 * config.n_layers)
