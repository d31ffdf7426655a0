"""The random states of all ranks: one where they are alike, whatever their number, else a row of each."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from gpt_lightning.callbacks.random_states import of_all_ranks, own_state, random_state, set_random_state
from gpt_lightning.checkpoint.training_state import ROWS, STATES
from gpt_lightning.exit_codes import UserError
from tests.distributed import run_ranks

CPU = torch.device("cpu")
Numbers = tuple[float, float, float]


def draw() -> Numbers:
    return random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    draw()  # which leaves half of a pair of normal numbers in each


def drawn_and_saved(seeds: list[int]) -> tuple[dict[str, Any], Numbers]:
    """Runs in a rank: what a checkpoint holds, and what the rank draws next."""
    torch.distributed.init_process_group("gloo")
    seed(seeds[torch.distributed.get_rank()])
    saved = of_all_ranks(CPU)
    return saved, draw()


def goes_on_with(state: Any) -> Numbers:
    assert state is not None
    seed(99)
    set_random_state(state, CPU)
    return draw()


@pytest.fixture(autouse=True)
def own_numbers(request: pytest.FixtureRequest) -> Any:
    state = random_state(CPU)
    yield
    set_random_state(state, CPU)


def test_ranks_that_draw_alike_have_one_state() -> None:
    (saved, drawn), (other, _) = run_ranks(drawn_and_saved, 2, [5, 5])
    assert [*saved] == [*other] == [STATES] and len(saved[STATES]) == 1
    for rank, world_size in ((0, 2), (1, 2), (6, 7)):
        assert goes_on_with(own_state(saved, rank, world_size)) == drawn


def test_ranks_that_draw_differently_each_go_on_with_their_own() -> None:
    ranks = run_ranks(drawn_and_saved, 3, [5, 6, 5])
    saved = ranks[0][0]
    assert len(saved[STATES]) == 1 and saved[ROWS].shape[0] == 3
    assert all(ROWS not in saved for saved, _ in ranks[1:])  # which write nothing
    assert [goes_on_with(own_state(saved, rank, 3)) for rank in range(3)] == [drawn for _, drawn in ranks]
    assert own_state(saved, 0, 2) is None
    with pytest.raises(UserError, match="holds random states of 9 bytes"):
        own_state({**saved, ROWS: saved[ROWS][:, :9]}, 0, 3)
    with pytest.raises(UserError, match="holds no random states of rank 1"):
        own_state({**saved, ROWS: torch.full_like(saved[ROWS], 255)}, 1, 3)


def test_states_that_earlier_versions_stored_are_read() -> None:
    seed(5)
    common = random_state(CPU)
    torch.rand(1)
    drawn = {**common, "torch": torch.get_rng_state()}
    # By what differs from the first rank's, or whole.
    for states in ([common, {"torch": drawn["torch"]}, {}], [common, drawn, common]):
        for rank, state in enumerate([common, drawn, common]):
            assert goes_on_with(own_state({STATES: states}, rank, 3)) == goes_on_with(state)
        assert own_state({STATES: states}, 0, 4) is None
    assert goes_on_with(own_state({STATES: [common]}, 3, 4)) == goes_on_with(common)


def test_a_device_draws_on_where_it_was_and_else_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    device, generator = torch.device("cuda"), torch.Generator()
    monkeypatch.setattr(torch.cuda, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", generator.set_state)
    saved, of_cpu = random_state(device), random_state(CPU)
    first, second = torch.rand(2, generator=generator)
    set_random_state(saved, device)
    assert torch.rand((), generator=generator) == first
    for state, other in ((of_cpu, device), (saved, CPU)):  # a checkpoint of the one that goes on on the other
        set_random_state(state, other)
    assert torch.rand((), generator=generator) == second
