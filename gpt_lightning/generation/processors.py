"""Raises and lowers logits by what a text already holds, or by a token's name, before anything is drawn.

Shapes: B rows in use, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def add_bias(logits: Tensor, bias: dict[int, float]) -> Tensor:
    """Adds to the logits [B, V] of some tokens what `bias` says of each."""
    logits = logits.clone()
    logits[:, list(bias)] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits


def penalize_repetition(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    """Lowers (penalty > 1) or raises (< 1) the logits [B, V] of the tokens that the rows' texts hold."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[_places([set(tokens) for tokens in texts])] = True
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def penalize_counts(
    logits: Tensor, completions: list[list[int]], presence: float, frequency: float
) -> Tensor:
    """Subtracts from the logits of the tokens that the rows' completions hold, once and for each time."""
    counts = [Counter(tokens) for tokens in completions]
    rows, tokens = _places(counts)
    times = [n for each in counts for n in each.values()]
    penalties = presence + frequency * torch.tensor(times, dtype=logits.dtype, device=logits.device)
    logits = logits.clone()
    logits[rows, tokens] -= penalties
    return logits


def forbid_repeated_ngrams(logits: Tensor, texts: list[list[int]], size: int) -> Tensor:
    """Leaves no token that would make an n-gram of its row's text come again."""
    logits = logits.clone()
    logits[_places([repeating(tokens, size) for tokens in texts])] = -math.inf
    return logits


def _places(tokens_of_rows: Sequence[Collection[int]]) -> tuple[list[int], list[int]]:
    """Lists the rows and the columns of these tokens."""
    rows = [row for row, tokens in enumerate(tokens_of_rows) for _ in tokens]
    return rows, [token for tokens in tokens_of_rows for token in tokens]


def repeating(tokens: list[int], size: int) -> set[int]:
    """Finds the next tokens that would make an n-gram of the text come again."""
    beginning = tuple(tokens[len(tokens) - size + 1 :])
    ngrams = zip(*(tokens[start:] for start in range(size)))
    return {ngram[-1] for ngram in ngrams if ngram[:-1] == beginning}
