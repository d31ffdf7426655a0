"""Loss over many batches, exact on any batch size and device count."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from typing_extensions import override


class TokenLoss(Metric):
    """Mean negative log-likelihood per scored token, in nats: summed nll over summed tokens.

    The mean of batch means would weigh tokens by how they were batched, and `torchmetrics.text.Perplexity`
    returns inf where one token's probability underflows in float32.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        # On the host, also where the model around it is built on the meta device.
        with torch.device("cpu"):
            super().__init__()
            self.add_state("nll", torch.zeros((), dtype=_sum_dtype()), dist_reduce_fx="sum")
            self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add a batch's summed nll and the number of tokens it was summed over."""
        self.nll += nll.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        return self.nll / self.tokens

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Follow the model to its device, but not to its dtype: in bfloat16 the sum stops growing at 256."""
        super()._apply(fn, exclude_state)
        self.nll = self.nll.to(_sum_dtype())
        self._defaults["nll"] = torch.zeros_like(self.nll)
        return self


def _sum_dtype() -> torch.dtype:
    return torch.float32 if torch.backends.mps.is_available() else torch.float64
