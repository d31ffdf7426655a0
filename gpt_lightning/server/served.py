"""Holds what the server knows of a model, and makes jobs for its worker."""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.engine import Engine, Request
from gpt_lightning.generation.prefill import PIECE
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.surprise import ScoredToken, score_in_pieces
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.server.fields import Refusal
from gpt_lightning.server.job import Job
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.metrics import Metrics
from gpt_lightning.server.worker import Worker


@dataclass(frozen=True, eq=False)
class ServedModel:
    """Is a model by its name; `settings` are what requests leave out, and `seed` None another for each."""

    name: str
    tokenizer: TextTokenizer
    vocab_size: int
    context: int
    settings: GenerationConfig
    seed: int | None
    worker: Worker
    created: int = field(default_factory=lambda: int(time.time()))

    def entry(self) -> dict[str, Any]:
        """Describes the model to clients."""
        names = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
        settings = {name: getattr(self.settings, name) for name in names}
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gpt_lightning",
            "max_model_len": self.context,
            "has_chat_template": bool(self.tokenizer.chat),
            "vocab_size": self.vocab_size,
            "settings": {**settings, "max_tokens": self.settings.max_new_tokens, "seed": self.seed},
        }


@dataclass(frozen=True)
class Asked:
    """Is what a client asks for, checked: `n` completions of each prompt.

    `n_likeliest` is how many tokens are told with each one, None: not even its log-probability. `echoes` are
    the prompts as text, where each is to stand before its completions; without completions they are all.
    """

    model: ServedModel
    prompts: list[list[int]]
    settings: GenerationConfig
    n: int = 1
    has_completion: bool = True
    n_likeliest: int | None = None
    echoes: list[str] | None = None
    is_stream: bool = False
    include_usage: bool = False

    @property
    def is_scored(self) -> bool:
        """Tells whether the prompts' own tokens are given log-probabilities."""
        return self.echoes is not None and self.n_likeliest is not None

    def check_size(self, limits: Limits) -> None:
        """Refuses an answer that would hold more log-probabilities than the server gives at a time."""
        if self.n_likeliest is None:
            return
        n_written = len(self.prompts) * self.settings.max_new_tokens if self.has_completion else 0
        n_echoed = sum(map(len, self.prompts)) if self.is_scored else 0
        n = self.n * (n_written + n_echoed) * (1 + self.n_likeliest)
        if n > (most := limits.max_logprobs):
            message = f"the answer may hold {n:,} log-probabilities, the server gives {most:,}; ask for fewer"
            raise Refusal(f"{message} tokens, choices or likeliest ones", "logprobs")

    def job(self, limits: Limits) -> Job:
        texts: dict[Request, TextStream] = {}
        numbered = enumerate(self.prompts if self.has_completion else [])
        for number, prompt in numbered:
            for sample in range(self.n):
                text = TextStream(self.model.tokenizer, self.settings.stop)
                request = Request(prompt, number, sample, text.add, self.settings)
                texts[request] = text
        to_score = self.prompts if self.is_scored else []
        deadline = time.monotonic() + limits.request_seconds
        return Job([*texts], texts, to_score, self.n_likeliest or 0, deadline)


def served_model(
    name: str,
    model: GPTModel,
    tokenizer: TextTokenizer,
    settings: GenerationConfig,
    *,
    seed: int | None,
    n_rows: int,
    prefill_tokens: int | None,
    limits: Limits,
    metrics: Metrics,
) -> ServedModel:
    """Gives a model, in evaluation mode, a worker that continues so many texts together."""
    ends = tokenizer.eos_token_ids

    def make_engine() -> Engine:
        return Engine(
            model, settings, eos_token_id=ends, batch_size=n_rows, prefill_tokens=prefill_tokens
        )

    context = model.config.max_position_embeddings
    at_once = PIECE if next(model.parameters()).device.type == "cpu" else context
    piece = min(at_once, prefill_tokens or at_once)

    def score(token_ids: list[int], n_others: int) -> Iterator[tuple[list[ScoredToken], bool]]:
        stride = settings.context_stride
        return score_in_pieces(model, token_ids, n_others=n_others, context_stride=stride, piece=piece)

    worker = Worker(make_engine, score, metrics, n_rows + limits.max_queue)
    return ServedModel(name, tokenizer, model.config.vocab_size, context, settings, seed, worker)


def any_seed() -> int:
    return secrets.randbelow(2**31)
