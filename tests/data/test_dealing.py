"""The order of a mixture: whose window comes when, held against dealing by hand."""

import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data.dealing import PERIOD, MixtureOrder, dealt, phases_of, whole_shares
from gpt_lightning.data.mixture import Mixture
from gpt_lightning.data.windows import Epochs

SIZES = {"a": 103, "b": 47, "c": 260}  # tokens


def mixture(*weights: Any) -> Mixture:
    files = zip(SIZES, weights, strict=False)
    return Mixture([{"name": name, "files": f"{name}.txt", "weight": weight} for name, weight in files])


def order(*weights: Any, seed: int = 5, **deal: int) -> MixtureOrder:
    sizes = [*SIZES.values()][: len(weights)]
    deal = {"seq_len": 10, "global_batch": 4, "accumulate": 1, "start": 0, **deal}
    return mixture(*weights).order(sizes, seed, **deal)


def by_hand(shares: tuple[int, ...], places: int) -> list[int]:
    """Each place goes to the source whose next window must come first, of those whose window may come."""
    total, given, order = sum(shares), [0] * len(shares), []
    for place in range(places):
        may = [
            (-(Fraction((n + 1) * total, share) // -1), source)
            for source, (n, share) in enumerate(zip(given, shares, strict=True))
            if share and Fraction(n * total, share) // 1 <= place
        ]
        source = min(may)[1]
        given[source] += 1
        order.append(source)
    return order


SHARES = [(1,), (1, 1), (3, 1), (1, 1, 1), (5, 3, 2), (97, 2, 1), (0, 2, 3), (13, 11, 7, 5, 3, 2, 1, 1)]


@pytest.mark.parametrize("shares", SHARES)
def test_a_period_is_dealt_as_by_hand(shares: tuple[int, ...]) -> None:
    assert dealt(shares).tolist() == by_hand(shares, sum(shares))


@pytest.mark.parametrize("weights", [*SHARES, (0.3, 0.5, 0.2), (1e-4, 1.0, 0.3), (2.5, 3.7, 1.1, 0.9)])
def test_every_prefix_is_within_one_window_of_each_share(weights: tuple[float, ...]) -> None:
    shares = whole_shares(weights)
    assert all(abs(s / sum(shares) - w / sum(weights)) <= 1 / PERIOD for s, w in zip(shares, weights))
    source = dealt(shares)
    for number, share in enumerate(shares):
        given = np.cumsum(source == number)
        lag = given * sum(shares) - np.arange(1, len(source) + 1) * share
        assert np.abs(lag).max() < sum(shares)
        assert given[-1] == share


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 2), (0.7, 0.2, 0.1)])
def test_each_source_has_each_of_its_tokens_once_an_epoch(weights: tuple[float, ...]) -> None:
    dealing = order(*weights)
    begins = np.cumsum([0, *SIZES.values()])
    targets: list[list[int]] = [[] for _ in SIZES]
    for first in range(0, 400, 7):
        starts, lengths = dealing.cut(np.arange(first, first + 7))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            number = int(begins.searchsorted(start, side="right")) - 1
            size = int(begins[number + 1] - begins[number])
            targets[number] += ((start - begins[number] + np.arange(length)) % size).tolist()
    for found, size in zip(targets, SIZES.values(), strict=True):
        whole = [found[at : at + size] for at in range(0, len(found) - size + 1, size)]
        assert whole and all(sorted(epoch) == [*range(size)] for epoch in whole)
        assert all(one != other for one, other in pairwise(whole))


def test_a_source_has_the_order_that_it_has_alone() -> None:
    """Of (seed, name): what it is mixed with changes when its windows come, and not which comes next."""
    begins, found = np.cumsum([0, *SIZES.values()]), {}
    for weights in ((1, 1, 1), (1, 5, 2)):
        starts, _ = order(*weights).cut(np.arange(300))
        found[weights] = starts[(starts >= begins[1]) & (starts < begins[2])].tolist()
    n = min(map(len, found.values()))
    assert n > 30 and found[1, 1, 1][:n] == found[1, 5, 2][:n]
    other = order(1, 1, 1, seed=6).cut(np.arange(300))[0]
    assert other[(other >= begins[1]) & (other < begins[2])].tolist()[:n] != found[1, 1, 1][:n]


