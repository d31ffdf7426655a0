"""Causal attention on a CPU: matrix products over blocks of queries, which see only the keys before them.

PyTorch's fused kernel for CPUs spends most of its time outside the matrix products. Here a block's scores
stay in the processor's cache, and what lies above the diagonal is hardly computed: the attention of a
training step takes half the time in bfloat16, a quarter less in float32 (256 to 1024 tokens, 6 and 12 heads
of 64, x86 with AVX-512). In return bfloat16 rounds scores and weights, which the fused kernel does not.
Shapes: B batch, T time, H heads, K head_dim, G = rows of the batch taken at a time x H.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries
_SCORE_BYTES_AT_A_TIME = 2**21  # within the processor's cache
# That a layer keeps for its backward pass; if there are more, and no dropout, it computes them again.
_SCORES_KEPT = 2**24


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Attends causally: q, k and v of [B, T, H, K] each give [B, T, H, K]."""
    output: Tensor = _AttentionInBlocks.apply(q, k, v, dropout_p)
    return output


def scores_kept(B: int, T: int, H: int, dropout_p: float) -> int:
    """Counts the scores that a layer keeps for its backward pass."""
    is_kept = dropout_p > 0 or B * H * T * (T + BLOCK) // 2 <= _SCORES_KEPT
    return B * H * sum((end - start) * end for start, end in _blocks(T)) if is_kept else 0


class _AttentionInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        B, T, H, K = q.shape
        output = q.new_empty(B, T, H, K)
        kept: list[Tensor] = []
        ctx.keep_scores = scores_kept(B, T, H, dropout_p) > 0
        ctx.dropout_p = dropout_p
        future = _future(q)
        for rows in _rows(q):
            queries, keys, values = _heads(q[rows]), _heads(k[rows]), _heads(v[rows])
            for start, end in _blocks(T):
                weights = _weights(queries, keys, start, end, future)
                if ctx.keep_scores:
                    kept.append(weights)
                if dropout_p > 0:
                    stays = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout_p)
                    kept.append(stays)
                    weights = weights * stays
                y = _product(weights, values[:, :end], 1 / (1 - dropout_p))  # [G, block, K]
                output[rows, start:end] = y.view(-1, H, end - start, K).transpose(1, 2)
        ctx.save_for_backward(q, k, v, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *saved = ctx.saved_tensors
        kept = iter(saved)
        B, T, H, K = q.shape
        scale, stay_scale = K**-0.5, 1 / (1 - ctx.dropout_p)
        all_grads = q.new_empty(3, B, H, T, K)
        future = _future(q)
        for rows in _rows(q):
            queries, keys, values = _heads(q[rows]), _heads(k[rows]), _heads(v[rows])
            y_grad = _heads(grad_outputs[0][rows])
            # A key's gradient is a sum over the blocks, whose rounding would grow with their number.
            sum_dtype = torch.promote_types(q.dtype, torch.float32)
            q_grad, k_grad, v_grad = grads = q.new_zeros(3, *queries.shape, dtype=sum_dtype)
            for start, end in _blocks(T):
                weights = next(kept) if ctx.keep_scores else _weights(queries, keys, start, end, future)
                grad = y_grad[:, start:end]
                dropped, weights_grad = weights, _product(grad, values[:, :end].mT, stay_scale)
                if ctx.dropout_p > 0:
                    stays = next(kept)
                    dropped = weights * stays
                    weights_grad *= stays
                v_grad[:, :end] += _product(dropped.mT, grad, stay_scale)
                scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
                q_grad[:, start:end] = _product(scores_grad, keys[:, :end], scale)
                k_grad[:, :end] += _product(scores_grad.mT, queries[:, start:end], scale)
            all_grads[:, rows] = grads.view(3, -1, H, T, K)
        return *all_grads.transpose(2, 3), None


def _rows(q: Tensor) -> Iterator[slice]:
    """Yields rows of the batch, as many at a time as the cache holds the scores of."""
    B, T, H, _ = q.shape
    at_a_time = max(1, _SCORE_BYTES_AT_A_TIME // (H * T * min(T, BLOCK) * q.element_size()))
    return (slice(start, start + at_a_time) for start in range(0, B, at_a_time))


def _blocks(T: int) -> Iterator[tuple[int, int]]:
    return ((start, min(T, start + BLOCK)) for start in range(0, T, BLOCK))


def _heads(x: Tensor) -> Tensor:
    """Puts [B, T, H, K] head by head, [G, T, K]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _future(q: Tensor) -> Tensor:
    """Hides keys that follow their query: -inf, to be added to the scores of a block on the diagonal."""
    size = min(BLOCK, q.shape[1])
    return q.new_full((size, size), -torch.inf).triu(1)


def _weights(q: Tensor, k: Tensor, start: int, end: int, future: Tensor) -> Tensor:
    """Returns the softmax of a block's scores, [G, block, end]."""
    scores = _product(q[:, start:end], k[:, :end].mT, q.shape[-1] ** -0.5)
    scores[:, :, start:] += future[: end - start, : end - start]
    return torch.softmax(scores, dim=-1)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Computes scale * (a @ b), scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
