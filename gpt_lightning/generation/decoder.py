"""The network of a GPTModel for inference alone, of operations in a row: what its modules cost is left out.

A step for one row of GPT-2 small takes a CPU some milliseconds, and calling two hundred modules one of them.
The linear layers are given as functions, so that their weights may have any form.
Shapes: B batch, T time, D d_model, H heads, K head_dim, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import Block, GPTModel
from gpt_lightning.model.kv_cache import CacheStep, KVCache

Linear = Callable[[Tensor], Tensor]


class Decoder:
    """Shares tables and norms with `model`; `make_linear` gives the function of each of its linear layers."""

    def __init__(self, model: GPTModel, make_linear: Callable[[nn.Linear], Linear]) -> None:
        self.config: GPTConfig = model.config
        self._tokens = model.token_embedding.weight.detach()
        self._positions = model.position_embedding.weight.detach()
        self._blocks = [_DecoderBlock(cast(Block, block), make_linear) for block in model.blocks]
        self._ln_f = _norm(model.ln_f)
        self.lm_head = make_linear(model.lm_head)

    def hidden_states(self, input_ids: Tensor, *, kv_cache: KVCache | None = None) -> Tensor:
        """As GPTModel's, [B, T, D]."""
        T = input_ids.shape[1]
        cached = None if kv_cache is None else kv_cache.extend(T, input_ids.device)
        positions = torch.arange(T, device=input_ids.device) if cached is None else cached.positions
        x = F.embedding(input_ids, self._tokens) + F.embedding(positions, self._positions)
        for block in self._blocks:
            x = block(x, cached)
        return self._ln_f(x)

    def modules(self) -> Iterator[nn.Module]:
        """None: it is always in evaluation mode."""
        return iter(())

    def parameters(self) -> Iterator[Tensor]:
        return iter((self._tokens, self._positions))


class _DecoderBlock:
    def __init__(self, block: Block, make_linear: Callable[[nn.Linear], Linear]) -> None:
        self._ln_1, self._ln_2 = _norm(block.ln_1), _norm(block.ln_2)
        self._qkv_proj = make_linear(block.attn.qkv_proj)
        self._out_proj = make_linear(block.attn.out_proj)
        self._up_proj, self._down_proj = make_linear(block.mlp.up_proj), make_linear(block.mlp.down_proj)
        self._head_dim, self._approximate = block.attn.head_dim, block.mlp.approximate

    def __call__(self, x: Tensor, cached: CacheStep | None) -> Tensor:
        B, T, D = x.shape
        qkv = self._qkv_proj(self._ln_1(x)).view(B, T, -1, 3, self._head_dim)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [B, H, T, K]
        mask = None
        if cached is not None:
            mask = cached.mask
            k, v = cached.write(k, v)  # each [B, H, S, K]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        x = x + self._out_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self._down_proj(F.gelu(self._up_proj(self._ln_2(x)), approximate=self._approximate))


def _norm(layer: nn.LayerNorm) -> Linear:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    shape, eps = layer.normalized_shape, layer.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
