"""Causal attention behind one door: whatever is cached or packed into a row, a layer calls `attend(q, k, v)`.

Documents packed into one row, each a run of equal ids, see only themselves, without a mask where it can be:
- On CUDA with Triton, without dropout: FlexAttention, which skips the blocks that no document reaches.
- On a CPU, in long rows: causal attention document by document; in short ones the calls would cost more.
- Else a mask [B, 1, T, T]. FlexAttention knows no dropout and, on a CPU, no backward pass.
FlexAttention is imported where it is used: its compiler takes as long to import as PyTorch itself.
Shapes: B batch, T time, H heads, K head_dim, S cached tokens.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # `torch.compiler.disable`, which imports the compiler at once

from gpt_lightning.kernels.cpu_attention import attention_in_blocks
from gpt_lightning.kernels.device import can_compile_for_cuda
from gpt_lightning.kernels.linear import onednn_multiplies

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128  # FlexAttention's own default
MIN_HEAD_DIM = 16  # of FlexAttention's kernels
LONG_ROW = 512
# Multiplications of one product below which calling a CPU's blocks from Python costs more than it spares.
_LEAST_WORK = {torch.bfloat16: 2**18, torch.float32: 2**27}


class Cached(Protocol):
    """Keeps the keys and values of a forward pass, layer by layer, and tells what it sees of earlier ones."""

    positions: Tensor
    mask: Tensor | None  # None: causal

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class Attend:
    """Knows how a forward pass attends and at which `positions`; made once for it, called by every layer.

    With `document_ids` [B, T] a token sees its own document only, and positions restart with it.
    """

    def __init__(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cached: Cached | None = None,
        *,
        head_dim: int,
        dropout_p: float,
    ) -> None:
        if cached is not None and document_ids is not None:
            raise ValueError("document_ids are not kept in a cache; give the one or the other")
        self.cached = cached
        self.mask: Tensor | Documents | BlockMask | None = None
        if cached is not None:
            self.positions, self.mask = cached.positions, cached.mask
        elif document_ids is not None:
            self.positions = document_positions(document_ids)
            self.mask = document_mask(self.positions, head_dim, dropout_p)
        else:
            self.positions = torch.arange(input_ids.shape[1], device=input_ids.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attends: q, k and v of [B, T, H, K] each give [B, T, H, K]."""
        if self.mask is None and self.cached is None and runs_in_blocks(q):
            return attention_in_blocks(q, k, v, dropout_p)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each [B, H, T, K]
        if self.cached is not None:
            k, v = self.cached.write(k, v)  # each [B, H, S, K]
        if isinstance(self.mask, Documents):
            y = self.mask.attend(q, k, v, dropout_p)
        elif self.mask is None or isinstance(self.mask, Tensor):
            is_causal = self.mask is None and q.shape[2] > 1  # a single token sees all that are cached
            y = F.scaled_dot_product_attention(q, k, v, self.mask, dropout_p, is_causal)
        else:
            y = _flex_attention(q, k, v, self.mask)
        return y.transpose(1, 2)


def runs_in_blocks(q: Tensor) -> bool:
    """Tells where a CPU's blocks pay: in training, uncompiled, where oneDNN multiplies."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    B, T, H, K = q.shape
    worthwhile = B * H * T * T * K >= _LEAST_WORK.get(q.dtype, math.inf)
    return worthwhile and onednn_multiplies(q.dtype)


class Documents:
    """Attends within one document after the other."""

    def __init__(self, positions: Tensor) -> None:
        self.lengths = []  # tokens of each document, row by row
        for row in positions.cpu():
            starts = [*(row == 0).nonzero().flatten().tolist(), len(row)]
            self.lengths.append([end - start for start, end in zip(starts, starts[1:])])

    @_disable_dynamo  # else it would compile for the lengths of each batch anew
    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attends: q, k and v of [B, H, T, K] each give [B, H, T, K]."""
        rows = []
        for *of_row, lengths in zip(q, k, v, self.lengths, strict=True):
            attended = [
                F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
                for q, k, v in zip(*(x[None].split(lengths, dim=2) for x in of_row))  # each [1, H, length, K]
            ]
            rows.append(torch.cat(attended, dim=2))
        return torch.cat(rows)


def document_positions(document_ids: Tensor) -> Tensor:
    """Counts positions [B, T] from the start of each document."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return index - torch.cummax(index * starts, dim=1).values


def document_mask(positions: Tensor, head_dim: int, dropout_p: float) -> "Tensor | Documents | BlockMask":
    """Returns what keeps attention within documents, in the form that is fastest on the device."""
    device = positions.device.type
    if device == "cpu" and positions.shape[1] >= LONG_ROW:
        return Documents(positions)
    if device == "cuda" and head_dim >= MIN_HEAD_DIM and dropout_p == 0.0 and can_compile_for_cuda():
        return block_mask(positions)
    return dense_mask(positions)


def dense_mask(positions: Tensor) -> Tensor:
    """Tells of each token, by row, whether it sees each other one, [B, 1, T, T]."""
    index = torch.arange(positions.shape[1], device=positions.device)
    begins = (index - positions)[:, :, None]
    return ((begins <= index) & (index <= index[:, None]))[:, None]


def block_mask(positions: Tensor) -> "BlockMask":
    """Makes FlexAttention's mask from each row of blocks alone; `create_block_mask` would make T x T first.

    A row of blocks sees those from the one where its first token's document begins up to the diagonal. A
    block before the diagonal is seen whole if it begins no earlier than the document of the row's last token.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T, device = positions.shape[1], positions.device
    begins = torch.arange(T, device=device) - positions  # [B, T], never falling along a row
    blocks = torch.arange(-(-T // FLEX_BLOCK), device=device)
    firsts = blocks * FLEX_BLOCK
    lasts = (firsts + FLEX_BLOCK - 1).clamp(max=T - 1)
    before = blocks < blocks[:, None]  # [T / 128, T / 128], as all that follows per row
    seen = (begins[:, firsts, None] < firsts + FLEX_BLOCK) & (blocks <= blocks[:, None])
    whole = (begins[:, lasts, None] <= firsts) & before

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (begins[batch, query] <= key) & (key <= query)

    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~whole), *_ordered(whole), FLEX_BLOCK, mask_mod=sees, seq_lengths=(T, T)
    )


def _ordered(marks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many blocks each row marks and, marked ones first, which; with an axis for the heads."""
    order = marks.int().argsort(dim=-1, descending=True, stable=True)
    return marks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: "BlockMask") -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Within a compiled block it is compiled with it; on a CPU, where tests call it, it computes as it is.
    flex = flex_attention if torch.compiler.is_compiling() or q.device.type == "cpu" else _compiled_flex()
    return flex(q, k, v, block_mask=mask)


@cache
def _compiled_flex() -> Any:
    """Compiles FlexAttention, which else would hold all the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
