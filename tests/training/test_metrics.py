import math

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from gpt_lightning.training.metrics import TokenLoss


def mean(*batches: tuple[torch.Tensor, int]) -> float:
    loss = TokenLoss()
    for nll, tokens in batches:
        loss.update(nll, torch.tensor(tokens))
    return float(loss.compute(SingleDeviceStrategy()))


def test_loss_is_total_nll_over_total_tokens() -> None:
    # The mean of batch means would be 1.6.
    assert mean((torch.tensor(6.0), 2), (torch.tensor(1.0), 5)) == 1.0


def test_improbable_tokens_stay_finite() -> None:
    logits = torch.zeros(1, 3, 10)
    logits[0, 1, 4] = 300.0  # the probability of the true token underflows in float32
    targets = torch.tensor([[1, 2, 3]])
    nll = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
    assert abs(mean((nll, 3)) - (2 * math.log(10) + 300) / 3) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_exact_over_many_batches_whatever_their_dtype(dtype: torch.dtype) -> None:
    for nll, n_tokens in (torch.tensor(0.1, dtype=dtype), 1), (torch.tensor(4096 * 3.3, dtype=dtype), 4096):
        assert abs(mean(*[(nll, n_tokens)] * 10_000) - float(nll) / n_tokens) < 1e-9
