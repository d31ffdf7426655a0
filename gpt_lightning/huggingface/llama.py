"""Translates the vocabulary of Llama and its kin and ours, both ways: configuration and weights.

Qwen2 is Llama with biases of q, k and v, Qwen3 Llama with a norm of q and k; Mistral is Llama, where it has
no window over the last positions. Beside the names two things differ: theirs have projections of q, k and v,
ours has one, which goes group by group; files of old carry the speeds of their rotary positions, which follow
from the configuration.
Shapes: D d_model, N heads of keys and values, G heads of queries that share one, K head_dim.
"""

import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.names import complete
from gpt_lightning.model.config import ROPE_SCALING, GPTConfig

_log = logging.getLogger("gpt_lightning")

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
SPEEDS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
KINDS = ("q", "k", "v")  # the order of a group's rows in our projection


def config_from_llama(theirs: Any) -> GPTConfig:
    """Returns our configuration of the same network; raises UserError where ours cannot be the same."""
    kind = theirs.model_type
    if theirs.hidden_act not in ("silu", "swish"):  # two names of it
        problem = f"hidden_act={theirs.hidden_act!r} of the Hugging Face model is not known to GPTModel"
        raise UserError(f"{problem}; import a model with silu")
    _refuse_window(theirs)
    if dropout := theirs.attention_dropout:
        _log.warning("attention_dropout=%s becomes dropout=%s, of all activations", dropout, dropout)
    # Qwen2's names no head_dim.
    options: dict[str, Any] = {ours: getattr(theirs, name, None) for ours, name in OPTIONS.items()}
    return GPTConfig(
        **options,
        positions="rope",
        rope_theta=float(theirs.rope_parameters["rope_theta"]),
        rope_scaling=_scaling_of(theirs),
        norm="rms",
        qk_norm=kind == "qwen3",
        activation="swiglu",
        bias=_bias_of(theirs),
    )


def _scaling_of(theirs: Any) -> dict[str, int | float | str] | None:
    """Returns what scales its positions, in our words, which are theirs."""
    defaults = {"type": ..., "rope_theta": ..., "truncate": True, "partial_rotary_factor": 1.0}
    rope = {
        name: value
        for name, value in theirs.rope_parameters.items()
        if value is not None and defaults.get(name) not in (..., value)
    }
    if (kind := rope.get("rope_type", "default")) == "default":
        return None
    if kind not in ROPE_SCALING:
        problem = f"rope_type={kind!r} scales the positions, as GPTModel cannot"
        raise UserError(f"{problem}; import a model with one of {', '.join(ROPE_SCALING)}, or without")
    needed, further = ROPE_SCALING[kind]
    if odd := sorted(rope.keys() - {"rope_type", *needed, *further}):
        problem = f"{odd[0]}={rope[odd[0]]} with rope_type={kind!r} scales the positions, as GPTModel cannot"
        raise UserError(f"{problem}; import a model without")
    return rope


def _refuse_window(theirs: Any) -> None:
    """Raises where attention sees the last positions alone, and there are more."""
    kind, window = theirs.model_type, getattr(theirs, "sliding_window", None)
    if kind.startswith("qwen") and theirs.use_sliding_window:
        raise UserError("use_sliding_window=True changes its attention; import a model without")
    layers = theirs.layer_types if kind.startswith("qwen") else []
    if set(layers) - {"full_attention"}:  # which transformers reads whatever use_sliding_window says
        raise UserError(f"layer_types={layers} changes its attention; import a model without windows")
    if kind == "mistral" and window is not None and window < theirs.max_position_embeddings:
        raise UserError(
            f"sliding_window={window} is below max_position_embeddings={theirs.max_position_embeddings}, and "
            "changes its attention; import a model without, or set the second in config.json to the first"
        )


def _bias_of(theirs: Any) -> bool | str:
    match theirs.model_type:
        case "qwen2":
            return "qkv"
        case "mistral":
            return False
        case "qwen3":
            others = False
        case _:
            others = theirs.mlp_bias
    if (bias := theirs.attention_bias) != others:
        raise UserError(
            f"attention_bias={bias} of the Hugging Face model is of its attention alone; import a model with "
            "biases in all linear layers or in none"
        )
    return bool(bias)


def config_to_llama(config: GPTConfig) -> dict[str, Any]:
    """Returns keyword arguments for transformers' configuration; special tokens are the caller's to add."""
    sizes = {"d_ff": config.mlp_width, "d_head": config.head_dim, "n_kv_heads": config.kv_heads}
    options = {theirs: sizes.get(ours, getattr(config, ours)) for ours, theirs in OPTIONS.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    if config.bias == "qkv":  # a Qwen2, which has no options for them, nor for other heads
        del options["head_dim"]
        biases = {}
    else:
        biases = {"attention_bias": config.bias} | ({} if config.qk_norm else {"mlp_bias": config.bias})
    return {**options, **biases, "hidden_act": "silu", "rope_parameters": rope}


def from_llama_state_dict(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Makes GPTModel's weights of LlamaForCausalLM's, or of its kin's."""
    theirs = {name: weight for name, weight in state_dict.items() if not SPEEDS.fullmatch(name)}
    names = dict(_names(config))
    expected = (name for own in names.values() for name in own)
    theirs = complete(theirs, expected, "model.embed_tokens.weight", config)
    return {
        ours: _grouped([theirs[name] for name in own], config) if len(own) > 1 else theirs[own[0]]
        for ours, own in names.items()
    }


def to_llama_state_dict(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Makes the weights of LlamaForCausalLM, or of its kin, of GPTModel's."""
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
    qkv_kinds = ("weight", "bias") if config.has_qkv_bias else ("weight",)
    linear_kinds = ("weight", "bias") if config.has_other_biases else ("weight",)
    for index in range(config.n_layers):
        block, layer = f"blocks.{index}", f"model.layers.{index}"
        for kind in qkv_kinds:
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
