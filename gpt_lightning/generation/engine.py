"""Decodes many prompts together: token ids in, token ids out; it knows no tokenizer.

Every row holds a sequence of its own. The cache holds a row's visible tokens but the last, which each step
feeds to the model, for all rows at once. Rows in use stay next to each other at 0 .. n-1; where one ends, the
next request takes its place.
Shapes: B rows in use, D d_model, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.prefill import PIECE, compute, fill, holder
from gpt_lightning.generation.rows import Completion, Request, Row, Step
from gpt_lightning.generation.sampling import GenerationConfig, Sampler, choose_each
from gpt_lightning.kernels.attention import KVCache
from gpt_lightning.model.gpt import GPTModel


class Engine:
    """Continues the requests that are added, as many at a time as it has rows, a token of each in a step.

    What is drawn for a request depends on it and its settings, not on the others, and not on `batch_size`.
    `run` puts the model into evaluation mode; who calls `step` alone must have done so.

    Args:
        settings: Those of the requests that bring none.
        eos_token_id: Ends a text that draws it, or any of several; None of them: texts have no end.
        batch_size: Rows decoded together: more are faster and take more memory.
        broadcast: For processes that run a model together: gives all of them one process's numbers.
        prefill_tokens: Tokens of prompts that a step reads at most while texts are continued, so that a long
            prompt does not hold up the others; None: all prompts that have a row.
        cache_length: Tokens of each row that memory is taken for at once; None: as requests need it.
    """

    def __init__(
        self,
        model: GPTModel,
        settings: GenerationConfig,
        *,
        eos_token_id: int | Collection[int] | None,
        batch_size: int = 8,
        broadcast: Callable[[Tensor], Tensor] | None = None,
        prefill_tokens: int | None = None,
        cache_length: int | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("prefill_tokens", prefill_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is below 1; choose a positive number")
        self._model, self._settings = model, settings
        self._context = model.config.max_position_embeddings
        self._check(settings)
        self._ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self._batch_size, self._broadcast = batch_size, broadcast
        self._samplers: WeakValueDictionary[str, Sampler] = WeakValueDictionary()  # of the rows there are
        self._device = next(model.parameters()).device
        at_once = PIECE if self._device.type == "cpu" else self._context
        self._piece = min(at_once, prefill_tokens or at_once)
        self._allowed = math.inf if prefill_tokens is None else prefill_tokens // self._piece * self._piece
        # The first one that waits may be in the cache in part, behind the rows in use.
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._longest = 0 if cache_length is None else min(cache_length, self._context)
        self._cache = KVCache(0 if cache_length is None else batch_size, self._longest)

    @property
    def n_rows(self) -> int:
        """Counts the requests that have a row."""
        return len(self._rows) + self._n_in_part

    @property
    def n_waiting(self) -> int:
        """Counts the requests that wait for a row."""
        return len(self._waiting) - self._n_in_part

    @property
    def _n_in_part(self) -> int:
        return int(bool(self._waiting) and self._waiting[0].n_cached > 0)

    def add(self, request: Request) -> None:
        """Has the request wait for a row; it is continued from the first step on that has one for it."""
        prompt, name = request.prompt, f"prompts[{request.number}]"
        settings = self._settings if request.settings is None else request.settings
        vocab_size = self._model.config.vocab_size
        if not prompt:
            raise UserError(f"{name} holds no token; start it with one, e.g. the eos token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"{name} holds token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{vocab_size - 1}; encode it with the tokenizer that the model was trained with"
            )
        if settings is not self._settings:
            self._check(settings)
        self._longest = max(self._longest, min(len(prompt) + settings.max_new_tokens, self._context))
        sampler = self._samplers.setdefault(settings.of_sampler, Sampler(settings))
        self._waiting.append(Row(request, settings, sampler, self._context))

    def _check(self, settings: GenerationConfig) -> None:
        """Refuses what this model or this engine does not have."""
        if settings.context_stride is not None and settings.context_stride > self._context:
            raise UserError(
                f"generation.context_stride={settings.context_stride} is above the model's "
                f"max_position_embeddings={self._context}; use at most that, or null for half of it"
            )
        vocab_size = self._model.config.vocab_size
        if settings.top_logprobs > vocab_size:
            raise UserError(
                f"generation.top_logprobs={settings.top_logprobs} is above the model's "
                f"vocab_size={vocab_size}; use at most that"
            )
        if (greatest := max(settings.logit_bias, default=0)) >= vocab_size:
            raise UserError(
                f"generation.logit_bias holds the token id {greatest}, the model knows 0 to "
                f"{vocab_size - 1}; leave it out"
            )
        if settings.quantize != self._settings.quantize:
            raise UserError(
                f"generation.quantize={settings.quantize} is not {self._settings.quantize}, as the weights "
                "are that all requests share; leave it as it is"
            )

    @torch.inference_mode()
    def cancel(self, request: Request) -> bool:
        """Drops a request that waits or is continued, whose row is free at once; False if it is neither."""
        for place, row in enumerate(self._rows):
            if row.request is request:
                self._release(place)
                return True
        found = next((row for row in self._waiting if row.request is request), None)
        if found is not None:
            self._waiting.remove(found)
        return found is not None

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
        """Draws a token of each request that has a row and whose prompt is read, by now or before."""
        try:
            if self._waiting and len(self._rows) < self._batch_size:
                self._fill()
            if not self._rows:
                return []
            chosen = self._choose()
            steps = [row.extend(numbers, self._ends) for row, numbers in zip(self._rows, chosen)]
        except BaseException:
            self._begin_anew()
            raise
        for place in reversed(range(len(steps))):
            row = self._rows[place]
            row.n_cached += 1
            if steps[place].completion is not None:
                self._release(place)
            elif row.has_outgrown_context():
                self._release(place)
                self._waiting.insert(self._n_in_part, row)  # before those that have had no row yet
        return steps

    def _choose(self) -> list[list[float]]:
        """Returns the sampler's numbers for each row, from one pass over their last tokens."""
        rows, in_use = self._rows, self._cache.rows(0, len(self._rows))
        last = torch.tensor([[row.tokens[-1]] for row in rows], device=self._device)  # [B, 1]
        hidden = self._model.hidden_states(last, kv_cache=in_use)[:, -1]
        logits = self._model.lm_head(hidden).float()  # [B, V]
        texts, starts = [row.tokens for row in rows], [len(row.request.prompt) for row in rows]
        uniforms = [next(row.uniforms) for row in rows]
        chosen = choose_each([row.sampler for row in rows], logits, texts, starts, uniforms)
        if self._broadcast is not None:
            chosen = self._broadcast(chosen)
        return [numbers[: row.sampler.width] for row, numbers in zip(rows, chosen.tolist())]

    def _fill(self) -> None:
        """Gives free rows to requests that wait, and reads as much of their texts as this step may."""
        self._make_room()
        left = self._allowance()
        texts = {place: row.seen()[: row.n_read] for place, row in enumerate(self._rows)}
        missing: set[int] = set()
        while self._waiting and len(self._rows) < self._batch_size:
            row, place = self._waiting[0], len(self._rows)
            text = row.seen()
            is_held = holder(text, texts) is not None
            n_missing = 0 if is_held else len(text) - row.n_cached
            if n_missing > left:
                if left == self._allowed:  # which no step can read at once
                    self._read(row, text[: row.n_cached + int(left)])
                break
            if row.n_cached > 0 and not is_held:
                self._read(row, text)
            else:
                missing.add(place)
            left -= n_missing
            texts[place], row.n_read = text, len(text)
            self._rows.append(self._waiting.popleft())
        fill(self._model, self._cache, texts, missing, self._device, self._piece)
        for place in missing:
            self._rows[place].n_cached = len(texts[place])

    def _allowance(self) -> float:
        """Returns how many tokens this step may read; a text that nobody waits behind is read at once."""
        first = self._waiting[0]
        return max(self._allowed, 0 if self._rows else len(first.seen()) - first.n_cached)

    def _read(self, row: Row, text: list[int]) -> None:
        """Reads on behind the rows in use."""
        place = len(self._rows)
        compute(self._model, self._cache, place, [text], self._device, self._piece, row.n_cached)
        row.n_cached = len(text)

    def _make_room(self) -> None:
        """Lets the cache grow where there are more or longer texts than it has room for."""
        n_rows = max(min(self._batch_size, self.n_rows + self.n_waiting), len(self._cache.lengths))
        if n_rows > len(self._cache.lengths) or self._longest > self._cache.max_length:
            self._cache.grow(n_rows, max(self._longest, self._cache.max_length))

    def _release(self, place: int) -> None:
        """Removes a row, and moves the last one into its place, and what is read in part behind them."""
        last = self._rows.pop()
        n = len(self._rows)
        if place < n:
            self._rows[place] = last
            self._cache.copy_row(n, place, last.n_cached)
        if self._n_in_part:
            self._cache.copy_row(n + 1, n, self._waiting[0].n_cached)

    def _begin_anew(self) -> None:
        """Has all texts read again: a step that failed may have left tokens in some of the layers."""
        self._waiting.extendleft(reversed(self._rows))
        self._rows.clear()
        for row in self._waiting:
            row.n_cached = 0


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
