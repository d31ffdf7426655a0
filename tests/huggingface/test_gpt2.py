"""Weights and configuration to and from transformers' GPT-2."""

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from gpt_lightning.huggingface.gpt2 import (
    config_from_gpt2,
    config_to_gpt2,
    from_gpt2_state_dict,
    to_gpt2_state_dict,
)
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

CONFIG = GPTConfig(
    vocab_size=101, max_position_embeddings=23, n_layers=2, n_heads=3, d_model=36, d_ff=50, dropout=0.1
)
IDS = torch.randint(101, (3, 17), generator=torch.Generator().manual_seed(0))


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval()


def make_reference(**changes: Any) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(**(config_to_gpt2(CONFIG) | changes)))
    randomize(model)
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip_is_exact(tie: bool) -> None:
    theirs = make_reference(tie_word_embeddings=tie)
    config = config_from_gpt2(theirs.config)
    ours = from_gpt2_state_dict(theirs.state_dict(), config)
    back = to_gpt2_state_dict(ours, config)
    expected = theirs.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    model = GPTModel(config)
    model.load_state_dict(ours)
    assert (model.lm_head.weight is model.token_embedding.weight) == tie


@pytest.mark.parametrize("tie", [True, False])
def test_imported_model_gives_the_same_logits(tie: bool) -> None:
    theirs = make_reference(tie_word_embeddings=tie, activation_function="gelu")
    config = config_from_gpt2(theirs.config)
    model = GPTModel(config).eval()
    model.load_state_dict(from_gpt2_state_dict(theirs.state_dict(), config))
    assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_exported_model_without_biases_gives_the_same_logits() -> None:
    config = dataclasses.replace(CONFIG, bias=False)
    model = GPTModel(config)
    randomize(model)
    theirs = GPT2LMHeadModel(GPT2Config(**config_to_gpt2(config))).eval()
    theirs.load_state_dict(to_gpt2_state_dict(model.state_dict(), config))
    assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_weights_as_openai_published_them_are_read() -> None:
    """Without the "transformer." prefix and the head, with the mask buffers of old."""
    theirs = GPT2Model(GPT2Config(**config_to_gpt2(CONFIG)))
    state_dict: dict[str, Tensor] = dict(theirs.state_dict())
    state_dict["h.0.attn.bias"] = torch.ones(1, 1, 23, 23)
    state_dict["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    model = GPTModel(CONFIG).eval()
    model.load_state_dict(from_gpt2_state_dict(state_dict, CONFIG))
    assert_close(model.hidden_states(IDS), theirs.eval()(IDS).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "gelu"}, {"tie_embeddings": False, "layer_norm_eps": 1e-6, "d_ff": None}]
)
def test_configuration_round_trip(options: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **options)
    assert config_from_gpt2(GPT2Config(**config_to_gpt2(config))) == config


def test_different_dropouts_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gpt_lightning"):
        assert config_from_gpt2(GPT2Config(resid_pdrop=0.2)).dropout == 0.2
    assert caplog.messages == ["resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1 become one dropout=0.2"]


def test_networks_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_function='relu' .*; import a model with"):
        config_from_gpt2(GPT2Config(activation_function="relu"))


def test_a_head_of_its_own_is_not_dropped_for_a_tied_one() -> None:
    state_dict = make_reference(tie_word_embeddings=False).state_dict()
    with pytest.raises(ValueError, match="^tie_word_embeddings=True, but lm_head.weight differs .*; set it"):
        from_gpt2_state_dict(state_dict, CONFIG)


def test_missing_and_unknown_weights_are_named() -> None:
    state_dict = dict(make_reference().state_dict())
    state_dict["transformer.h.0.crossattention.c_attn.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="hold unknown h.0.crossattention.c_attn.weight; "):
        from_gpt2_state_dict(state_dict, CONFIG)
    with pytest.raises(ValueError, match=r"lack .* and \d+ more; "):
        from_gpt2_state_dict({"wte.weight": torch.zeros(101, 36)}, CONFIG)
