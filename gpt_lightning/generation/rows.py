"""What is asked of the Engine, what it answers, and how each text that it continues stands."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal, NamedTuple

import torch

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.prefill import visible_start
from gpt_lightning.generation.sampling import GenerationConfig, Sampler

FinishReason = Literal["eos", "stop", "length", "exhausted"]
_BLOCK = 1024  # random numbers drawn at once


@dataclass(frozen=True, eq=False)
class Request:
    """Asks for one continuation of a prompt.

    Its random numbers follow from the seed, `number` and `sample`. `ends_with` is called with each new token,
    and ends the completion with that token if it returns True. Without `settings` the Engine's hold.
    """

    prompt: list[int]
    number: int = 0
    sample: int = 0
    ends_with: Callable[[int], bool] | None = None
    settings: GenerationConfig | None = None


@dataclass(frozen=True)
class Completion:
    """Holds the new tokens of one prompt, without the eos, and what ended them.

    "exhausted" means that `no_repeat_ngram_size` left no token. `logprobs` has one of each token, and
    `top_logprobs` the likeliest tokens in the place of each, if they were asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


class Step(NamedTuple):
    """Holds the next token of one request and, in its last step, the completion.

    `token_id` is None where a completion ends without one: at the eos, or where no token is left. `logprob`
    and `top_logprobs` are None unless the settings ask for them; at the eos, `end_id`, they are its own.
    """

    request: Request
    token_id: int | None
    logprob: float | None
    top_logprobs: list[tuple[int, float]] | None
    completion: Completion | None
    end_id: int | None = None


class Row:
    """Holds the text of a request, and how much of what the model sees of it is in the cache."""

    def __init__(
        self, request: Request, settings: GenerationConfig, sampler: Sampler, context: int
    ) -> None:
        self.request, self.settings, self.sampler = request, settings, sampler
        self.uniforms = _uniforms(settings, request.number, request.sample)  # one for each new token
        self.tokens = list(request.prompt)  # the prompt and what followed
        self.n_cached = 0
        self.n_read = 0  # of them; the others were drawn since
        self._context = context
        self._start = self._visible_start()  # of what is cached, and what follows it
        self._logprobs: list[float] = []
        self._top_logprobs: list[list[tuple[int, float]]] = []

    def has_outgrown_context(self) -> bool:
        """Tells whether the window has moved on by the last token, since when none of the text is cached."""
        former, self._start = self._start, self._visible_start()
        if self._start != former:
            self.n_cached = 0
        return self._start != former

    def _visible_start(self) -> int:
        return visible_start(len(self.tokens), self._context, self.settings.context_stride)

    def seen(self) -> list[int]:
        """Lists what the next token is predicted from but the last token, which a step feeds to the model."""
        return self.tokens[self._start : -1]

    def extend(self, numbers: list[float], ends: Collection[int]) -> Step:
        """Appends what the sampler chose, and sees whether the text ends: at one of `ends` or otherwise."""
        token, greatest, greatest_left, *logprobs = numbers
        if not -math.inf < greatest < math.inf:  # NaN is not either
            raise UserError(
                "the model's logits are not finite: its weights diverged; use an earlier checkpoint"
            )
        if greatest_left == -math.inf:
            return self._step(None, [], [], "exhausted")
        token_id, ends_with = int(token), self.request.ends_with
        likeliest = _likeliest(logprobs)
        if token_id in ends:
            return self._step(None, logprobs, likeliest, "eos")._replace(end_id=token_id)
        self.tokens.append(token_id)
        self._logprobs += logprobs[:1]
        self._top_logprobs.append(likeliest)
        reason: FinishReason | None = None
        if ends_with is not None and ends_with(token_id):
            reason = "stop"
        elif len(self.tokens) == len(self.request.prompt) + self.settings.max_new_tokens:
            reason = "length"
        return self._step(token_id, logprobs, likeliest, reason)

    def _step(
        self,
        token_id: int | None,
        logprobs: list[float],
        likeliest: list[tuple[int, float]],
        reason: FinishReason | None,
    ) -> Step:
        """Makes a step, with the completion where there is a reason to end."""
        completion = None
        if reason is not None:
            completion = Completion(
                self.tokens[len(self.request.prompt) :],
                reason,
                self._logprobs if self.settings.gives_logprobs else None,
                self._top_logprobs if self.settings.top_logprobs else None,
            )
        logprob = logprobs[0] if logprobs else None
        return Step(self.request, token_id, logprob, likeliest or None, completion)


def _likeliest(logprobs: list[float]) -> list[tuple[int, float]]:
    """Pairs the ids and the log-probabilities that follow the chosen token's."""
    n = len(logprobs) // 2
    return [*zip(map(int, logprobs[1 : 1 + n]), logprobs[1 + n :])]


def _uniforms(settings: GenerationConfig, number: int, sample: int) -> Iterator[float]:
    """Yields the random numbers of one completion, in [0, 1)."""
    if settings.is_greedy:
        return repeat(0.0)
    # Hashed, so that neither neighbouring numbers nor neighbouring seeds share their text.
    key = f"{settings.seed} {number}" if sample == 0 else f"{settings.seed} {number} {sample}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # In blocks, since max_new_tokens may be as large as a text should ever be. The dtype is said outright:
    # within a step, bf16-true makes half precision the default.
    blocks = (torch.rand(_BLOCK, generator=generator, dtype=torch.float32).tolist() for _ in repeat(None))
    return chain.from_iterable(blocks)
