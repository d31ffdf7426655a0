"""Tells how likely a model finds each token of a text, and what it would rather have read there.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_lightning.generation.engine import evaluating
from gpt_lightning.generation.prefill import visible_start
from gpt_lightning.kernels.attention import KVCache
from gpt_lightning.model.gpt import GPTModel

_AT_ONCE = 256  # logits of so many tokens are in memory together


class ScoredToken(NamedTuple):
    """Holds a token, its log-probability by the model alone, and the likeliest other tokens with theirs.

    Before the first token of a text nothing stands to predict it from: its log-probability is None.
    """

    token_id: int
    logprob: float | None
    others: list[tuple[int, float]]


@torch.inference_mode()
def score_tokens(
    model: GPTModel, token_ids: list[int], *, n_others: int = 5, context_stride: int | None = None
) -> list[ScoredToken]:
    """Scores each token from those before it that the Engine would see there, in a pass a context."""
    with evaluating(model):
        pieces = score_in_pieces(model, token_ids, n_others=n_others, context_stride=context_stride)
        return [token for tokens, _ in pieces for token in tokens]


@torch.inference_mode()
def score_in_pieces(
    model: GPTModel,
    token_ids: list[int],
    *,
    n_others: int = 5,
    context_stride: int | None = None,
    piece: int | None = None,
) -> Iterator[tuple[list[ScoredToken], bool]]:
    """Yields the scores after each pass, which reads at most `piece` tokens, and whether a context is read.

    Where one is, nothing is kept until the next pass. The model must be in evaluation mode.
    """
    context = model.config.max_position_embeddings
    n_others = min(n_others, model.config.vocab_size - 1)
    device = next(model.parameters()).device
    if token_ids:
        yield [ScoredToken(token_ids[0], None, [])], True
    places = range(1, len(token_ids))
    for start, group in groupby(places, lambda n: visible_start(n, context, context_stride)):
        first, *_, last = 2 * [*group]
        seen = torch.tensor(token_ids[start:last], device=device)
        for begin, hidden in _passes(model, seen, piece):
            skipped = max(first - 1 - start - begin, 0)  # which the context before has scored
            states = hidden[skipped:]
            targets = torch.tensor(token_ids[start + begin + 1 :][: len(hidden)][skipped:], device=device)
            yield [*_scored(model, states, targets, n_others)], begin + len(hidden) == len(seen)


def _passes(model: GPTModel, seen: Tensor, piece: int | None) -> Iterator[tuple[int, Tensor]]:
    """Yields the hidden states [T, D] of each pass over what is seen, and where it begins."""
    if piece is None or len(seen) <= piece:
        yield 0, model.hidden_states(seen[None])[0]
        return
    cache = KVCache(1, len(seen))
    for begin, tokens in zip(range(0, len(seen), piece), seen.split(piece)):
        yield begin, model.hidden_states(tokens[None], kv_cache=cache)[0]


def _scored(model: GPTModel, hidden: Tensor, targets: Tensor, n_others: int) -> Iterator[ScoredToken]:
    for tokens, own, of_all in log_probabilities(model, hidden, targets, _AT_ONCE):
        likeliest = of_all.topk(n_others + 1, dim=-1)
        rows = zip(tokens.tolist(), own.tolist(), likeliest.indices.tolist(), likeliest.values.tolist())
        for token_id, logprob, indices, values in rows:
            others = [pair for pair in zip(indices, values) if pair[0] != token_id]
            yield ScoredToken(token_id, logprob, others[:n_others])


def log_probabilities(
    model: GPTModel, hidden: Tensor, targets: Tensor, at_once: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields some targets [T], what each has [T], and what all that could stand there have [T, V]."""
    for states, tokens in zip(hidden.split(at_once), targets.split(at_once)):
        of_all = model.lm_head(states).float().log_softmax(dim=-1)
        yield tokens, of_all.gather(1, tokens[:, None])[:, 0], of_all
