"""Translates the vocabulary of Llama and Qwen3 and ours, both ways: configuration and weights.

Qwen3 is Llama with a norm of queries and keys. Beside the names one thing differs: theirs have projections of
q, k and v, ours has one, which goes group by group.
Shapes: D d_model, N heads of keys and values, G heads of queries that share one, K head_dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig

OPTIONS = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
    "layer_norm_eps": "rms_norm_eps",
    "dropout": "attention_dropout",
}
LAYERS = {  # ours -> theirs, within a block
    "ln_1": "input_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
KINDS = ("q", "k", "v")  # the order of a group's rows in our projection


def config_from_llama(theirs: Any) -> GPTConfig:
    """Returns our configuration of the same network; raises UserError where ours cannot be the same."""
    is_qwen = theirs.model_type == "qwen3"
    if theirs.hidden_act != "silu":
        problem = f"hidden_act={theirs.hidden_act!r} of the Hugging Face model is not known to GPTModel"
        raise UserError(f"{problem}; import a model with silu")
    rope = theirs.rope_parameters
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UserError(f"rope_type={kind!r} scales the positions, as GPTModel cannot; import another model")
    if is_qwen and theirs.use_sliding_window:
        raise UserError("use_sliding_window=True changes its attention; import a model without")
    bias = theirs.attention_bias
    if bias != (False if is_qwen else theirs.mlp_bias):
        raise UserError(
            f"attention_bias={bias} of the Hugging Face model is of its attention alone; import a model with "
            "biases in all linear layers or in none"
        )
    options = {ours: getattr(theirs, name) for ours, name in OPTIONS.items()}
    return GPTConfig(
        **options,
        positions="rope",
        rope_theta=float(rope["rope_theta"]),
        norm="rms",
        qk_norm=is_qwen,
        activation="swiglu",
        bias=bias,
    )


def config_to_llama(config: GPTConfig) -> dict[str, Any]:
    """Returns keyword arguments for transformers' configuration; special tokens are the caller's to add."""
    sizes = {"d_ff": config.mlp_width, "d_head": config.head_dim, "n_kv_heads": config.kv_heads}
    options = {theirs: sizes.get(ours, getattr(config, ours)) for ours, theirs in OPTIONS.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    biases = {} if config.qk_norm else {"mlp_bias": config.bias}
    return {**options, **biases, "hidden_act": "silu", "attention_bias": config.bias, "rope_parameters": rope}


def from_llama_state_dict(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Makes GPTModel's weights of LlamaForCausalLM's or Qwen3ForCausalLM's."""
    theirs = dict(state_dict)
    if config.tie_embeddings and (table := theirs.get("model.embed_tokens.weight")) is not None:
        if not torch.equal(theirs.setdefault("lm_head.weight", table), table):
            problem = "tie_word_embeddings=True, but lm_head.weight differs from model.embed_tokens.weight"
            raise UserError(f"{problem}; set it to false in config.json")
    names = dict(_names(config))
    expected = {name for own in names.values() for name in own}
    for problem, odd in (("lack", expected - theirs.keys()), ("hold unknown", theirs.keys() - expected)):
        if odd:
            some = ", ".join(sorted(odd)[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            raise UserError(f"the weights {problem} {some}; give the configuration they belong to")
    return {
        ours: _grouped([theirs[name] for name in own], config) if len(own) > 1 else theirs[own[0]]
        for ours, own in names.items()
    }


def to_llama_state_dict(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Makes the weights of LlamaForCausalLM or Qwen3ForCausalLM of GPTModel's."""
    converted: dict[str, Tensor] = {}
    for ours, theirs in _names(config):
        parts = [state_dict[ours]] if len(theirs) == 1 else _ungrouped(state_dict[ours], config)
        converted |= dict(zip(theirs, parts, strict=True))
    return converted


def _names(config: GPTConfig) -> Iterator[tuple[str, list[str]]]:
    """Yields each of GPTModel's parameters with theirs: one, or those of q, k and v."""
    yield "token_embedding.weight", ["model.embed_tokens.weight"]
    yield "ln_f.weight", ["model.norm.weight"]
    yield "lm_head.weight", ["lm_head.weight"]
    linear_kinds = ("weight", "bias") if config.bias else ("weight",)
    for index in range(config.n_layers):
        block, layer = f"blocks.{index}", f"model.layers.{index}"
        for kind in linear_kinds:
            own = [f"{layer}.self_attn.{part}_proj.{kind}" for part in KINDS]
            yield f"{block}.attn.qkv_proj.{kind}", own
        for ours, theirs in LAYERS.items():
            if ours.endswith("_proj"):
                yield from ((f"{block}.{ours}.{kind}", [f"{layer}.{theirs}.{kind}"]) for kind in linear_kinds)
            elif config.qk_norm or not ours.startswith("attn."):
                yield f"{block}.{ours}.weight", [f"{layer}.{theirs}.weight"]


def _group_rows(config: GPTConfig) -> list[int]:
    group = config.n_heads // config.kv_heads
    return [group * config.head_dim, config.head_dim, config.head_dim]


def _grouped(parts: list[Tensor], config: GPTConfig) -> Tensor:
    """Puts the rows of q, k and v group by group."""
    by_group = [part.unflatten(0, (config.kv_heads, -1)) for part in parts]  # each [N, rows, ...]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _ungrouped(fused: Tensor, config: GPTConfig) -> list[Tensor]:
    by_group = fused.unflatten(0, (config.kv_heads, -1))  # [N, (G + 2) K, ...]
    return [part.flatten(0, 1).contiguous() for part in by_group.split(_group_rows(config), dim=1)]
