import math

import torch

from gpt_lightning.training.metrics import TokenLoss


def test_loss_is_total_nll_over_total_tokens() -> None:
    metric = TokenLoss()
    metric.update(torch.tensor(6.0, dtype=torch.float64), torch.tensor(2))
    metric.update(torch.tensor(1.0, dtype=torch.float64), torch.tensor(5))
    assert float(metric.compute()) == 1.0  # the mean of batch means would be 1.6


def test_improbable_tokens_stay_finite() -> None:
    logits = torch.zeros(1, 3, 10)
    logits[0, 1, 4] = 300.0  # the probability of the true token underflows in float32
    targets = torch.tensor([[1, 2, 3]])
    nll = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
    metric = TokenLoss()
    metric.update(nll, torch.tensor(3))
    expected = (2 * math.log(10) + 300) / 3
    assert abs(float(metric.compute()) - expected) < 1e-4


def test_the_models_dtype_leaves_the_sums_alone() -> None:
    metric = TokenLoss().to(torch.bfloat16)
    for _ in range(1000):
        metric.update(torch.tensor(4096 * 3.3, dtype=torch.float64), torch.tensor(4096))
    assert abs(float(metric.compute()) - 3.3) < 1e-9
    metric.reset()
    assert metric.nll.dtype == torch.float64


def test_sums_are_exact_over_many_batches() -> None:
    metric = TokenLoss()
    for _ in range(10_000):
        metric.update(torch.tensor(0.1, dtype=torch.float64), torch.tensor(1))
    assert abs(float(metric.compute()) - 0.1) < 1e-12
