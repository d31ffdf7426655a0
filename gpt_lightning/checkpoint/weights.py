"""Holds the weights in a checkpoint to the architecture that it names."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt_lightning.checkpoint.values import FLOATS
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized

CONFIG_KEY = "gpt_config"
MODEL_PREFIX = "model."


def problems_of_weights(config: GPTConfig, state_dict: Mapping[str, Any]) -> Iterator[str]:
    found = {
        name.removeprefix(MODEL_PREFIX): list(value.shape) if isinstance(value, Tensor) else "no tensor"
        for name, value in state_dict.items()
        if str(name).startswith(MODEL_PREFIX)
    }
    # Before the model is built: a wrong n_layers could be in the billions.
    n_blocks = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    if n_blocks != config.n_layers:
        layers = f"{CONFIG_KEY}.n_layers={config.n_layers}"
        yield f"does not fit itself: {layers}, but it holds the weights of {n_blocks} blocks; name another"
    try:
        with torch.device("meta"), Uninitialized():
            expected = {name: list(value.shape) for name, value in GPTModel(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:  # of sizes beyond all numbers
        yield f"holds no possible model: {str(error).splitlines()[0][:100]}"
        return
    if found == expected:
        yield from _problems_of_tensors(config, state_dict)
    else:
        listing = differences(expected, found)
        yield f"does not hold the weights of its {CONFIG_KEY}: {listing}; name another"


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    differences = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in differences.items()
        if names
    )


def _problems_of_tensors(config: GPTConfig, state_dict: Mapping[str, Any]) -> Iterator[str]:
    """Yields where weights of the right names and shapes are no real numbers, or a tied head is none."""
    for name, value in state_dict.items():
        if name.startswith(MODEL_PREFIX) and value.dtype not in FLOATS:
            yield f"holds numbers of {value.dtype} as {name}; name another"
    head, table = (state_dict[f"{MODEL_PREFIX}{name}.weight"] for name in ("lm_head", "token_embedding"))
    is_same = head.data_ptr() == table.data_ptr() and head.stride() == table.stride()
    if config.tie_embeddings and not (is_same or torch.equal(head, table)):
        yield f"holds an lm_head that is not its token_embedding, to which {CONFIG_KEY} ties it; name another"


def groups_of_ours(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[list[list[Tensor]]]:
    """Returns what GPTLightningModule's AdamW changes, and what its Muon does, without numbers.

    AdamW's groups are the matrices and all else; with Muon the matrices of the blocks are a last group.
    """
    with torch.device("meta"), Uninitialized():
        model = GPTModel(GPTConfig(**config))
    linear = {layer.weight for layer in model.blocks.modules() if isinstance(layer, nn.Linear)}
    typed = {p: p.detach().to(weights[MODEL_PREFIX + name].dtype) for name, p in model.named_parameters()}
    decaying = [p for p in typed if p.dim() >= 2]
    plain = [own for p, own in typed.items() if p.dim() < 2]
    others, matrices = ([typed[p] for p in decaying if (p in linear) == is_in] for is_in in (False, True))
    return [[[typed[p] for p in decaying], plain], [others, plain, matrices]]
