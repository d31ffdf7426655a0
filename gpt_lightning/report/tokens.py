"""Shows the tokens of a text coloured by how surprising a model finds them, as a page of its own too."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.report.html import render
from gpt_lightning.training.scored_text import ShownToken

MOST_SURPRISING = 10  # tokens are listed below a text


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
    def has_parts(self) -> bool:
        """Tells whether a token is only some bytes of a character."""
        return any(not token.text and token.name.endswith("›") for token in self.tokens)

    @property
    def most_surprising(self) -> list[tuple[str, ShownToken]]:
        """Lists the least likely tokens with the text before them."""
        numbers = [n for n, token in enumerate(self.tokens) if token.logprob is not None]
        numbers = sorted(numbers, key=lambda n: self.tokens[n].bits, reverse=True)[:MOST_SURPRISING]
        before = (self.tokens[max(0, n - 24) : n] for n in numbers)
        texts = ("".join(token.text for token in some)[-16:] for some in before)
        return [*zip(texts, (self.tokens[n] for n in numbers))]


def write_tokens(texts: Sequence[TokenText], source: str, output: Path) -> None:
    """Writes a page of these texts, of whose model `source` tells."""
    page = render("tokens.html", texts=texts, source=source)
    with written_file(output) as file:
        file.write(page.encode())
