import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    learning_rate_factor,
    parameter_groups,
)


def test_schedule_warms_up_and_follows_half_a_cosine() -> None:
    schedule = ScheduleConfig(warmup_steps=4, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, schedule, horizon=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.1 + 0.9 * 0.5)  # halfway between 4 and 12
    assert factors[6] == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_schedule_stays_at_the_minimum_after_the_horizon() -> None:
    schedule = ScheduleConfig(warmup_steps=4, min_lr_ratio=0.1)
    assert {learning_rate_factor(step, schedule, horizon=12) for step in (12, 13, 20, 1000)} == {0.1}


def test_linear_comes_down_evenly_from_the_peak() -> None:
    schedule = ScheduleConfig(warmup_steps=4, min_lr_ratio=0.2, shape="linear")
    factors = [learning_rate_factor(step, schedule, horizon=12) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])


def test_wsd_stays_at_the_peak_and_comes_down_at_the_end() -> None:
    schedule = ScheduleConfig(warmup_steps=2, min_lr_ratio=0.0, shape="wsd", decay_fraction=0.4)
    factors = [learning_rate_factor(step, schedule, horizon=10) for step in range(12)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])
    # Where the way down would begin in the warm-up, it begins at its end.
    assert learning_rate_factor(7, replace(schedule, warmup_steps=8), horizon=10) == 1.0
    assert learning_rate_factor(9, replace(schedule, warmup_steps=8), horizon=10) == 0.5


@pytest.mark.parametrize("fraction", [1e-17, 0.5, 1.0])
@pytest.mark.parametrize("horizon", [10, math.inf])
def test_wsd_takes_any_fraction_and_a_run_without_end(fraction: float, horizon: float) -> None:
    schedule = ScheduleConfig(warmup_steps=2, shape="wsd", decay_fraction=fraction)
    factors = [learning_rate_factor(step, schedule, horizon) for step in range(2, 10)]
    assert factors[0] == 1.0 and all(0.1 <= factor <= 1.0 for factor in factors)
    assert horizon == 10 or set(factors) == {1.0}


def test_only_matrices_decay_and_every_parameter_is_in_one_group() -> None:
    model = GPTModel(GPTConfig(vocab_size=11, max_position_embeddings=8, n_layers=2, n_heads=2, d_model=8))
    decayed, plain = parameter_groups(model.parameters(), weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and ".ln_" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in plain["params"])
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(map(id, model.parameters()))


def test_a_step_equals_adamw_by_hand() -> None:
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    settings = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    optimizer = build_optimizer(model, settings)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, -4.0]]), torch.tensor([2.0])
    optimizer.step()
    # At the first step the bias-corrected means make the update the gradient's sign.
    torch.testing.assert_close(model.weight, before[0] * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(model.bias, before[1] - 0.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OptimizerConfig(learning_rate=0.0), "model.optimizer.learning_rate=0.0"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "model.optimizer.weight_decay=-1.0"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "model.optimizer.betas=[0.9, 1.0]"),
        (lambda: OptimizerConfig(name="muo"), "model.optimizer.name='muo' is unknown; choose one of"),
        (lambda: OptimizerConfig(name="muon", momentum=1.0), "model.optimizer.momentum=1.0"),
        (lambda: OptimizerConfig(momentum=0.9), "momentum=0.9 is for model.optimizer.name=muon"),
        (lambda: OptimizerConfig(matrix_learning_rate=0.1), "matrix_learning_rate=0.1 is for"),
        (lambda: OptimizerConfig(name="muon", matrix_learning_rate=0.0), "matrix_learning_rate=0.0 is not"),
        (lambda: ScheduleConfig(warmup_steps=-1), "model.schedule.warmup_steps=-1"),
        (lambda: ScheduleConfig(min_lr_ratio=1.5), "model.schedule.min_lr_ratio=1.5"),
        (lambda: ScheduleConfig(shape="cosin"), "model.schedule.shape='cosin' is unknown"),
        (lambda: ScheduleConfig(shape="wsd", decay_fraction=0.0), "model.schedule.decay_fraction=0.0"),
        (lambda: ScheduleConfig(decay_fraction=0.3), "decay_fraction=0.3 is for model.schedule.shape=wsd"),
    ],
)
def test_bad_settings_name_option_and_value(make: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()  # type: ignore[operator]
    assert message in str(error.value)


def test_settings_at_their_bounds_are_taken() -> None:
    OptimizerConfig(learning_rate=1e-30, weight_decay=0.0, betas=(0.0, 0.0))
    for ratio in (0.0, 1.0):
        ScheduleConfig(warmup_steps=0, min_lr_ratio=ratio)


def test_a_warm_up_that_never_ends_is_told() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 1), OptimizerConfig())
    with pytest.warns(UserWarning, match="warmup_steps=5 is not below the 5 steps"):
        build_schedule(optimizer, ScheduleConfig(warmup_steps=5), horizon=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_schedule(optimizer, ScheduleConfig(warmup_steps=5), horizon=6)


SAVED = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, betas=(0.8, 0.9))


