"""Decoding many prompts together: token ids in, token ids out; it knows no tokenizer.

Every row holds a sequence of its own. The cache holds a row's visible tokens but the last, which each step
feeds to the model, for all rows at once. Rows in use stay next to each other at 0 .. n-1; where one ends, the
next prompt takes its place.
Shapes: B rows in use, D d_model, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Unpack

import torch
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.history import Histories
from gpt_lightning.generation.interface import CausalLanguageModel, Completion, FinishReason, Options, Step
from gpt_lightning.generation.prefill import fill, visible_start
from gpt_lightning.generation.sampling import GenerationConfig, next_tokens
from gpt_lightning.model.kv_cache import KVCache

_BLOCK = 1024  # random numbers drawn at once


@dataclass
class _Row:
    """A prompt on its way to one of its completions."""

    prompt: int
    sample: int
    tokens: list[int]  # the prompt and what followed
    uniforms: Iterator[float]  # one for each new token
    n_prompt: int = field(init=False)
    cached_from: int | None = None  # the first of `tokens` in the cache; None before the row's first step

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_new(self) -> int:
        return len(self.tokens) - self.n_prompt


def generate(
    model: CausalLanguageModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    *,
    eos_token_id: int | None,
    **options: Unpack[Options],
) -> list[Completion]:
    """The completions of each prompt, `settings.num_samples` of the first, then of the second, and so on."""
    finished = completions(model, prompts, settings, eos_token_id=eos_token_id, **options)
    ordered = sorted(finished, key=lambda item: item[:2])
    return [completion for _, _, completion in ordered]


def completions(
    model: CausalLanguageModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    *,
    eos_token_id: int | None,
    **options: Unpack[Options],
) -> Iterator[tuple[int, int, Completion]]:
    """Prompt, sample and completion, in the order in which they end."""
    under_way: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    for step in stream(model, prompts, settings, eos_token_id=eos_token_id, **options):
        token_ids, logprobs = under_way.setdefault((step.prompt, step.sample), ([], []))
        if step.token_id is not None:
            token_ids.append(step.token_id)
            if step.logprob is not None:
                logprobs.append(step.logprob)
        if step.finish_reason is not None:
            del under_way[step.prompt, step.sample]
            given = logprobs if settings.logprobs else None
            yield step.prompt, step.sample, Completion(token_ids, step.finish_reason, given)


def stream(
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
) -> Iterator[Step]:
    """Continue each prompt, token by token; `Options` says what the keyword arguments are.

    What is drawn for a prompt depends on the seed, its number and the sample's, not on other prompts, and not
    on `batch_size`. Until the iterator ends or is closed, the model is in evaluation mode.
    """
    numbers = list(range(len(prompts))) if prompt_numbers is None else prompt_numbers
    _check(prompts, numbers, batch_size, model.config.vocab_size)
    _check_stride(settings, model.config.max_position_embeddings)
    waiting = (
        _Row(index, sample, list(prompt), _uniforms(settings, number, sample))
        for index, (prompt, number) in enumerate(zip(prompts, numbers))
        for sample in range(settings.num_samples)
    )
    active = list(islice(waiting, batch_size))
    longest = max(map(len, prompts), default=0) + settings.max_new_tokens
    cache = KVCache(len(active), min(longest, model.config.max_position_embeddings)) if use_cache else None
    histories = Histories(settings, len(active), model.config.vocab_size, _device(model))
    for place, row in enumerate(active):
        histories.begin(place, row.tokens)

    def steps() -> Iterator[Step]:
        with _evaluating(model):
            while active:
                chosen = _choose(model, active, cache, histories, settings)
                chosen_numbers = (chosen if agree is None else agree(chosen)).tolist()
                # Backwards, so that a row that moves into a gap has had its token.
                for place in reversed(range(len(active))):
                    step = _extend(active[place], chosen_numbers[place], settings, eos_token_id, should_stop)
                    if step.token_id is not None:
                        histories.append(place, step.token_id)
                    if step.finish_reason is not None:
                        _refill(active, place, next(waiting, None), cache, histories)
                    yield step

    return steps()  # a generator of its own, so that a mistake is found here and not at its first step


def _check(prompts: list[list[int]], numbers: list[int], batch_size: int, vocab_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is below 1; choose a positive number")
    if len(numbers) != len(prompts):
        raise UserError(f"{len(numbers)} prompt_numbers stand for {len(prompts)} prompts; give one for each")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompts[{index}] holds no token; start it with one, e.g. the eos token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"prompts[{index}] holds token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{vocab_size - 1}; encode it with the tokenizer that the model was trained with"
            )


def _check_stride(settings: GenerationConfig, context_length: int) -> None:
    if settings.context_stride is not None and settings.context_stride > context_length:
        raise UserError(
            f"generation.context_stride={settings.context_stride} is above the model's "
            f"max_position_embeddings={context_length}; use at most that, or null for half of it"
        )


def _uniforms(settings: GenerationConfig, number: int, sample: int) -> Iterator[float]:
    """The random numbers of one completion, in [0, 1)."""
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


@contextmanager
def _evaluating(model: CausalLanguageModel) -> Iterator[None]:
    """Without dropout; each module's mode is put back afterwards, since they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def _choose(
    model: CausalLanguageModel,
    rows: list[_Row],
    cache: KVCache | None,
    histories: Histories,
    settings: GenerationConfig,
) -> Tensor:
    """Each row's next token, the greatest logits before and after they were adjusted, and maybe its logprob.

    In one tensor, a column each, for one look from the host. float32 holds every token id below 2**24.
    """
    if cache is None:
        hidden = _recomputed_hidden(model, rows, settings.context_stride)
    else:
        hidden = _cached_hidden(model, rows, cache, settings.context_stride)
    logits = model.lm_head(hidden).float()  # [B, V]
    adjusted = histories.adjust(logits)
    next_uniforms = [next(row.uniforms) for row in rows]
    uniforms = torch.tensor(next_uniforms, device=logits.device, dtype=torch.float32)
    tokens = next_tokens(adjusted, settings, uniforms)
    columns = [tokens.float(), logits.amax(dim=-1), adjusted.amax(dim=-1)]
    if settings.logprobs:
        of_tokens = logits.gather(1, tokens[:, None])[:, 0]
        columns.append(of_tokens - logits.logsumexp(dim=-1))
    return torch.stack(columns, dim=1)


