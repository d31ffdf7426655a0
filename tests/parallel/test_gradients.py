"""The norm of a gradient of which each peer holds a part, against that of one long vector in float64."""

from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt_lightning.parallel.gradients import gradient_norm
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard
from tests.distributed import run_ranks


def gradients() -> list[Tensor]:
    torch.manual_seed(0)
    matrix = torch.randn(300, 400)
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


PLACES = [place for place, gradient in enumerate(gradients()) if gradient.numel()]
VALUES = [float("nan"), float("inf"), -float("inf")]


def norms(cut: Iterable[int]) -> list[Tensor]:
    """In a rank: the norm of all gradients, of none, and of all with one element that is not finite."""
    dist.init_process_group("gloo")
    mesh = ParallelMesh("cpu", dist.get_world_size(), dist.get_world_size())

    def norm_of(whole: list[Tensor]) -> Tensor:
        parameters, shards = [], {}
        for place, gradient in enumerate(whole):
            shard = Shard(0, len(gradient), mesh.tp_rank, mesh.tp_size) if place in cut else None
            part = gradient if shard is None else shard.cut(gradient)
            parameter = nn.Parameter(torch.empty_like(part))
            parameter.grad = part
            parameters.append(parameter)
            if shard is not None:
                shards[parameter] = shard
        return gradient_norm(parameters, shards, mesh)

    found = [norm_of(gradients()), norm_of([])]
    for place in PLACES:
        for value in VALUES:
            given = gradients()
            given[place][(-1,) * given[place].dim()] = value
            found.append(norm_of(given))
    return found


@pytest.mark.parametrize("cut", [(), (0, 2, 3, 6), (0, 2, 3, 5, 6, 7)], ids=["none", "some", "most"])
def test_the_norm_counts_every_element_once(cut: tuple[int, ...]) -> None:
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients()) ** 0.5
    first, second = run_ranks(norms, 2, cut)
    whole, nothing, *not_finite = first
    assert float(whole) == pytest.approx(expected, rel=1e-5) and nothing == 0
    assert len(not_finite) == len(PLACES) * len(VALUES)
    assert not any(norm.isfinite() for norm in not_finite)
    assert [norm.isfinite() for norm in first] == [norm.isfinite() for norm in second] and second[0] == whole
