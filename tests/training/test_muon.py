"""Muon's steps are torch.optim.Muon's of each matrix by itself, bit for bit, and AdamW's of all else."""

import copy
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training import muon
from gpt_lightning.training.muon import MuonWithAdamW, orthogonalized
from gpt_lightning.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    learning_rates,
)
from tests.shapes import SHARED

SETTINGS = OptimizerConfig(0.02, 0.3, (0.8, 0.9), "muon", matrix_learning_rate=0.05, momentum=0.9)


def small_model(**config: Any) -> GPTModel:
    torch.manual_seed(1)
    options = {"vocab_size": 11, "max_position_embeddings": 7, "n_layers": 2, "n_heads": 3, "d_model": 15}
    return GPTModel(GPTConfig(**{**options, "d_ff": 37, **config}))


def matrices_of(model: GPTModel, tensors: dict[str, Tensor], parts: tuple[int, ...]) -> Iterator[Tensor]:
    """Of each block q, k, v, and the three or four other matrices, copied from where they lie."""
    for number in range(len(model.blocks)):
        names = ["attn.qkv_proj", "attn.out_proj", "mlp.up_proj", "mlp.down_proj"]
        names += ["mlp.gate_proj"] if model.config.activation == "swiglu" else []
        qkv, *others = (tensors[f"blocks.{number}.{name}.weight"] for name in names)
        groups = qkv.view(-1, sum(parts), qkv.shape[1])
        for end, rows in zip(accumulate(parts), parts):
            yield groups[:, end - rows : end].reshape(-1, qkv.shape[1]).clone()
        yield from (other.clone() for other in others)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = 10.0 ** -(step % 4) * torch.randn(parameter.shape, generator=generator)


SIZES = [
    ({}, 3 * (5,)),
    ({"d_model": 48, "d_ff": 16}, 3 * (16,)),
    ({"n_heads": 1, "d_model": 1, "d_ff": 2}, 3 * (1,)),
    (SHARED, (12, 6, 6)),  # two queries to a key and a value
]


@pytest.mark.parametrize("sizes, parts", SIZES)
def test_steps_equal_those_of_torch(sizes: dict[str, Any], parts: tuple[int, ...]) -> None:
    model = small_model(**sizes)
    optimizer = build_optimizer(model, SETTINGS)
    start = dict(model.named_parameters())
    ours = [nn.Parameter(matrix) for matrix in matrices_of(model, start, parts)]
    matrices = torch.optim.Muon(ours, 0.05, 0.3, 0.9, adjust_lr_fn="match_rms_adamw")
    rest = copy.deepcopy(model)
    others = [p for n, p in rest.named_parameters() if "blocks" not in n or p.dim() == 1]
    groups = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": 0.3},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, 0.02, (0.8, 0.9), fused=True)
    for step in range(5):
        give_gradients(model, step)
        give_gradients(rest, step)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for parameter, gradient in zip(ours, matrices_of(model, gradients, parts), strict=True):
            parameter.grad = gradient
        for each in (optimizer, matrices, adamw):
            each.step()
        found = list(matrices_of(model, dict(model.named_parameters()), parts))
        for matrix, single in zip(found, ours, strict=True):
            # With AMX a product of several matrices rounds a number in some thousand unlike that of one.
            assert_close(matrix, single.detach(), atol=1e-5, rtol=0)
        for name, parameter in rest.named_parameters():
            if any(parameter is other for other in others):
                assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_copy_steps_as_the_original_does() -> None:
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    give_gradients(model, 0)
    optimizer.step()  # so that there is a state to copy
    both = {"model": model, "optimizer": optimizer}
    other = copy.deepcopy(both)
    for step in (1, 2):
        for each in both, other:
            give_gradients(each["model"], step)
            each["optimizer"].step()
        if step == 1:
            before = [parameter.clone() for parameter in model.parameters()]
    for a, b, former in zip(*(each["model"].parameters() for each in (both, other)), before, strict=True):
        assert torch.equal(a, b) and a is not b and not torch.equal(a, former)


SHAPES = [(128, 128), (512, 128), (128, 344), (1, 8), (8, 1), (33, 65), (384, 1536), (1536, 384)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3])
def test_matrices_orthogonalised_together_have_the_bits_of_each_by_itself(
    shape: tuple[int, int], n: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(shape, generator=generator) * 10.0**-index for index in range(n)]
    matrices = [nn.Parameter(torch.zeros(shape)) for _ in gradients]
    oracle = torch.optim.Muon(matrices, lr=1.0, momentum=0.0, weight_decay=0.0)
    for matrix, gradient in zip(matrices, gradients):
        matrix.grad = gradient
    oracle.step()
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    for found, matrix in zip(orthogonalized([g.bfloat16() for g in gradients]), matrices, strict=True):
        assert torch.equal(torch.zeros(shape).add_(found, alpha=-scale), matrix)


def test_no_call_takes_more_numbers_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [torch.randn(4, 6).bfloat16() for _ in range(5)]
    together = orthogonalized(matrices)
    monkeypatch.setattr(muon, "MOST_AT_ONCE", 50)
    assert [*muon._batches(matrices)] == [[0, 1], [2, 3], [4]]
    assert all(torch.equal(a, b) for a, b in zip(orthogonalized(matrices), together))