def _cached_hidden(
    model: CausalLanguageModel, rows: list[_Row], cache: KVCache, stride: int | None
) -> Tensor:
    """Hidden states [B, D] of the rows' last tokens, one step of all rows at once."""
    starts = [
        visible_start(len(row.tokens), model.config.max_position_embeddings, stride) for row in rows
    ]
    if any(row.cached_from != start for row, start in zip(rows, starts)):
        visible = {place: rows[place].tokens[start:-1] for place, start in enumerate(starts)}
        missing = {place for place, start in enumerate(starts) if rows[place].cached_from != start}
        fill(model, cache, visible, missing, _device(model))
        for row, start in zip(rows, starts):
            row.cached_from = start
    last = torch.tensor([[row.tokens[-1]] for row in rows], device=_device(model))  # [B, 1]
    return model.hidden_states(last, kv_cache=cache.rows(0, len(rows)))[:, -1]


def _recomputed_hidden(model: CausalLanguageModel, rows: list[_Row], stride: int | None) -> Tensor:
    """The same as `_cached_hidden` from nothing but the tokens."""
    last_hidden = []
    for row in rows:
        start = visible_start(len(row.tokens), model.config.max_position_embeddings, stride)
        ids = torch.tensor([row.tokens[start:]], device=_device(model))
        last_hidden.append(model.hidden_states(ids)[:, -1])
    return torch.cat(last_hidden)


def _device(model: CausalLanguageModel) -> torch.device:
    return next(model.parameters()).device


def _extend(
    row: _Row,
    numbers: list[float],
    settings: GenerationConfig,
    eos_token_id: int | None,
    should_stop: Callable[[list[int]], bool] | None,
) -> Step:
    """Append to the row what `_choose` gave for it, and see whether it ends."""
    token, greatest, greatest_left, *logprobs = numbers
    if not -math.inf < greatest < math.inf:  # NaN is not either
        raise UserError("the model's logits are not finite: its weights diverged; use an earlier checkpoint")
    logprob = logprobs[0] if logprobs else None
    reason: FinishReason | None = None
    if greatest_left == -math.inf:
        return Step(row.prompt, row.sample, None, None, "exhausted")
    if token == eos_token_id:
        return Step(row.prompt, row.sample, None, logprob, "eos")
    row.tokens.append(int(token))
    if should_stop is not None and should_stop(row.tokens[row.n_prompt :]):
        reason = "stop"
    elif row.n_new == settings.max_new_tokens:
        reason = "length"
    return Step(row.prompt, row.sample, int(token), logprob, reason)


@torch.inference_mode()
def _refill(
    active: list[_Row], place: int, successor: _Row | None, cache: KVCache | None, histories: Histories
) -> None:
    """Give a finished row's place to the next prompt or, when none waits, to the last row."""
    if successor is not None:
        active[place] = successor
        histories.begin(place, successor.tokens)
        return
    last = active.pop()
    if place < len(active):
        active[place] = last
        histories.move(len(active), place)
        if cache is not None:
            cache.copy_row(len(active), place)
