"""Decoding many prompts together: token ids in, token ids out; it knows no tokenizer.

Every row holds a sequence of its own. The cache holds a row's visible tokens but the last, which each step
feeds to the model, for all rows at once. Rows in use stay next to each other at 0 .. n-1.
Shapes: B rows in use, D d_model, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gpt_lightning.config import GPTConfig
from gpt_lightning.generation.sampling import GenerationConfig, next_token_probabilities, pick
from gpt_lightning.kv_cache import KVCache

FinishReason = Literal["eos", "stop", "length"]


class CausalLanguageModel(Protocol):
    """What the engine asks of a model, which is an nn.Module beside."""

    @property
    def config(self) -> GPTConfig: ...

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]: ...

    def hidden_states(self, input_ids: Tensor, *, kv_cache: KVCache | None = None) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt, without the eos, and what ended them."""

    token_ids: list[int]
    finish_reason: FinishReason


@dataclass
class _Row:
    """A prompt on its way to its completion."""

    index: int  # of the prompt among all prompts
    tokens: list[int]  # the prompt and what followed
    uniforms: list[float]  # one for each new token
    new_tokens: list[int] = field(default_factory=list)
    cached_from: int | None = None  # the first of `tokens` in the cache; None before the row's first step


def generate(
    model: CausalLanguageModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    *,
    eos_token_id: int | None,
    prompt_numbers: list[int] | None = None,
    batch_size: int = 8,
    should_stop: Callable[[list[int]], bool] | None = None,
    use_cache: bool = True,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[Completion]:
    """Continue each prompt; what is drawn for one depends on the seed and its number, not on the others.

    `prompt_numbers` are the positions in the list unless given. `should_stop` sees a row's new tokens after
    each of them and ends the row, with that token, by returning True. `batch_size` rows are decoded together:
    more are faster and take more memory. A sequence that outgrows the context is read from `visible_start`.
    Processes that run a model together pass `agree`, which gives all of them one process's tokens [B].
    """
    numbers = list(range(len(prompts))) if prompt_numbers is None else prompt_numbers
    _check(prompts, numbers, batch_size, model.config.vocab_size)
    waiting = (
        _Row(index, list(prompt), _uniforms(settings, number))
        for index, (prompt, number) in enumerate(zip(prompts, numbers))
    )
    active = list(islice(waiting, batch_size))
    longest = max(map(len, prompts), default=0) + settings.max_new_tokens
    cache = KVCache(len(active), min(longest, model.config.max_position_embeddings)) if use_cache else None
    completions: dict[int, Completion] = {}
    with _evaluating(model):
        while active:
            drawn = _next_tokens(model, active, cache, settings)
            tokens = (drawn if agree is None else agree(drawn)).tolist()
            # Backwards, so that a row that moves into a gap already has its token.
            for place in reversed(range(len(active))):
                row = active[place]
                reason = _extend(row, tokens[place], settings.max_new_tokens, eos_token_id, should_stop)
                if reason is not None:
                    completions[row.index] = Completion(row.new_tokens, reason)
                    _refill(active, place, next(waiting, None), cache)
    return [completions[index] for index in range(len(prompts))]


def visible_start(n_tokens: int, context_length: int) -> int:
    """Where in a sequence of `n_tokens` the context begins that the next token is predicted from.

    Up to `context_length` tokens it is all of them. A sequence that grows past that keeps its last half
    context, encoded anew from position 0, and grows from there until the context is full again. The start
    follows from the length alone, so a long prompt continues exactly as if its end had been generated.
    """
    if n_tokens <= context_length:
        return 0
    kept = max(1, context_length // 2)
    stride = context_length + 1 - kept
    slides = -(-(n_tokens - context_length) // stride)
    return slides * stride


def _check(prompts: list[list[int]], numbers: list[int], batch_size: int, vocab_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1; choose a positive number")
    if len(numbers) != len(prompts):
        raise ValueError(f"{len(numbers)} prompt_numbers stand for {len(prompts)} prompts; give one for each")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{index}] holds no token; start it with one, e.g. the eos token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompts[{index}] holds token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{vocab_size - 1}; encode it with the tokenizer that the model was trained with"
            )


def _uniforms(settings: GenerationConfig, number: int) -> list[float]:
    """The random numbers of one prompt, in [0, 1)."""
    # Hashed, so that neither neighbouring numbers nor neighbouring seeds share their text.
    digest = hashlib.blake2b(f"{settings.seed} {number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(settings.max_new_tokens, generator=generator).tolist()


@contextmanager
def _evaluating(model: CausalLanguageModel) -> Iterator[None]:
    """Without gradients and dropout; each module's mode is put back afterwards, since they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _next_tokens(
    model: CausalLanguageModel, rows: list[_Row], cache: KVCache | None, settings: GenerationConfig
) -> Tensor:
    hidden = _recomputed_hidden(model, rows) if cache is None else _cached_hidden(model, rows, cache)
    logits = model.lm_head(hidden).float()  # [B, V]
    if not (logits < torch.inf).all():  # false for NaN too
        raise ValueError("the model's logits are not finite: its weights diverged; use an earlier checkpoint")
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for place, row in enumerate(rows):
            seen[place, row.tokens] = True
    probabilities = next_token_probabilities(logits, settings, seen)
    uniforms = torch.tensor([row.uniforms[len(row.new_tokens)] for row in rows], device=logits.device)
    return pick(probabilities, uniforms)  # [B]


def _cached_hidden(model: CausalLanguageModel, rows: list[_Row], cache: KVCache) -> Tensor:
    """Hidden states [B, D] of the rows' last tokens, one step of all rows at once."""
    for place, row in enumerate(rows):
        start = visible_start(len(row.tokens), model.config.max_position_embeddings)
        if row.cached_from != start:
            cache.clear(place)
            row.cached_from = start
            if earlier := row.tokens[start:-1]:
                model.hidden_states(_ids([earlier], model), kv_cache=cache.rows(place, place + 1))
    last = _ids([[row.tokens[-1]] for row in rows], model)  # [B, 1]
    return model.hidden_states(last, kv_cache=cache.rows(0, len(rows)))[:, -1]


def _recomputed_hidden(model: CausalLanguageModel, rows: list[_Row]) -> Tensor:
    """The same as `_cached_hidden` from nothing but the tokens: slow, and what the cache is judged by."""
    last_hidden = []
    for row in rows:
        start = visible_start(len(row.tokens), model.config.max_position_embeddings)
        last_hidden.append(model.hidden_states(_ids([row.tokens[start:]], model))[:, -1])
    return torch.cat(last_hidden)


def _ids(tokens: list[list[int]], model: CausalLanguageModel) -> Tensor:
    return torch.tensor(tokens, device=next(model.parameters()).device)


def _extend(
    row: _Row,
    token: int,
    max_new_tokens: int,
    eos_token_id: int | None,
    should_stop: Callable[[list[int]], bool] | None,
) -> FinishReason | None:
    """Append a token to the row; returns why the row ends with it, or None when it goes on."""
    if token == eos_token_id:
        return "eos"
    row.tokens.append(token)
    row.new_tokens.append(token)
    if should_stop is not None and should_stop(row.new_tokens):
        return "stop"
    return "length" if len(row.new_tokens) == max_new_tokens else None


def _refill(active: list[_Row], place: int, successor: _Row | None, cache: KVCache | None) -> None:
    """Give a finished row's place to the next prompt or, when none waits, to the last row."""
    if successor is not None:
        active[place] = successor
        return
    last = active.pop()
    if place < len(active):
        active[place] = last
        if cache is not None:
            cache.move_row(len(active), place)
