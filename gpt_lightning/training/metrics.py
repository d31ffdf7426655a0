"""Loss over many batches, exact on any batch size and device count."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean negative log-likelihood per scored token, in nats: summed nll over summed tokens.

    The mean of batch means would weigh tokens by how they were batched, and `torchmetrics.text.Perplexity`
    returns inf where one token's probability underflows in float32.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        sum_dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("nll", torch.zeros((), dtype=sum_dtype), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add a batch's summed nll and the number of tokens it was summed over."""
        self.nll += nll.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        return self.nll / self.tokens
