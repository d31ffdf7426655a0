"""Squares and norms against those of one long vector in float64."""

import pytest
import torch
from torch import Tensor

from gpt_lightning.parallel.gradients import _SMALL, norm, squares


def gradients() -> list[Tensor]:
    torch.manual_seed(0)
    matrix = torch.randn(300, 2 * _SMALL // 300)
    return [
        torch.randn(7, 5),
        torch.randn(()),
        matrix,
        matrix.t() * 2,  # not contiguous
        torch.randn(0),
        torch.randn(9).bfloat16(),
        torch.randn(4, 4).double(),
        torch.randn(5, 6).t()[::2],
    ]


def test_squares_are_those_of_all_elements() -> None:
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients())
    assert sum(map(float, squares(gradients()))) == pytest.approx(expected, rel=1e-6)
    assert float(norm(gradients())) == pytest.approx(expected**0.5, rel=1e-6)


def test_nothing_has_no_length() -> None:
    assert squares([]) == [] and norm([]) == 0


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5, 6, 7])  # all that have elements
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite_shows(place: int, value: float) -> None:
    given = gradients()
    given[place][(-1,) * given[place].dim()] = value
    assert not norm(given).isfinite()
