"""Rotary positions (Su et al., 2021): queries and keys are turned by angles that grow with their positions.

Scores then depend on distances alone. The halves of a head make up the pairs that are turned, as in Hugging
Face's models; in the paper, and in Llama's own files, neighbours do.
A model of short texts is used for longer ones by slowing down the pairs: all of them (linear; Chen et al.,
2023), or only the slow ones, which had not gone round in the short texts, with a transition by the turns of a
pair (llama3; 2024) or by its number (yarn; Peng et al., 2023). Types and options have Hugging Face's names.
Shapes: B batch, T time, H heads, K head_dim.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Turn = Callable[[Tensor], Tensor]
Scaling = Mapping[str, int | float | str]  # GPTConfig.rope_scaling


class Rotary(nn.Module):
    """Turns each pair of a head at a speed of its own, from 1 down to 1 / theta radians a token."""

    def __init__(self, head_dim: int, theta: float, scaling: Scaling | None = None) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling

    def forward(self, positions: Tensor) -> Turn:
        """Returns what turns [B, T, H, K] by these positions, [T] or [B, T]."""
        # Not kept: a model may be built on the meta device, and used within and outside of inference mode.
        speeds, length = speeds_of(self.theta, self.head_dim, self.scaling, positions.device)
        angles = (positions.float()[..., None] * speeds)[..., None, :]  # [(B,) T, 1, K / 2]
        cos, sin = angles.cos() * length, angles.sin() * length
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

        def turn(x: Tensor) -> Tensor:
            # (a, b) becomes (a * cos - b * sin, b * cos + a * sin); one rounding more in low precision, as
            # Hugging Face's, and half of the memory.
            swapped = x.roll(x.shape[-1] // 2, dims=-1)
            return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))

        return turn


def speeds_of(
    theta: float, head_dim: int, scaling: Scaling | None, device: torch.device
) -> tuple[Tensor, float]:
    """Returns the pairs' speeds in radians a token, [K / 2], and what queries and keys are multiplied by."""
    numbers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    speeds = theta ** (-numbers / head_dim)
    if scaling is None:
        return speeds, 1.0
    options = {name: float(value) for name, value in scaling.items() if name != "rope_type"}
    factor, length = options["factor"], 1.0
    kept = torch.zeros_like(speeds)  # the share of each speed that is not slowed down
    if scaling["rope_type"] == "llama3":
        turns = options["original_max_position_embeddings"] * speeds / (2 * math.pi)
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling["rope_type"] == "yarn":
        length = options.get("attention_factor", 0.1 * math.log(factor) + 1)
        kept = _fast_pairs(theta, head_dim, options, numbers / 2)
    return speeds * (kept + (1 - kept) / factor), length


def _fast_pairs(theta: float, head_dim: int, options: Mapping[str, float], pairs: Tensor) -> Tensor:
    """Returns 1 for yarn's fast pairs and 0 for its slow ones, along a ramp between the two."""

    def pair_with(turns: float) -> float:
        longest = options["original_max_position_embeddings"] / (2 * math.pi * turns)
        return head_dim * math.log(longest) / (2 * math.log(theta))

    first = max(math.floor(pair_with(options.get("beta_fast", 32.0))), 0)
    last = min(math.ceil(pair_with(options.get("beta_slow", 1.0))), head_dim - 1)
    return 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)


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
