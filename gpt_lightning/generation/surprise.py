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
    context = model.config.max_position_embeddings
    n_others = min(n_others, model.config.vocab_size - 1)
    scored = [ScoredToken(token_ids[0], None, [])] if token_ids else []
    places = range(1, len(token_ids))
    with evaluating(model):
        for start, group in groupby(places, lambda n: visible_start(n, context, context_stride)):
            seen = [*group]
            scored += _scored(model, token_ids[start : seen[-1] + 1], len(seen), n_others)
    return scored


def _scored(model: GPTModel, token_ids: list[int], n_last: int, n_others: int) -> Iterator[ScoredToken]:
    """Yields the last tokens, each predicted from all that stand before it."""
    ids = torch.tensor(token_ids, device=next(model.parameters()).device)
    hidden = model.hidden_states(ids[None, :-1])[0, -n_last:]
    for targets, own, of_all in log_probabilities(model, hidden, ids[-n_last:], _AT_ONCE):
        likeliest = of_all.topk(n_others + 1, dim=-1)
        rows = zip(targets.tolist(), own.tolist(), likeliest.indices.tolist(), likeliest.values.tolist())
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
