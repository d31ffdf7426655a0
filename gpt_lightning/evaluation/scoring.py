"""Scores continuations by their log-probability, as lm-eval's `hf` does, many in a pass.

Shapes: B rows, T time, D d_model, N scored tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import evaluating
from gpt_lightning.generation.surprise import log_probabilities
from gpt_lightning.model.gpt import GPTModel

_LOGITS = 1 << 26  # held at once: 256 MiB


class Pair(NamedTuple):
    """Holds the tokens of a context, and those after it, which are scored."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """Holds the sum of a continuation's log-probabilities, and whether each token is the likeliest."""

    log_probability: float
    is_greedy: bool


class Row(NamedTuple):
    """Holds what the model reads, and the continuations that are scored at its end, by their number.

    Several differ in nothing but their last token, as one-letter answers to the same question do.
    """

    tokens: tuple[int, ...]
    continuations: dict[int, list[int]]


def encode_pairs(tokenizer: TextTokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Encodes each context and continuation as one text, cut where the context alone ends.

    The space at a context's end goes to the continuation, of whose first token it is a part in most
    tokenizers. Where there is no context, eos stands, as before every document.
    """
    stripped = [context.rstrip() for context, _ in texts]
    contexts = tokenizer.encode_batch(stripped)
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in texts])
    return [
        Pair(context or [tokenizer.eos_token_id], whole[len(context) :])
        for context, whole in zip(contexts, wholes)
    ]


def _alone(part: Any) -> list[Any]:
    return [part]


@dataclass(frozen=True)
class Scorer:
    """Scores with one model on all ranks, which call it together; each takes its share of the passes.

    Args:
        batch_tokens: That a pass may hold, with padding; a longer text is a pass of its own.
        gather: Returns the shares of all `ranks`, in their order, on each of them.
    """

    model: GPTModel
    tokenizer: TextTokenizer
    batch_tokens: int = 8192
    rank: int = 0
    ranks: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    @property
    def window(self) -> int:
        return self.model.config.max_position_embeddings

    def check(self, pair: Pair, place: str) -> None:
        """Raises UserError for what lm-eval cannot score either."""
        length = len(pair.continuation)
        if length == 0:
            problem = "the tokenizer makes no token of it that is not the question's"
            raise UserError(f"{place}: {problem}; write another text, or end the question with a space")
        if length > self.window:
            rule = f"is over the model's max_position_embeddings={self.window}"
            raise UserError(f"{place}: its length of {length} tokens {rule}; shorten it")

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Returns the score of each pair, in their order; a context too long for the model loses its left."""
        batches = list(_batches(_rows(pairs, self.window), self.batch_tokens))
        own: dict[int, Score] = {}
        with evaluating(self.model), torch.no_grad():
            for first in range(0, len(batches), self.ranks):
                # All ranks take as many passes: those that share a model's parameters could not do without.
                number = first + self.rank
                scores = self._score_batch(batches[min(number, len(batches) - 1)])
                if number < len(batches):
                    own |= scores
        found = {number: score for share in self.gather(own) for number, score in share.items()}
        if not all(math.isfinite(score.log_probability) for score in found.values()):
            problem = "the model's logits are not finite: its weights diverged"
            raise UserError(f"{problem}; use an earlier checkpoint")
        return [found[number] for number in range(len(pairs))]

    def _score_batch(self, rows: list[Row]) -> dict[int, Score]:
        """Runs one pass over rows, the shorter ones padded at their ends, which nothing before them sees."""
        device = next(self.model.parameters()).device
        longest = max(len(row.tokens) for row in rows)
        padded = [[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows]
        hidden = self.model.hidden_states(torch.tensor(padded, device=device))  # [B, T, D]
        parts = [
            (number, place, len(row.tokens) - len(continuation), continuation)
            for place, row in enumerate(rows)
            for number, continuation in row.continuations.items()
        ]
        scored = [
            (place, start + offset, token)
            for _, place, start, continuation in parts
            for offset, token in enumerate(continuation)
        ]
        places, positions, targets = torch.tensor(scored, device=device).unbind(1)  # each [N]
        found, greedy = self._score_tokens(hidden[places, positions], targets)
        lengths = [len(continuation) for *_, continuation in parts]
        each = zip(parts, found.split(lengths), greedy.split(lengths))
        return {part[0]: Score(float(logs.sum()), bool(is_greedy.all())) for part, logs, is_greedy in each}

    def _score_tokens(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns of each token [N] its log-probability, and whether it is the likeliest, on the host."""
        n_together = max(1, _LOGITS // self.model.config.vocab_size)
        found, greedy = [], []
        for tokens, logs, of_all in log_probabilities(self.model, hidden, targets, n_together):
            found.append(logs)
            greedy.append(of_all.argmax(-1) == tokens)
        return torch.cat(found).cpu().double(), torch.cat(greedy).cpu()


def _rows(pairs: Sequence[Pair], window: int) -> list[Row]:
    """Makes of pairs what the model reads, each once, the longest first."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, pair in enumerate(pairs):
        # The last token is predicted, not read.
        tokens = tuple([*pair.context, *pair.continuation][-window - 1 : -1])
        rows.setdefault(tokens, Row(tokens, {})).continuations[number] = pair.continuation
    return sorted(rows.values(), key=lambda row: len(row.tokens), reverse=True)


def _batches(rows: Iterable[Row], batch_tokens: int) -> Iterable[list[Row]]:
    """Yields rows that are computed together, of which the first is the longest."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