@pytest.mark.parametrize("weights", [(1, 1, 1), ({0: 1, 7: 3, 20: 0}, 1, {0: 0, 9: 0.5})])
@pytest.mark.parametrize("deal", [{}, {"accumulate": 3}, {"global_batch": 5}])
def test_an_order_that_begins_anywhere_goes_on_as_the_whole(weights: Any, deal: dict[str, int]) -> None:
    made = mixture(*weights)
    deal = {"seq_len": 10, "global_batch": 4, "accumulate": 1, "start": 0, **deal}
    whole = made.order([*SIZES.values()], 5, **deal)
    for batch in (3, 24, 81):
        rest = made.order([*SIZES.values()], 5, **{**deal, "start": whole.span(batch)[0]})
        for later in range(12):
            span = whole.span(batch + later)
            assert rest.span(later) == span
            for one, other in zip(rest.cut(np.arange(*span)), whole.cut(np.arange(*span)), strict=True):
                assert one.tolist() == other.tolist()


def test_weights_change_at_the_step_that_is_given() -> None:
    weights = ({0: 1, 3: 0, 6: 1}, {0: 1, 3: 1}, {0: 0, 6: 2})
    dealing, begins = order(*weights, accumulate=2), np.cumsum([0, *SIZES.values()])
    n_windows = sum(-(-size // 10) for size in SIZES.values())
    for step in range(9):
        positions = np.arange(dealing.span(2 * step)[0], dealing.span(2 * step + 1)[1])
        assert len(positions) == (8 if (step + 1) % 6 else n_windows - 5 * 8)  # an epoch's last step is short
        of = Counter((begins.searchsorted(dealing.cut(positions)[0], side="right") - 1).tolist())
        shares = [each[max(s for s in each if s <= step)] for each in weights]
        for number, share in enumerate(shares):
            expected = len(positions) * share / sum(shares)
            assert abs(of[number] - expected) < 2 and (share or not of[number])


def test_targets_are_counted_as_they_are_cut() -> None:
    dealing = order(3, 1, 2, accumulate=2)
    for first in range(0, 60, 2):
        by_window = [dealing.cut(np.arange(*dealing.span(batch)))[1] for batch in (first, first + 1)]
        assert dealing.n_targets(range(first, first + 2)) == sum(int(part.sum()) for part in by_window)


def test_windows_before_a_position_are_counted() -> None:
    dealing, begins = order({0: 1, 4: 3}, 1, {0: 2, 9: 0}), np.cumsum([0, *SIZES.values()])
    starts, _ = dealing.cut(np.arange(100))
    of = (begins.searchsorted(starts, side="right") - 1).tolist()
    for position in range(100):
        assert dealing.consumed(position) == [of[:position].count(number) for number in range(3)]


def test_a_batch_is_cut_as_its_windows_are() -> None:
    """What is kept for the next batches changes nothing, wherever a batch lies in it."""
    epochs = tuple(Epochs(n_tokens=size * 997, seq_len=10, seed=size) for size in SIZES.values())
    phases = phases_of([(1.0, 2.0, 3.0), (0.0, 1.0, 1.0)], [0, 1021])
    dealing = MixtureOrder(sources=epochs, phases=phases, seq_len=10)
    for first in (0, 1000, 1010, 1024, 4080, 20_000):
        positions = np.arange(first, first + 36, 3)
        one_by_one = [dealing._cut(position) for position in positions[:, None]]
        starts, lengths = dealing.cut(positions)
        assert starts.tolist() == [start.item() for start, _ in one_by_one]
        assert lengths.tolist() == [length.item() for _, length in one_by_one]


def test_seeking_far_takes_as_long_as_seeking_near() -> None:
    took = []
    for start in (10**3, 10**12):
        epochs = tuple(Epochs(n_tokens=10**13 + n, seq_len=1024, seed=n) for n in range(3))
        dealing = MixtureOrder(
            sources=epochs, phases=phases_of([(0.5, 0.3, 0.2)], [0]), seq_len=1024, start=start
        )
        begun = time.process_time()
        positions = np.arange(*dealing.span(1000))
        assert positions[0] == start + 1000 and sum(dealing.consumed(start)) == start
        starts, lengths = dealing.cut(positions)
        assert (lengths > 0).all() and (starts < 3 * 10**13 + 3).all()
        took.append(time.process_time() - begun)
    assert max(took) < 0.2


def test_the_first_source_to_begin_again_is_found() -> None:
    dealing, windows = order(3, 1, 2, accumulate=2), [11, 5, 26]
    assert dealing.first_end is not None
    end, index = dealing.first_end
    assert dealing.consumed(end)[index] == windows[index]
    assert dealing.consumed(end + 1)[index] == windows[index] + 1
    assert all(used <= of for used, of in zip(dealing.consumed(end), windows, strict=True))
    steps = dealing.steps_until(end)
    assert dealing.span(2 * steps - 1)[1] <= end < dealing.span(2 * steps + 1)[1]
    (other, number) = order({0: 1, 1: 0}, {0: 1, 1: 0}, {0: 0, 1: 1}).first_end or (0, 0)
    assert number == 2 and other == 26 + 4  # the first step took nothing of it
