"""Rotary positions (Su et al., 2021): queries and keys are turned by angles that grow with their positions.

Scores then depend on distances alone. The halves of a head make up the pairs that are turned, as in Hugging
Face's models; in the paper, and in Llama's own files, neighbours do.
Shapes: B batch, T time, H heads, K head_dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Turn = Callable[[Tensor], Tensor]


class Rotary(nn.Module):
    """Turns each pair of a head at a speed of its own, from 1 down to 1 / theta radians a token."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Tensor) -> Turn:
        """Returns what turns [B, T, H, K] by these positions, [T] or [B, T]."""
        # Not kept: a model may be built on the meta device, and used within and outside of inference mode.
        numbers = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        speeds = self.theta ** (-numbers / self.head_dim)
        angles = (positions.float()[..., None] * speeds)[..., None, :]  # [(B,) T, 1, K / 2]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

        def turn(x: Tensor) -> Tensor:
            # (a, b) becomes (a * cos - b * sin, b * cos + a * sin); one rounding more in low precision, as
            # Hugging Face's, and half of the memory.
            swapped = x.roll(x.shape[-1] // 2, dims=-1)
            return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))

        return turn


class NoRotary(nn.Module):
    """Leaves queries and keys as they are, for positions that are added to the tokens."""

    def forward(self, positions: Tensor) -> Turn:
        return _same


class NoPositionEmbedding(nn.Module):
    """Adds nothing to the tokens, for positions that turn queries and keys."""

    def forward(self, positions: Tensor) -> float:
        return 0.0


def _same(x: Tensor) -> Tensor:
    return x
