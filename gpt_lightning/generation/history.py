"""What the tokens so far say about the next one: the repetition penalty, and n-grams that may not come again.

Shapes: B rows in use, V vocabulary.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import GenerationConfig, repetition_penalty


class Histories:
    """The tokens of each row in use, in the form that adjusting the next logits needs."""

    def __init__(
        self, settings: GenerationConfig, n_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self._penalty = settings.repetition_penalty
        self._ngram_size = settings.no_repeat_ngram_size
        self._seen: Tensor | None = None
        if self._penalty != 1.0:
            self._seen = torch.zeros(n_rows, vocab_size, dtype=torch.bool, device=device)
        self._ngrams: list[_Ngrams] | None = None
        if self._ngram_size is not None:
            self._ngrams = [_Ngrams(self._ngram_size) for _ in range(n_rows)]

    def begin(self, row: int, tokens: list[int]) -> None:
        """Forget a row's tokens, and take these for it."""
        if self._seen is not None:
            self._seen[row] = False
            self._seen[row, tokens] = True
        if self._ngrams is not None:
            assert self._ngram_size is not None
            self._ngrams[row] = _Ngrams(self._ngram_size)
            for token in tokens:
                self._ngrams[row].append(token)

    def append(self, row: int, token: int) -> None:
        if self._seen is not None:
            self._seen[row, token] = True
        if self._ngrams is not None:
            self._ngrams[row].append(token)

    def move(self, source: int, destination: int) -> None:
        if self._seen is not None:
            self._seen[destination] = self._seen[source]
        if self._ngrams is not None:
            self._ngrams[destination] = self._ngrams[source]

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits [B, V] of the first rows, less what their tokens take away; -inf for what may not come."""
        if self._seen is not None:
            logits = repetition_penalty(logits, self._seen[: len(logits)], self._penalty)
        if self._ngrams is not None:
            banned = [ngrams.completing() for ngrams in self._ngrams[: len(logits)]]
            rows = [row for row, tokens in enumerate(banned) for _ in tokens]
            logits = logits.clone()
            logits[rows, [token for tokens in banned for token in tokens]] = -math.inf
        return logits


class _Ngrams:
    """A text's n-grams, by their beginnings."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()  # size - 1 tokens, once there are so many
        self._completions: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)

    def append(self, token: int) -> None:
        if len(self._last) == self._size - 1:
            self._completions[self._last].add(token)
            self._last = (*self._last, token)[1:]
        else:
            self._last = (*self._last, token)

    def completing(self) -> set[int]:
        """The tokens that would make an n-gram of the text come again."""
        return self._completions.get(self._last, set()) if len(self._last) == self._size - 1 else set()