@pytest.mark.parametrize("shape, n_tables", [({}, 3), (SHARED, 2)])
def test_every_parameter_is_in_one_group_and_both_rates_follow_the_schedule(
    shape: dict[str, Any], n_tables: int
) -> None:
    model = small_model(tie_embeddings=False, **shape)
    optimizer = build_optimizer(model, SETTINGS)
    schedule = build_schedule(optimizer, ScheduleConfig(warmup_steps=2), horizon=10)
    tables, plain, matrices = (group["params"] for group in optimizer.param_groups)
    assert sorted(map(id, tables + plain + matrices)) == sorted(map(id, model.parameters()))
    assert [p.dim() for p in tables] == n_tables * [2] and {p.dim() for p in plain} == {1}
    assert [id(p) for p in matrices] == [id(p) for p in model.blocks.parameters() if p.dim() == 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]
    assert learning_rates(optimizer) == {"lr-AdamW": 0.01, "lr-Muon": 0.025}
    give_gradients(model, 0)
    optimizer.step()
    schedule.step()
    assert learning_rates(optimizer) == {"lr-AdamW": 0.02, "lr-Muon": 0.05}
    alike = build_optimizer(model, OptimizerConfig(0.02, name="muon"))
    assert learning_rates(alike) == {"lr-AdamW": 0.02, "lr-Muon": 0.02}
    assert learning_rates(build_optimizer(model, OptimizerConfig(0.02))) == {"lr-AdamW": 0.02}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.clone() for tensor in (*model.parameters(), *states)]


def test_a_step_that_a_device_leaves_out_changes_nothing() -> None:
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    assert isinstance(optimizer, MuonWithAdamW)
    give_gradients(model, 0)
    optimizer.step()
    before = state_of(model, optimizer)
    model.blocks[0].mlp.up_proj.weight.grad[0, 0] = torch.nan
    model.token_embedding.weight.grad[0, 0] = torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(state_of(model, optimizer), before, strict=True))
    other = copy.deepcopy(model)
    plain = build_optimizer(other, SETTINGS)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, other):
        give_gradients(each, 1)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    plain.step()
    for a, b in zip(state_of(model, optimizer), state_of(other, plain), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_a_gradient_stay() -> None:
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    give_gradients(model, 0)
    for parameter in model.blocks[0].parameters():
        parameter.grad = None
    before = copy.deepcopy(model.blocks)
    optimizer.step()
    unchanged = [torch.equal(a, b) for a, b in zip(before.parameters(), model.blocks.parameters())]
    half = len(unchanged) // 2
    assert all(unchanged[:half]) and not any(unchanged[half:])
    optimizer.zero_grad()
    assert optimizer.step(lambda: 3.0) == 3.0


def test_a_restored_optimizer_goes_on_bit_for_bit_with_its_own_settings() -> None:
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    for step in range(4):
        if step == 2:
            weights, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        give_gradients(model, step)
        optimizer.step()
    resumed = small_model()
    resumed.load_state_dict(weights)
    other = build_optimizer(resumed, SETTINGS)
    other.load_state_dict(saved)
    for step in (2, 3):
        give_gradients(resumed, step)
        other.step()
    for a, b in zip(state_of(model, optimizer), state_of(resumed, other), strict=True):
        assert torch.equal(a, b)
    changed = build_optimizer(resumed, OptimizerConfig(0.02, 0.1, name="muon", momentum=0.7))
    changed.load_state_dict(saved)
    assert [group["weight_decay"] for group in changed.param_groups] == [0.1, 0.0, 0.1]
    assert changed.param_groups[2]["momentum"] == 0.7 and changed.param_groups[0]["betas"] == (0.9, 0.95)


def test_an_added_group_is_adamws_and_no_default_is_said_of_all_groups() -> None:
    """Lightning's LearningRateMonitor looks into every group for what the defaults name."""
    model = GPTModel(GPTConfig(8, 4, n_layers=1, n_heads=1, d_model=4))
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    added = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    assert not {"betas", "momentum"} & optimizer.defaults.keys()
    added.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(added, torch.full((3,), 0.5 * 0.99), atol=0.01)
    assert "exp_avg" in optimizer.state[added]


def test_frozen_matrices_and_matrices_in_pieces() -> None:
    model = small_model()
    model.blocks[0].requires_grad_(False)
    optimizer = build_optimizer(model, SETTINGS)
    assert len(optimizer.param_groups[2]["params"]) == 4
    model.blocks[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(37 * 15))
    with pytest.raises(UserError, match=r"needs whole matrices, and blocks.1.mlp.up_proj.weight is none"):
        build_optimizer(model, SETTINGS)


@pytest.mark.parametrize("saved, own", [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_the_other_optimizer_is_refused(saved: str, own: str) -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(name=saved))
    give_gradients(model, 0)
    optimizer.step()
    other = build_optimizer(model, OptimizerConfig(name=own))
    with pytest.raises(UserError, match=f"holds the state of model.optimizer.name={saved}, .* has {own};"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
