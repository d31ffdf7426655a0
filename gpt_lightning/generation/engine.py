"""Decodes many prompts together: token ids in, token ids out; it knows no tokenizer.

Every row holds a sequence of its own. The cache holds a row's visible tokens but the last, which each step
feeds to the model, for all rows at once. Rows in use stay next to each other at 0 .. n-1; where one ends, the
next request takes its place.
Shapes: B rows in use, D d_model, V vocabulary.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.prefill import fill, visible_start
from gpt_lightning.generation.sampling import GenerationConfig, Sampler
from gpt_lightning.kernels.attention import KVCache
from gpt_lightning.model.gpt import GPTModel

FinishReason = Literal["eos", "stop", "length", "exhausted"]
_BLOCK = 1024  # random numbers drawn at once


@dataclass(frozen=True, eq=False)
class Request:
    """Asks for one continuation of a prompt.

    Its random numbers follow from the seed, `number` and `sample`. `ends_with` is called with each new token,
    and ends the completion with that token if it returns True.
    """

    prompt: list[int]
    number: int = 0
    sample: int = 0
    ends_with: Callable[[int], bool] | None = None


@dataclass(frozen=True)
class Completion:
    """Holds the new tokens of one prompt, without the eos, and what ended them.

    "exhausted" means that `no_repeat_ngram_size` left no token. `logprobs` has one of each token, if they
    were asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None


class Step(NamedTuple):
    """Holds the next token of one request and, in its last step, the completion.

    `token_id` is None where a completion ends without one: at the eos, or where no token is left. `logprob`
    is None unless the settings ask for it.
    """

    request: Request
    token_id: int | None
    logprob: float | None
    completion: Completion | None


class _Row:
    """Holds a request that is being continued."""

    def __init__(self, request: Request, settings: GenerationConfig) -> None:
        self.request = request
        self.uniforms = _uniforms(settings, request.number, request.sample)  # one for each new token
        self.tokens = list(request.prompt)  # the prompt and what followed
        self.logprobs: list[float] | None = [] if settings.logprobs else None
        self.n_steps_left = 0  # until it outgrows the context; 0 also where it is not in the cache

    def end(self, reason: FinishReason, logprob: float | None, token_id: int | None = None) -> Step:
        """Makes the last step of the request."""
        new_tokens = self.tokens[len(self.request.prompt) :]
        return Step(self.request, token_id, logprob, Completion(new_tokens, reason, self.logprobs))


