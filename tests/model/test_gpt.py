"""The network against transformers' GPT-2, against itself in pieces, and against what it promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_lightning.huggingface.gpt2 import config_to_gpt2, to_gpt2_state_dict
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from tests.shapes import SHAPES

B, T, V = 3, 17, 101


def make_model(**options: object) -> GPTModel:
    """Odd sizes; weights and biases large enough that each of them matters."""
    sizes = dict(vocab_size=V, max_position_embeddings=23, n_layers=2, n_heads=3, d_model=36)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(**(sizes | options)))  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def make_batch() -> tuple[Tensor, Tensor]:
    """Input ids and targets, of which some are not scored and one row is not at all."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0] = -100
    targets[1, 3:7] = -100
    return ids[:, :-1], targets


def named_grads(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, a tied weight under both of its names."""
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"tie_embeddings": False, "d_ff": 50}])
def test_logits_and_gradients_equal_transformers(options: dict[str, object]) -> None:
    model = make_model(**options)
    reference = GPT2LMHeadModel(GPT2Config(**config_to_gpt2(model.config)))
    reference.load_state_dict(to_gpt2_state_dict(model.state_dict(), model.config))
    input_ids, targets = make_batch()
    expected = reference(input_ids).logits
    assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)

    loss = model(input_ids, targets).loss
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected_loss.backward()
    grads = to_gpt2_state_dict(named_grads(model), model.config)
    expected_grads = named_grads(reference)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_cross_entropy_of_the_logits(reduction: str) -> None:
    model = make_model()
    input_ids, targets = make_batch()
    output = model(input_ids, targets, reduction=reduction)
    assert output.logits is None
    logits, no_loss = model(input_ids)
    assert no_loss is None
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    assert_close(output.loss, expected, check_dtype=False)
    parameters = list(model.parameters())
    for actual, wanted in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters)
    ):
        assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_does_not_see_later_tokens(shape: str) -> None:
    model = make_model(**SHAPES[shape]).eval()
    input_ids, _ = make_batch()
    changed = input_ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    assert_close(model(changed).logits[:, :9], model(input_ids).logits[:, :9])
    assert not torch.allclose(model(changed).logits[:, 9], model(input_ids).logits[:, 9])


def test_gpt2_small_has_124439808_parameters() -> None:
    with torch.device("meta"):
        model = GPTModel(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_without_bias_there_is_none() -> None:
    model = make_model(bias=False)
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_initial_loss_is_near_that_of_guessing(tie: bool, shape: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 5000, "n_layers": 4, "n_heads": 4, "d_model": 128, "tie_embeddings": tie}
    model = GPTModel(GPTConfig(**{**sizes, **SHAPES[shape]}))
    ids = torch.randint(5000, (4, 65))
    assert abs(model(ids[:, :-1], ids[:, 1:]).loss.item() - math.log(5000)) < 0.1


def test_residual_projections_start_smaller_with_depth() -> None:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=V, n_layers=8, n_heads=4, d_model=128))
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            assert abs(parameter.std().item() - 0.02 / 4) < 0.0003
        elif name.endswith("weight") and ".ln_" not in name and "ln_f" not in name:
            assert abs(parameter.std().item() - 0.02) < 0.001
        elif name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[17], [5, 12], [1, 1, 9, 6]])
def test_packed_documents_equal_each_document_alone(lengths: list[int], shape: str) -> None:
    model = make_model(**SHAPES[shape])
    input_ids, targets = make_batch()
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    # Each row is cut elsewhere: the last one in reverse.
    document_ids = torch.stack([document_ids, document_ids, len(lengths) - document_ids.flip(0)])
    packed = model.hidden_states(input_ids, document_ids=document_ids)
    alone, losses = [], []
    for row, pieces in enumerate([lengths, lengths, lengths[::-1]]):
        for ids, own in zip(input_ids[row].split(pieces), targets[row].split(pieces)):
            alone.append(model.hidden_states(ids[None])[0])
            losses.append(model(ids[None], own[None], reduction="sum").loss)
    assert_close(packed.flatten(0, 1), torch.cat(alone), atol=1e-5, rtol=1e-5)
    total = model(input_ids, targets, document_ids=document_ids, reduction="sum").loss
    assert_close(total, torch.stack(losses).sum(), atol=1e-4, rtol=1e-6)


def test_dropout_is_active_in_training_only() -> None:
    model = make_model(dropout=0.5)
    input_ids, _ = make_batch()
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.eval()
    without = make_model(dropout=0.0)
    assert torch.equal(model(input_ids).logits, without(input_ids).logits)


def count_block_calls(model: GPTModel) -> list[str]:
    calls: list[str] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append("block"))
    return calls


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(dropout: float, shape: str) -> None:
    input_ids, targets = make_batch()
    results = []
    for enabled in (False, True):
        model = make_model(**SHAPES[shape], dropout=dropout).train()
        model.activation_checkpointing = enabled
        torch.manual_seed(5)
        loss = model(input_ids, targets).loss
        loss.backward()
        results.append((loss.detach(), named_grads(model), torch.get_rng_state()))
    (loss, grads, rng_state), (checkpointed_loss, checkpointed_grads, checkpointed_rng_state) = results
    assert torch.equal(loss, checkpointed_loss)
    assert grads.keys() == checkpointed_grads.keys()
    assert all(torch.equal(grads[name], checkpointed_grads[name]) for name in grads)
    assert torch.equal(rng_state, checkpointed_rng_state)


@pytest.mark.parametrize(
    ("enabled", "training", "n_calls"), [(False, True, 2), (True, True, 4), (True, False, 2)]
)
def test_blocks_run_again_only_where_checkpointing_is_on(enabled: bool, training: bool, n_calls: int) -> None:
    model = make_model().train(training)
    model.activation_checkpointing = enabled
    calls = count_block_calls(model)
    model(*make_batch()).loss.backward()
    assert len(calls) == n_calls
