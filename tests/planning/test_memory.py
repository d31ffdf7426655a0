"""Parameters are those of the model, moments those of the optimizer, and options save what they are for."""

from dataclasses import replace

import pytest
import torch

from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.planning.advice import fits, proposal, remedies
from gpt_lightning.planning.devices import DEVICES
from gpt_lightning.planning.memory import memory_of
from gpt_lightning.planning.parameters import count_parameters
from gpt_lightning.planning.setup import Setup
from gpt_lightning.planning.speed import pass_flops, speed_of
from gpt_lightning.planning.traffic import traffic_of
from gpt_lightning.training.optim import OptimizerConfig, build_optimizer
from tests.planning.test_activations import GPT2, SHAPES

LARGE = replace(GPT2, vocab_size=50257, max_position_embeddings=1024, n_layers=48, n_heads=20, d_model=1600)
XL = Setup(LARGE, 1024, 8, accumulation=60, precision="bf16-mixed", devices=8)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape: str) -> None:
    with torch.device("meta"):
        model = GPTModel(SHAPES[shape])
    counts = count_parameters(SHAPES[shape])
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.matrices == sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_those_of_the_optimizer(optimizer: str) -> None:
    model = GPTModel(GPT2)
    built = build_optimizer(model, OptimizerConfig(name=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    states = [tensor for state in built.state.values() for tensor in state.values()]
    held = sum(4 * tensor.numel() for tensor in states if tensor.dim())
    memory = memory_of(Setup(GPT2, 128, 2, optimizer=optimizer))
    assert memory.moments == held
    assert memory.weights == memory.gradients == 4 * count_parameters(GPT2).total


def test_each_option_saves_what_it_is_for() -> None:
    plain = memory_of(XL)
    again = memory_of(replace(XL, activation_checkpointing=True))
    assert again.activations < plain.activations / 8 and again.peak < plain.peak
    assert again.narrow_weights == 0 and plain.narrow_weights == 2 * count_parameters(LARGE).matrices
    for way in ("optimizer", "full"):
        shared = memory_of(replace(XL, shard_replicas=way))
        assert shared.moments == -(-plain.moments // 8) and shared.peak < plain.peak
        narrow = memory_of(replace(XL, shard_replicas=way, gather_dtype="bf16"))
        assert narrow.narrow_weights == 0 and narrow.activations == shared.activations
        assert narrow.gathered < shared.gathered and narrow.peak < shared.peak - shared.narrow_weights
    cut = memory_of(replace(XL, tensor_parallel_size=4))
    assert plain.weights / 4 < cut.weights < plain.weights / 3.9
    both = memory_of(replace(XL, tensor_parallel_size=4, sequence_parallel=True))
    assert both.activations < cut.activations
    assert memory_of(replace(XL, batch_size=4)).activations < 0.51 * plain.activations


def test_sharing_moves_the_bytes_that_fsdp_moves() -> None:
    counts = count_parameters(LARGE)
    outside = 4 * (counts.tokens + counts.positions + counts.last_norm) * 7 / 8
    weights = 4 * counts.total * 7 / 8
    assert traffic_of(XL)[1:] == (2 * weights, 0.0, 0.0)
    assert traffic_of(replace(XL, shard_replicas="optimizer"))[1:] == (weights, weights, 0.0)
    full = replace(XL, shard_replicas="full")
    assert traffic_of(full)[1:] == (weights, 60 * (2 * weights - outside), 0.0)
    # Of four nodes each has a copy, and a device sums its eighth with those of the others.
    assert traffic_of(replace(full, nodes=4)).nodes == 2 * 3 / 4 * 4 * counts.total / 8
    assert traffic_of(replace(full, nodes=4))[1:3] == traffic_of(full)[1:3]
    assert traffic_of(replace(full, reduce_dtype="bf16")).gradients == weights / 2
    rounded = 2 * (counts.matrices + counts.biases) * 7 / 8  # bytes fewer, in each gathering
    narrow = replace(full, gather_dtype="bf16")
    assert traffic_of(narrow).weights == traffic_of(full).weights - 2 * 60 * rounded
    once = replace(narrow, shard_replicas="optimizer")
    assert traffic_of(once).weights == weights - rounded
    assert traffic_of(once).gradients == traffic_of(narrow).gradients == weights


def test_gradients_that_add_up_are_whole() -> None:
    whole = memory_of(XL).gradients
    full = replace(XL, shard_replicas="full")
    assert memory_of(full).gradients == whole
    assert memory_of(replace(full, accumulation=1)).gradients == -(-whole // 8)
    assert memory_of(replace(full, reduce_dtype="bf16")).gradients == whole  # rounded as they are sent


def test_what_would_make_it_fit_does_and_is_sorted_by_its_cost() -> None:
    device = DEVICES["a100-40gb"]
    assert not fits(XL, device)
    found = remedies(XL, device)
    assert found and all(fits(change.setup, device) for change in found)
    assert all(change.setup.step_tokens == XL.step_tokens for change in found)
    times = [change.step_seconds for change in found]
    assert times == sorted(times)
    assert "--model.activation_checkpointing true" in [" ".join(change.options(XL)) for change in found]


def test_the_proposal_fits_and_is_no_slower_than_what_was_given() -> None:
    device = DEVICES["h100"]
    found = proposal(XL, device)
    assert found is not None and fits(found.setup, device)
    assert found.setup.step_tokens == XL.step_tokens
    slow = replace(XL, tensor_parallel_size=4, sequence_parallel=True, batch_size=1, accumulation=1920)
    better = proposal(slow, device)
    assert better is not None and better.step_seconds < speed_of(slow, device).step
    small = replace(XL, config=GPT2, seq_len=256, batch_size=4)
    assert fits(small, device) and proposal(small, device).setup == small  # type: ignore[union-attr]
    tiny = replace(DEVICES["l4"], memory=2**30)
    assert proposal(XL, tiny) is None


def test_time_is_arithmetic_over_the_rate() -> None:
    device = replace(DEVICES["a100"], utilization=0.5)
    alone = replace(XL, devices=1)
    speed = speed_of(alone, device)
    assert speed.exposed == 0 and speed.arithmetic == pytest.approx(60 * pass_flops(alone) / (312e12 * 0.5))
    again = pass_flops(replace(alone, activation_checkpointing=True)) / pass_flops(alone)
    assert 1.3 < again < 4 / 3
    assert pass_flops(replace(XL, tensor_parallel_size=2)) == pass_flops(XL) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 3}, "trainer.devices=8 a node is not divisible"),
        ({"tensor_parallel_size": 8}, "model.config.n_heads=20 is not divisible"),
        ({"tensor_parallel_size": 2, "sequence_parallel": True, "seq_len": 1023}, "data.seq_len=1023 is not"),
        ({"batch_size": 0}, "data.batch_size=0 is below 1"),
        ({"shard_replicas": "half"}, "shard_replicas='half' is unknown"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(XL, **changes)  # type: ignore[arg-type]
