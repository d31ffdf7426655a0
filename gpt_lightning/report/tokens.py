"""Shows the tokens of a text coloured by how surprising a model finds them, as a page of its own too."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.surprise import ScoredToken
from gpt_lightning.report.html import render

MOST_SURPRISING = 10  # tokens are listed below a text


class ShownToken(NamedTuple):
    """Holds a token as text: `text` is what it adds, `name` what it is called alone."""

    text: str
    name: str
    logprob: float | None
    others: list[tuple[str, float]]

    @property
    def bits(self) -> float:
        return 0.0 if self.logprob is None else max(0.0, -self.logprob / math.log(2))


class TokenText(NamedTuple):
    """Holds the tokens of a text; the first `n_prompt` of them were given to the model."""

    tokens: list[ShownToken]
    n_prompt: int = 0

    @property
    def bits(self) -> float | None:
        """Is the mean of the tokens that were not given."""
        found = [token.bits for token in self.tokens[self.n_prompt :] if token.logprob is not None]
        return sum(found) / len(found) if found else None

    @property
    def most_surprising(self) -> list[tuple[str, ShownToken]]:
        """Lists the least likely tokens with the text before them."""
        numbers = [n for n, token in enumerate(self.tokens) if token.logprob is not None]
        numbers = sorted(numbers, key=lambda n: self.tokens[n].bits, reverse=True)[:MOST_SURPRISING]
        before = (self.tokens[max(0, n - 24) : n] for n in numbers)
        texts = ("".join(token.text for token in some)[-40:] for some in before)
        return [*zip(texts, (self.tokens[n] for n in numbers))]


def shown_tokens(scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> list[ShownToken]:
    """Puts tokens into text: of those that make one character together the last one shows it."""
    piece = tokenizer.pieces()
    return [
        ShownToken(
            piece(token_id),
            tokenizer.name_of(token_id),
            logprob,
            [(tokenizer.name_of(other), value) for other, value in others],
        )
        for token_id, logprob, others in scored
    ]


def as_plain(tokens: Sequence[ShownToken]) -> list[Any]:
    """Makes lists of them for a file, which `from_plain` reads."""
    return [
        [text, name, _rounded(logprob), [[other, _rounded(value)] for other, value in others]]
        for text, name, logprob, others in tokens
    ]


def from_plain(rows: Any) -> list[ShownToken]:
    """Reads what `as_plain` made; of anything else, nothing."""
    try:
        return [
            ShownToken(
                str(text),
                str(name),
                None if logprob is None else float(logprob),
                [(str(other), float(value)) for other, value in others],
            )
            for text, name, logprob, others in rows
        ]
    except (TypeError, ValueError):
        return []


def _rounded(logprob: float | None) -> float | None:
    return None if logprob is None else round(logprob, 4)


def write_tokens(texts: Sequence[TokenText], source: str, output: Path) -> None:
    """Writes a page of these texts, of whose model `source` tells."""
    page = render("tokens.html", texts=texts, source=source)
    with written_file(output) as file:
        file.write(page.encode())
