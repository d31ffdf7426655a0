"""Puts scored tokens into text, and that into plain lists for a file and back."""

import codecs
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpt_lightning.data.token_names import token_name
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.surprise import ScoredToken


class ShownToken(NamedTuple):
    """Holds a token as text: `text` is what it adds, `name` what it is called alone."""

    text: str
    name: str
    logprob: float | None
    others: list[tuple[str, float]]

    @property
    def bits(self) -> float:
        return 0.0 if self.logprob is None else max(0.0, -self.logprob / math.log(2))


def shown_tokens(scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> list[ShownToken]:
    """Puts tokens into text: of those that make one character together the last one shows it."""
    piece, decoder = tokenizer.pieces(), codecs.getincrementaldecoder("utf-8")("ignore")
    shown: list[ShownToken] = []
    parts: list[int] = []  # where the tokens are of which a character has begun
    for place, (token_id, logprob, others) in enumerate(scored):
        begun, found = decoder.getstate()[0], tokenizer.bytes_of(token_id)
        likely = [(token_name(tokenizer, other, begun), value) for other, value in others]
        shown.append(ShownToken(piece(token_id), token_name(tokenizer, token_id, begun), logprob, likely))
        text = decoder.decode(found or b"\n")  # what stands for no bytes ends a character, too
        if begun and text.encode().startswith(begun):
            for part in parts:
                shown[part] = shown[part]._replace(name=text[0] + shown[part].name[1:])
        left = decoder.getstate()[0]
        parts = [*(parts if left == begun + found else []), place] if left else []
    return shown


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
