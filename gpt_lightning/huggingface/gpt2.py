"""Translates GPT-2's vocabulary and ours, both ways: configuration and weights of GPT2LMHeadModel.

Three things differ beside the names: Hugging Face stores linear weights as [in, out] (its Conv1D), ours are
[out, in]; its fused projection holds all of q, then k, then v, ours goes head by head; its attention modules
of old carry constant mask buffers, which hold no weights.
Shapes: D d_model, H heads, K head_dim.
"""

import logging
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.names import complete
from gpt_lightning.model.config import GPTConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

_log = logging.getLogger("gpt_lightning")

ACTIVATION_FROM_GPT2 = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ACTIVATION_TO_GPT2 = {"gelu_tanh": "gelu_new", "gelu": "gelu"}

OPTIONS = {  # ours -> GPT-2's
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_model": "n_embd",
    "d_ff": "n_inner",
    "tie_embeddings": "tie_word_embeddings",
    "layer_norm_eps": "layer_norm_epsilon",
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SCALES = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")  # of scores, which weights can take in

BLOCK_LAYERS = {  # ours -> GPT-2's
    "ln_1": "ln_1",
    "attn.qkv_proj": "attn.c_attn",
    "attn.out_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def config_from_gpt2(hf_config: "GPT2Config") -> GPTConfig:
    """Returns our configuration of the same network; raises UserError where ours cannot be the same."""
    if (activation := hf_config.activation_function) not in ACTIVATION_FROM_GPT2:
        problem = f"activation_function={activation!r} of the Hugging Face model is not known to GPTModel"
        raise UserError(f"{problem}; import a model with one of {', '.join(ACTIVATION_FROM_GPT2)}")
    dropouts = {name: getattr(hf_config, name) for name in DROPOUTS}
    dropout = float(hf_config.resid_pdrop)
    if len(set(dropouts.values())) > 1:
        listing = ", ".join(f"{name}={value}" for name, value in dropouts.items())
        _log.warning("%s become one dropout=%s", listing, dropout)
    options = {ours: getattr(hf_config, theirs) for ours, theirs in OPTIONS.items()}
    return GPTConfig(**options, dropout=dropout, activation=ACTIVATION_FROM_GPT2[activation], bias=True)


def config_to_gpt2(config: GPTConfig) -> dict[str, Any]:
    """Returns keyword arguments for transformers' GPT2Config; its special tokens are the caller's to add."""
    options = {theirs: getattr(config, ours) for ours, theirs in OPTIONS.items()}
    activation = ACTIVATION_TO_GPT2[config.activation]
    return {**options, **dict.fromkeys(DROPOUTS, config.dropout), "activation_function": activation}


def from_gpt2_state_dict(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Makes GPTModel's weights of GPT2LMHeadModel's, or of GPT2Model's, which OpenAI's are published as."""
    theirs = {name.removeprefix("transformer."): weight for name, weight in state_dict.items()}
    theirs = {name: weight for name, weight in theirs.items() if not MASK_BUFFER.fullmatch(name)}
    names = _gpt2_names(config)
    theirs = complete(theirs, names.values(), "wte.weight", config)
    return {our_name: _from_gpt2(our_name, theirs[name], config) for our_name, name in names.items()}


def to_gpt2_state_dict(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Makes GPT2LMHeadModel's weights of GPTModel's; GPT-2 has all biases, so missing ones become zeros."""
    converted = {}
    for our_name, name in _gpt2_names(config).items():
        if our_name.endswith(".bias") and our_name not in state_dict:
            weight = state_dict[our_name.removesuffix("bias") + "weight"]
            theirs = weight.new_zeros(weight.shape[0])
        else:
            theirs = _to_gpt2(our_name, state_dict[our_name], config)
        converted[name if name == "lm_head.weight" else f"transformer.{name}"] = theirs
    return converted


def with_plain_scores(weights: dict[str, Tensor], hf_config: "GPT2Config") -> dict[str, Tensor]:
    """Makes GPTModel's weights, of a model that scales its scores otherwise, ones that score as GPT-2's do.

    The rows of the queries take the difference in; the model that is exported then is a plain GPT-2.
    """
    head_dim = hf_config.n_embd // hf_config.n_head
    changed = dict(weights)
    for index in range(hf_config.n_layer):
        scale = 1.0 if hf_config.scale_attn_weights else math.sqrt(head_dim)
        if hf_config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        for name in (f"blocks.{index}.attn.qkv_proj.{kind}" for kind in ("weight", "bias")):
            if scale != 1.0:
                q, k, v = weights[name].unflatten(0, (hf_config.n_head, 3, head_dim)).unbind(1)  # [H, K, ...]
                changed[name] = torch.stack((q * scale, k, v), dim=1).flatten(0, 2)
    return changed


def _gpt2_names(config: GPTConfig) -> dict[str, str]:
    """Maps GPTModel's parameter names to GPT-2's, without its "transformer." before all but the head."""
    layers = {"ln_f": "ln_f"}
    for index in range(config.n_layers):
        layers |= {f"blocks.{index}.{ours}": f"h.{index}.{theirs}" for ours, theirs in BLOCK_LAYERS.items()}
    names = {
        "token_embedding.weight": "wte.weight",
        "position_embedding.weight": "wpe.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for ours, theirs in layers.items():
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return names


def _from_gpt2(our_name: str, weight: Tensor, config: GPTConfig) -> Tensor:
    if our_name.endswith("_proj.weight"):
        weight = weight.t()
    if ".qkv_proj." in our_name:
        by_head = weight.unflatten(0, (3, config.n_heads, config.head_dim)).transpose(0, 1)  # [H, 3, K, ...]
        weight = by_head.flatten(0, 2)
    return weight.contiguous()


def _to_gpt2(our_name: str, weight: Tensor, config: GPTConfig) -> Tensor:
    if ".qkv_proj." in our_name:
        by_kind = weight.unflatten(0, (config.n_heads, 3, config.head_dim)).transpose(0, 1)  # [3, H, K, ...]
        weight = by_kind.flatten(0, 2)
    if our_name.endswith("_proj.weight"):
        weight = weight.t()
    return weight.contiguous()
