"""Causal attention behind one door: whatever is cached or packed into a row, a layer calls `attend(q, k, v)`.

Documents packed into one row, each a run of equal ids, see only themselves, without a mask where it can be:
- On CUDA with Triton, without dropout: FlexAttention, which skips the blocks that no document reaches.
- On a CPU, in long rows: causal attention document by document; in short ones the calls would cost more.
- Else a mask [B, 1, T, T]. FlexAttention knows no dropout and, on a CPU, no backward pass.
FlexAttention is imported where it is used: its compiler takes as long to import as PyTorch itself.
Keys and values may have fewer heads than queries: each then serves H / N of theirs, which lie side by side.
Shapes: B batch, T time, H heads, N heads of keys and values, K head_dim, S cached tokens.
"""

import copy
import math
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # `torch.compiler.disable`, which imports the compiler at once

from gpt_lightning.kernels.cpu_attention import attention_in_blocks
from gpt_lightning.kernels.device import can_compile_for_cuda, trains_on_cpu
from gpt_lightning.kernels.linear import onednn_multiplies

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128  # FlexAttention's own default
MIN_HEAD_DIM = 16  # of FlexAttention's kernels
LONG_ROW = 512
# Cached tokens are seen in blocks of so many: then a CPU's kernels add a row's products in the same order
# whatever the longest row's length is.
CACHE_BLOCK = 16
# Multiplications of one product below which calling a CPU's blocks from Python costs more than it spares.
_LEAST_WORK = {torch.bfloat16: 2**18, torch.float32: 2**27}


