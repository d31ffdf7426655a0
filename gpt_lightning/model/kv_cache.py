"""Keys and values of the tokens already seen, so that generation computes each token once.

Shapes: B batch, H heads, T new tokens, S cached tokens, K head_dim.
"""

import copy

import torch
from torch import Tensor


class KVCache:
    """Holds preallocated keys and values, in which every row (sequence) has a length of its own.

    The storage is allocated at the first write and takes heads, width, dtype and device from the tensors
    written, so that the cache needs no configuration and a tensor-parallel shard gets a shard-sized cache.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.max_length = max_length
        # On the host: reading it costs no device sync.
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self._first_row = 0
        self._total_rows = batch_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, each [rows, H, max_length, K]

    def rows(self, start: int, stop: int) -> "KVCache":
        """Returns a view of some rows, which shares keys, values and lengths with the whole."""
        view = copy.copy(self)
        view.lengths = self.lengths[start:stop]
        view._first_row += start
        return view

    def copy_row(self, source: int, destination: int, length: int | None = None) -> None:
        """Makes one row hold the tokens of another, or the first `length` of them."""
        length = int(self.lengths[source]) if length is None else length
        for layer in self._layers.values():
            for storage in layer:
                copied = storage[self._first_row + source, :, :length]
                storage[self._first_row + destination, :, :length] = copied
        self.lengths[destination] = length

    def extend(self, n_tokens: int, device: torch.device) -> "CacheStep":
        """Lengthens each row by `n_tokens`, whose keys and values the layers write in turn."""
        step = CacheStep(self, n_tokens, device)
        self.lengths += n_tokens
        return step

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the rows in view, of the heads, width, dtype and device of `like`."""
        if layer not in self._layers:
            shape = (self._total_rows, like.shape[1], self.max_length, like.shape[3])
            self._layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        keys, values = self._layers[layer]
        if len(self.lengths) == self._total_rows:
            return keys, values
        rows = slice(self._first_row, self._first_row + len(self.lengths))
        return keys[rows], values[rows]


class CacheStep:
    """Tells all layers of one forward pass where its tokens go and what they see, worked out once.

    positions: [B, T], counted from each row's start.
    mask: [B, 1, T, S], the cached tokens that each new token sees; None where causal attention shows them.
    """

    def __init__(self, cache: KVCache, n_tokens: int, device: torch.device) -> None:
        lengths = cache.lengths
        longest = int(lengths.max())
        self._cache, self._n_tokens, self._n_layers_written = cache, n_tokens, 0
        self._end = longest + n_tokens
        assert self._end <= cache.max_length, "the engine slides the window before the cache is full"
        self._is_even = bool((lengths == longest).all())
        positions = lengths[:, None] + torch.arange(n_tokens)
        self.mask: Tensor | None = None
        if longest > 0 and not (n_tokens == 1 and self._is_even):
            keys = torch.arange(self._end)
            self.mask = (keys[None, None, :] <= positions[:, :, None])[:, None].to(device)
        self.positions = positions.to(device)
        self._row = torch.arange(len(lengths), device=device)[:, None]

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the next layer's [B, H, T, K] at each row's length; returns all of its, [B, H, S, K].

        S is the longest row's length afterwards; what lies beyond a shorter row's length is not meaningful,
        and `mask` hides it.
        """
        all_keys, all_values = self._cache.layer(self._n_layers_written, keys)
        self._n_layers_written += 1
        for storage, new in ((all_keys, keys), (all_values, values)):
            if self._is_even:
                storage[:, :, self._end - self._n_tokens : self._end] = new
            else:
                storage[self._row, :, self.positions] = new.transpose(1, 2)  # indexed: [B, T, H, K]
        return all_keys[:, :, : self._end], all_values[:, :, : self._end]
