"""The size of a gradient, in as few calls and passes over memory as the device allows."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

_SMALL = 2**16  # elements


def squares(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Numbers of float32 at least, whose sum is that of the squares of all elements."""
    small: list[Tensor] = []
    large: list[Tensor] = []
    others: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if not (type(gradient) is Tensor and gradient.is_cpu and gradient.dtype == torch.float32):
            others.setdefault(gradient.dtype, []).append(gradient)
        elif gradient.numel() < _SMALL:
            small.append(gradient)
        else:
            large.append(gradient)
    pieces = [gradient.flatten() for gradient in large]
    if small:  # a call for each takes longer than its elements do
        pieces.append(_flatten_dense_tensors(small))  # DistributedDataParallel's: two thirds of a cat's time
    values = [piece.dot(piece) for piece in pieces]
    for dtype, tensors in others.items():
        norms = torch._foreach_norm(tensors, 2, dtype=torch.promote_types(dtype, torch.float32))
        values.append(torch.stack(norms).square().sum())
    return values


def norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all together."""
    values = squares(gradients)
    return torch.stack(values).sum().sqrt() if values else torch.zeros(())