class Engine:
    """Continues the requests that are added, as many at a time as it has rows, a token of each in a step.

    What is drawn for a request depends on it and the settings, not on the others, and not on `batch_size`.
    `run` puts the model into evaluation mode; who calls `step` alone must have done so.

    Args:
        settings: Those of all requests.
        eos_token_id: Ends a text that draws it, or any of several; None of them: texts have no end.
        batch_size: Rows decoded together: more are faster and take more memory.
        broadcast: For processes that run a model together: gives all of them one process's numbers.
    """

    def __init__(
        self,
        model: GPTModel,
        settings: GenerationConfig,
        *,
        eos_token_id: int | Collection[int] | None,
        batch_size: int = 8,
        broadcast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is below 1; choose a positive number")
        self._context = model.config.max_position_embeddings
        if settings.context_stride is not None and settings.context_stride > self._context:
            raise UserError(
                f"generation.context_stride={settings.context_stride} is above the model's "
                f"max_position_embeddings={self._context}; use at most that, or null for half of it"
            )
        self._model, self._settings = model, settings
        self._ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self._batch_size, self._broadcast = batch_size, broadcast
        self._sampler = Sampler(settings)
        self._device = next(model.parameters()).device
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._longest_prompt = 0
        self._cache = self._in_use = KVCache(0, 0)  # no room yet; and its view of the rows

    def add(self, request: Request) -> None:
        """Has the request wait for a row; it is continued from the first step on that has one for it."""
        prompt, name = request.prompt, f"prompts[{request.number}]"
        vocab_size = self._model.config.vocab_size
        if not prompt:
            raise UserError(f"{name} holds no token; start it with one, e.g. the eos token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"{name} holds token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{vocab_size - 1}; encode it with the tokenizer that the model was trained with"
            )
        self._longest_prompt = max(self._longest_prompt, len(prompt))
        self._waiting.append(request)

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Returns the completions of these requests, in their order."""
        for request in requests:
            self.add(request)
        found = {step.request: step.completion for step in self.run() if step.completion is not None}
        return [found[request] for request in requests]

    def run(self) -> Iterator[Step]:
        """Takes steps until no request is left, the model in evaluation mode until the iterator is closed."""
        with evaluating(self._model):
            while self._rows or self._waiting:
                yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Draws a token of each request that has a row, or gets one now."""
        if self._waiting and len(self._rows) < self._batch_size:
            self._admit()
        if not self._rows:
            return []
        try:
            chosen = self._choose()
        except BaseException:
            for row in self._rows:  # the cache may hold tokens in some layers, or one that chose nothing
                row.n_steps_left = 0
            raise
        steps = [self._extend(row, numbers) for row, numbers in zip(self._rows, chosen.tolist())]
        for place in reversed(range(len(steps))):
            if steps[place].completion is not None:
                self._release(place)
        return steps

    def _choose(self) -> Tensor:
        """Returns the sampler's numbers for each row, from one pass over their last tokens."""
        if not all(row.n_steps_left for row in self._rows):
            self._fill()
        last = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self._device)  # [B, 1]
        hidden = self._model.hidden_states(last, kv_cache=self._in_use)[:, -1]
        logits = self._model.lm_head(hidden).float()  # [B, V]
        texts, uniforms = [row.tokens for row in self._rows], [next(row.uniforms) for row in self._rows]
        chosen = self._sampler.choose(logits, texts, uniforms)
        return chosen if self._broadcast is None else self._broadcast(chosen)

    def _admit(self) -> None:
        """Gives free rows to requests that wait; a greater cache where they need it, which all enter anew."""
        n_rows = min(self._batch_size, len(self._rows) + len(self._waiting))
        length = min(self._longest_prompt + self._settings.max_new_tokens, self._context)
        if n_rows > len(self._cache.lengths) or length > self._cache.max_length:
            self._cache = KVCache(
                max(n_rows, len(self._cache.lengths)), max(length, self._cache.max_length)
            )
            for row in self._rows:
                row.n_steps_left = 0
        while len(self._rows) < n_rows:
            self._rows.append(_Row(self._waiting.popleft(), self._settings))

    def _fill(self) -> None:
        """Brings into the cache what rows see that are not in it, or have outgrown the context."""
        lengths = [len(row.tokens) for row in self._rows]
        stride = self._settings.context_stride
        starts = [visible_start(length, self._context, stride) for length in lengths]
        visible = {n: row.tokens[start:-1] for n, (row, start) in enumerate(zip(self._rows, starts))}
        missing = {place for place, row in enumerate(self._rows) if row.n_steps_left == 0}
        fill(self._model, self._cache, visible, missing, self._device)
        for row, length, start in zip(self._rows, lengths, starts):
            row.n_steps_left = self._context - (length - start) + 1
        self._in_use = self._cache.rows(0, len(self._rows))

    def _extend(self, row: _Row, numbers: list[float]) -> Step:
        """Appends to a row what was chosen for it, and sees whether it ends."""
        row.n_steps_left -= 1
        token, greatest, greatest_left, *logprobs = numbers
        if not -math.inf < greatest < math.inf:  # NaN is not either
            raise UserError(
                "the model's logits are not finite: its weights diverged; use an earlier checkpoint"
            )
        if greatest_left == -math.inf:
            return row.end("exhausted", None)
        logprob = logprobs[0] if logprobs else None
        if token in self._ends:
            return row.end("eos", logprob)
        token_id, ends_with = int(token), row.request.ends_with
        row.tokens.append(token_id)
        if row.logprobs is not None:
            row.logprobs += logprobs
        if ends_with is not None and ends_with(token_id):
            return row.end("stop", logprob, token_id)
        if len(row.tokens) == len(row.request.prompt) + self._settings.max_new_tokens:
            return row.end("length", logprob, token_id)
        return Step(row.request, token_id, logprob, None)

    def _release(self, place: int) -> None:
        """Removes a finished row, and moves the last row into its place."""
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last
            self._cache.copy_row(len(self._rows), place, int(self._cache.lengths[len(self._rows)]))
        self._in_use = self._cache.rows(0, len(self._rows))


def generate(
    model: GPTModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    *,
    eos_token_id: int | Collection[int] | None,
    batch_size: int = 8,
) -> list[Completion]:
    """Completes each prompt: `settings.num_samples` times the first, then the second, and so on."""
    engine = Engine(model, settings, eos_token_id=eos_token_id, batch_size=batch_size)
    numbered = enumerate(prompts)
    return engine.complete(
        [Request(prompt, n, sample) for n, prompt in numbered for sample in range(settings.num_samples)]
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout off; each module's mode is put back afterwards, since they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


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
