"""Knows which of Hugging Face's models a configuration is, and how each is translated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.gpt2 import (
    SCALES,
    config_from_gpt2,
    config_to_gpt2,
    from_gpt2_state_dict,
    to_gpt2_state_dict,
    with_plain_scores,
)
from gpt_lightning.huggingface.llama import (
    config_from_llama,
    config_to_llama,
    from_llama_state_dict,
    to_llama_state_dict,
)
from gpt_lightning.model.config import GPTConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Holds transformers' names of a kind of model, and the translations both ways.

    `blocks` matches the name of a block's weight, and `own` are the options of its config.json that decide
    what the network computes. `plain` has our weights, in float32, take in what only theirs can be told.
    """

    name: str
    model_type: str
    config_class: str
    architecture: str
    blocks: str
    own: frozenset[str]
    config_from: Callable[[Any], GPTConfig]
    config_to: Callable[[GPTConfig], dict[str, Any]]
    weights_from: Callable[[Weights, GPTConfig], Weights]
    weights_to: Callable[[Weights, GPTConfig], Weights]
    plain: Callable[[Weights, Any], Weights] = lambda weights, theirs: weights


_MODERN = {"positions": "rope", "norm": "rms", "activation": "swiglu"}
_ROPE = {"rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"}
_WINDOW = {"sliding_window", "use_sliding_window", "layer_types"}


def _llama(model_type: str, name: str, *, qk_norm: bool = False, bias: bool | str = False) -> Family:
    example = GPTConfig(8, qk_norm=qk_norm, bias=bias, **_MODERN)  # type: ignore[arg-type]
    return Family(
        name,
        model_type,
        f"{name}Config",
        f"{name}ForCausalLM",
        r"model\.layers\.(\d+)\.",
        frozenset({*config_to_llama(example), *_ROPE, *_WINDOW}),
        config_from_llama,
        config_to_llama,
        from_llama_state_dict,
        to_llama_state_dict,
    )


GPT2 = Family(
    "GPT-2",
    "gpt2",
    "GPT2Config",
    "GPT2LMHeadModel",
    r"(?:transformer\.)?h\.(\d+)\.",
    frozenset({*config_to_gpt2(GPTConfig()), *SCALES}),
    config_from_gpt2,
    config_to_gpt2,
    from_gpt2_state_dict,
    to_gpt2_state_dict,
    with_plain_scores,
)
LLAMA, MISTRAL = _llama("llama", "Llama"), _llama("mistral", "Mistral")  # what we write is a Llama
QWEN2, QWEN3 = _llama("qwen2", "Qwen2", bias="qkv"), _llama("qwen3", "Qwen3", qk_norm=True)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(config: GPTConfig) -> Family:
    """Returns the family that computes what this network does; raises UserError if none does."""
    needed: dict[str, Any] = dict(_MODERN)
    family = QWEN3 if config.qk_norm else QWEN2 if config.bias == "qkv" else LLAMA
    if config.positions == "learned":
        family = GPT2
        needed = {"norm": "layer", "qk_norm": False, "kv_heads": config.n_heads}
    if family is QWEN3:
        needed["bias"] = False
    if family in (GPT2, QWEN2):  # whose heads share d_model evenly
        needed["head_dim"] = config.d_model / config.n_heads
    odd = [name for name, value in needed.items() if getattr(config, name) != value]
    if family is GPT2 and config.activation == "swiglu":
        odd.append("activation")
    if family is LLAMA and config.d_model % config.n_heads:  # whatever the width of a head
        odd.append("d_model")
    if odd:
        names = {"kv_heads": "n_kv_heads", "head_dim": "d_head"}
        listing = ", ".join(f"model.config.{names.get(name, name)}={getattr(config, name)}" for name in odd)
        raise UserError(
            f"{listing} with positions={config.positions} is of no model that transformers knows; it has "
            "GPT-2 (learned, layer, gelu), and with rope, rms and swiglu Llama (d_model a multiple of "
            "n_heads), Qwen2 (bias qkv) and Qwen3 (qk_norm, no biases)"
        )
    return family