def trained(settings: OptimizerConfig, extra: bool = False) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer and its schedule after two steps; with `extra`, a group that a subclass has added."""
    layer, own = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(layer, settings)
    if extra:
        optimizer.add_param_group({"params": [own], "lr": 0.5, "weight_decay": 0.3})
    schedule = build_schedule(optimizer, ScheduleConfig(4), horizon=10)
    for _ in range(2):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def test_a_resumed_run_has_its_own_settings_and_the_saved_moments() -> None:
    saved, saved_schedule = trained(SAVED)
    states = copy.deepcopy((saved.state_dict(), saved_schedule.state_dict()))
    optimizer, schedule = trained(OptimizerConfig(learning_rate=0.04, weight_decay=0.2, betas=(0.7, 0.6)))
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.7, 0.6), decay, 0.04)
        assert group["lr"] == pytest.approx(0.04 * 3 / 4)
    loaded = states[0]["param_groups"], states[1]
    assert loaded == (saved.state_dict()["param_groups"], saved_schedule.state_dict()), "it has changed"
    moments = (list(each.state.values())[0]["exp_avg"] for each in (optimizer, saved))
    assert torch.equal(*moments)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)


@pytest.mark.parametrize("schedule", [ScheduleConfig(4, shape="wsd"), ScheduleConfig(4), ScheduleConfig(8)])
def test_a_resumed_run_has_the_rates_of_its_own_schedule_at_once(schedule: ScheduleConfig) -> None:
    saved, saved_schedule = trained(SAVED)
    for _ in range(4):  # to step 6, where it comes down
        saved_schedule.step()
    optimizer = build_optimizer(torch.nn.Linear(2, 1), OptimizerConfig(learning_rate=0.04))
    own = build_schedule(optimizer, schedule, horizon=20)
    optimizer.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match="step 6: the learning rate goes from the checkpoint's 0.00775 to"):
        own.load_state_dict(saved_schedule.state_dict())
    expected = 0.04 * learning_rate_factor(6, schedule, 20)
    assert [group["lr"] for group in optimizer.param_groups] == own.get_last_lr() == [expected] * 2


def test_a_group_that_somebody_added_goes_on_as_it_was_saved() -> None:
    saved, saved_schedule = trained(SAVED, extra=True)
    optimizer, schedule = trained(OptimizerConfig(learning_rate=0.04), extra=True)
    saved.param_groups[2].update(weight_decay=0.7, lr=0.6, initial_lr=0.8)
    optimizer.load_state_dict(saved.state_dict())
    schedule.load_state_dict(saved_schedule.state_dict())
    group = optimizer.param_groups[2]
    assert (group["lr"], group["weight_decay"], group["initial_lr"]) == (0.6, 0.7, 0.8)
    assert schedule.base_lrs == [0.04, 0.04, 0.8]


def test_a_rate_that_no_schedule_of_ours_has_set_goes_on_as_it_was_saved() -> None:
    saved = build_optimizer(torch.nn.Linear(2, 1), SAVED)
    saved.param_groups[0]["lr"] = 0.005
    optimizer = build_optimizer(torch.nn.Linear(2, 1), OptimizerConfig(learning_rate=0.04))
    optimizer.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]