def in_blocks(n_tokens: int) -> int:
    """Rounds up to whole blocks of the cache."""
    return -(-n_tokens // CACHE_BLOCK) * CACHE_BLOCK


class KVCache:
    """Holds keys and values of tokens already seen, in which every row (sequence) has a length of its own.

    The storage is allocated at the first write and takes heads, width, dtype and device from the tensors
    written, so that the cache needs no configuration and a tensor-parallel shard gets a shard-sized cache.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.max_length = max_length
        # On the host: reading it costs no device sync.
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self._rows = slice(0, batch_size)  # in view
        self._storage_rows = batch_size
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values, each [rows, N, max_length, K]

    def rows(self, start: int, stop: int) -> "KVCache":
        """Returns a view of some rows, which shares keys, values and lengths with the whole."""
        view = copy.copy(self)
        view.lengths = self.lengths[start:stop]
        view._rows = slice(self._rows.start + start, self._rows.start + stop)
        return view

    def grow(self, batch_size: int, max_length: int) -> None:
        """Makes room for so many rows of so many tokens; what it holds stays."""
        n_more = batch_size - self._storage_rows
        more = (0, 0, 0, in_blocks(max_length) - in_blocks(self.max_length), 0, 0, 0, n_more)
        for n, layer in enumerate(self._layers):  # one after the other, so that only one is held twice
            self._layers[n] = F.pad(layer[0], more), F.pad(layer[1], more)
        self.lengths = F.pad(self.lengths, (0, n_more))
        self.max_length, self._storage_rows, self._rows = max_length, batch_size, slice(0, batch_size)

    def copy_row(self, source: int, destination: int, length: int) -> None:
        """Makes one row hold the first `length` tokens of another."""
        first = self._rows.start
        for storage in chain.from_iterable(self._layers):
            storage[first + destination, :, :length] = storage[first + source, :, :length]
        self.lengths[destination] = length

    def begin(self, n_tokens: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Makes ready for the next tokens of each row, whose keys and values the layers write in turn.

        Returns their positions [B, T], counted from each row's start, and what they see of the cached tokens,
        [B, 1, T, S]; None where causal attention shows them just that. `lengths` are the caller's to raise:
        a pass that fails is begun again where it began.
        """
        longest = int(self.lengths.max())
        self._n_tokens, self._n_written, self._longest = n_tokens, 0, longest
        self._is_even = bool((self.lengths == longest).all())
        is_first = longest == 0 and n_tokens > 1
        self._end = n_tokens if is_first else in_blocks(longest + n_tokens)
        assert self._end <= in_blocks(self.max_length), "the engine slides the window before it is full"
        positions = self.lengths[:, None] + torch.arange(n_tokens)
        mask: Tensor | None = None
        if not is_first:
            mask = (torch.arange(self._end) <= positions[:, :, None])[:, None].to(device)
        self._row = torch.arange(len(positions), device=device)[:, None]
        self._positions = positions.to(device)
        return self._positions, mask

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the next layer's [B, N, T, K] at each row's length; returns all of its, [B, N, S, K].

        S is the longest row's length afterwards, but for the first tokens in whole blocks; what lies beyond a
        shorter row's length is not meaningful, and the mask hides it.
        """
        if self._n_written == len(self._layers):
            shape = (self._storage_rows, keys.shape[1], in_blocks(self.max_length), keys.shape[3])
            self._layers.append((keys.new_zeros(shape), keys.new_zeros(shape)))
        layer = self._layers[self._n_written]
        self._n_written += 1
        all_keys, all_values = (storage[self._rows, :, : self._end] for storage in layer)
        for cached, new in ((all_keys, keys), (all_values, values)):
            if self._is_even:
                cached[:, :, self._longest : self._longest + self._n_tokens] = new
            else:
                cached[self._row, :, self._positions] = new.transpose(1, 2)  # indexed: [B, T, N, K]
        return all_keys, all_values


class Attend:
    """Knows how a forward pass attends and at which `positions`; made once for it, called by every layer.

    With `document_ids` [B, T] a token sees its own document only, and positions restart with it.
    """

    def __init__(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        head_dim: int,
        dropout_p: float,
    ) -> None:
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids are not kept in a cache; give the one or the other")
        self.cache = cache
        self.mask: Tensor | Documents | BlockMask | None = None
        if cache is not None:
            self.positions, self.mask = cache.begin(input_ids.shape[1], input_ids.device)
        elif document_ids is not None:
            self.positions = document_positions(document_ids)
            self.mask = document_mask(self.positions, head_dim, dropout_p)
        else:
            self.positions = torch.arange(input_ids.shape[1], device=input_ids.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attends: q of [B, T, H, K], k and v of [B, T, N, K] give [B, T, H, K]."""
        if self.cache is not None:
            return self._to_cached(self.cache, q, k, v)
        if (group := q.shape[2] // k.shape[2]) > 1:
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        if self.mask is None and runs_in_blocks(q):
            return attention_in_blocks(q, k, v, dropout_p)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each [B, H, T, K]
        if isinstance(self.mask, Documents):
            y = self.mask.attend(q, k, v, dropout_p)
        elif self.mask is None or isinstance(self.mask, Tensor):
            y = F.scaled_dot_product_attention(q, k, v, self.mask, dropout_p, self.mask is None)
        else:
            y = _flex_attention(q, k, v, self.mask)
        return y.transpose(1, 2)

    def _to_cached(self, cache: KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, group = q.transpose(1, 2), q.shape[2] // k.shape[2]  # q [B, H, T, K]
        k, v = cache.write(k.transpose(1, 2), v.transpose(1, 2))  # each [B, N, S, K]
        assert self.mask is None or isinstance(self.mask, Tensor)
        if self.mask is not None and self.mask.dtype != q.dtype:
            # Added to the scores, as PyTorch would make of it in every layer anew.
            self.mask = torch.zeros_like(self.mask, dtype=q.dtype).masked_fill_(~self.mask, -math.inf)
        if q.shape[2] > 1:
            if group > 1:
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None)
            return y.transpose(1, 2)
        if group > 1:
            return _of_groups(q, k, v, self.mask).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2)


def _of_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attends with one token, q [B, H, 1, K], to k and v [B, N, S, K], which its heads share in groups."""
    B, N, S, K = k.shape
    if q.dtype != torch.float32 or q.device.type != "cpu":
        # The heads see the same keys, as if they were a group of tokens.
        return F.scaled_dot_product_attention(q.reshape(B, N, -1, K), k, v, mask).reshape(q.shape)
    # Such a group would be summed in an order that changes with S. Each group's heads are a batch instead,
    # and keys and values are repeated in name only.
    q = q.reshape(B * N, -1, 1, K)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = None if mask is None else mask.expand(B, N, 1, S).reshape(B * N, 1, 1, S)
    return F.scaled_dot_product_attention(q, k, v, mask).view(B, -1, 1, K)


def runs_in_blocks(q: Tensor) -> bool:
    """Tells where a CPU's blocks pay: in training, uncompiled, where oneDNN multiplies."""
    if not trains_on_cpu(q):
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
