"""Keys and values of the tokens already seen, so that generation computes each token once.

Shapes: B batch, H heads, T new tokens, S cached tokens, K head_dim.
"""

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values in which every row (sequence) has a length of its own.

    The storage is allocated at the first write and takes heads, width, dtype and device from the tensors
    written, so that the cache needs no configuration and a tensor-parallel shard gets a shard-sized cache.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.max_length = max_length
        self.lengths = torch.zeros(
            batch_size, dtype=torch.long
        )  # on the host: reading it costs no device sync
        self._first_row = 0
        self._total_rows = batch_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, start: int, stop: int) -> "KVCache":
        """A view of some rows; it shares keys, values and lengths with the whole."""
        view = KVCache.__new__(KVCache)
        view.max_length = self.max_length
        view.lengths = self.lengths[start:stop]
        view._first_row = self._first_row + start
        view._total_rows = self._total_rows
        view._layers = self._layers
        return view

    def clear(self, row: int) -> None:
        self.lengths[row] = 0

    def move_row(self, source: int, destination: int) -> None:
        """Copy one row over another, so that the rows in use stay next to each other."""
        length = int(self.lengths[source])
        for keys, values in self._layers.values():
            for tensor in (keys, values):
                moved = tensor[self._first_row + source, :, :length]
                tensor[self._first_row + destination, :, :length] = moved
        self.lengths[destination] = length

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, K] keys and values at each row's length; return all of them, [B, H, S, K].

        S is the longest row's length afterwards; what lies beyond a shorter row's length is not meaningful,
        and `attention_mask` hides it. The lengths themselves move on in `advance`, once per forward pass.
        """
        B, H, T, K = keys.shape
        if layer not in self._layers:
            shape = (self._total_rows, H, self.max_length, K)
            self._layers[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        end = int(self.lengths.max()) + T
        assert end <= self.max_length, "the engine slides the window before the cache is full"
        result = []
        for storage, new in zip(self._layers[layer], (keys, values)):
            own = storage[self._first_row : self._first_row + B]
            if self.is_even:
                own[:, :, end - T : end] = new
            else:
                row = torch.arange(B, device=new.device)[:, None]
                own[row, :, self.positions(T).to(new.device)] = new.transpose(1, 2)  # indexed: [B, T, H, K]
            result.append(own[:, :, :end])
        return result[0], result[1]

    @property
    def is_even(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return bool((self.lengths == self.lengths[0]).all())

    def positions(self, n_tokens: int) -> Tensor:
        """Positions [B, T] of the next tokens, counted from each row's start."""
        return self.lengths[:, None] + torch.arange(n_tokens)

    def attention_mask(self, n_tokens: int) -> Tensor | None:
        """Which cached tokens each new token sees, [B, 1, T, S]; None where causal attention does."""
        if not self.lengths.any() or (n_tokens == 1 and self.is_even):
            return None
        positions = self.positions(n_tokens)
        keys = torch.arange(int(positions.max()) + 1)
        return (keys[None, None, :] <= positions[:, :, None])[:, None]

    def advance(self, n_tokens: int) -> None:
        self.lengths += n_tokens
