"""A probe times all tokens of a pass where it can, and never too few to hide what a pass costs once."""

import pytest
import torch

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.planning import probe
from gpt_lightning.planning.setup import Setup


@pytest.mark.parametrize(
    ("seconds_a_token", "n_tokens"),
    [(1e-6, 768), (1e-3, 256), (1.0, 64)],  # all; as many as take up to 0.3 s; the fewest
)
def test_the_sample_is_as_large_as_the_time_allows(
    seconds_a_token: float, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTConfig(50, 256, n_layers=1, n_heads=2, d_model=8)
    sizes: list[int] = []
    block = probe._Block

    def noted(setup: Setup, model: GPTModel, ids: torch.Tensor) -> probe._Block:
        sizes.append(ids.numel())
        return block(setup, model, ids)

    monkeypatch.setattr(probe, "_Block", noted)
    monkeypatch.setattr(probe, "_seconds", lambda call, device: sizes[-1] * seconds_a_token)
    setup = Setup(config, 256, 3, on_cpu=True)
    _, ids = probe._sample(setup, GPTModel(config), torch.device("cpu"))
    assert ids.numel() == n_tokens
