"""Holds what one HTTP request asks of the thread that generates, and what that tells of it."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gpt_lightning.generation.engine import Request
from gpt_lightning.generation.rows import FinishReason
from gpt_lightning.generation.surprise import ScoredToken
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.server.fields import Refusal


class Token(NamedTuple):
    """Holds a token, its log-probability, and the likeliest ones there with theirs."""

    token_id: int
    logprob: float | None
    likeliest: list[tuple[int, float]]


class Piece(NamedTuple):
    """Holds what is new of one choice: text, tokens and, where it has ended, why, and by which eos."""

    choice: int
    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None = None
    end: Token | None = None


class Scores(NamedTuple):
    """Holds the next tokens of a prompt with their log-probabilities."""

    prompt: int
    tokens: list[ScoredToken]
    is_last: bool


News = Piece | Scores | Refusal


@dataclass(eq=False)
class Job:
    """Is what one HTTP request asks for: texts that continue its prompts, and maybe scores of these.

    `requests` are in the order of the choices. `news` is the loop's: what the thread has told so far.
    """

    requests: list[Request]
    texts: dict[Request, TextStream]
    to_score: list[list[int]]  # prompts
    n_others: int  # likeliest tokens told of each scored one
    deadline: float
    news: list[News] = field(default_factory=list)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    n_open: int = 0  # choices and scores that have not ended
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.choices = {request: choice for choice, request in enumerate(self.requests)}
        self.n_sent = [0] * len(self.requests)  # characters
        self.n_open = self.n_choices_and_scores = len(self.requests) + len(self.to_score)

    def put(self, news: Iterable[News]) -> None:
        self.news += news
        self.has_news.set()

    async def take(self) -> list[News]:
        """Waits for news, and returns all that there are."""
        await self.has_news.wait()
        self.has_news.clear()
        found, self.news = self.news, []
        return found
