"""Chooses the next token from its logits: logits processors, temperature, filters, and one draw.

Shapes: B rows in use, V vocabulary. The filters keep exactly what those of Hugging Face's transformers keep.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.processors import (
    add_bias,
    forbid_repeated_ngrams,
    penalize_counts,
    penalize_repetition,
)

MIN_TEMPERATURE = 1e-5
MOST_BIAS = 100.0


@dataclass(frozen=True)
class GenerationConfig:
    """Says how text is sampled from the model.

    Args:
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits: below 1 safer, above 1 more varied; 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens only; null or 0 for all of them.
        top_p: Sample from the likeliest tokens that together hold this probability; 1 or 0 for all of them.
        min_p: Drop tokens less likely than this fraction of the likeliest one's probability; 0 drops none.
        repetition_penalty: Above 1, tokens that prompt or completion already hold become less likely.
        presence_penalty: Subtracted from the logit of each token that the completion already holds.
        frequency_penalty: The same, as many times as the completion holds the token.
        logit_bias: Added to the logits of tokens, by their ids: {50256: -100} as good as forbids that one.
        no_repeat_ngram_size: So many tokens in a row never come twice in prompt and completion; null for any.
        do_sample: False always takes the likeliest token, whatever temperature, top_k, top_p and min_p say.
        seed: With a prompt's number, decides what is drawn for it; the same seed gives the same text.
        stop: Strings that end a completion where they appear; they are not part of it.
        num_samples: Completions of each prompt.
        logprobs: Give each chosen token's log-probability by the model alone, before temperature and filters.
        top_logprobs: So many of the likeliest tokens, with their log-probabilities, beside each chosen one's.
        context_stride: Tokens by which the window moves on when a text has filled the model's context. Null:
            half of it; 1: each token is predicted from all that fits, which takes a whole pass a token.
        quantize: `int8` keeps weights in a byte each: faster on a CPU, with slightly other probabilities.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    no_repeat_ngram_size: int | None = None
    do_sample: bool = True
    seed: int = 42
    stop: list[str] = field(default_factory=list)
    num_samples: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    context_stride: int | None = None
    quantize: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise _error("max_new_tokens", self.max_new_tokens, "is below 1; use e.g. 128")
        if not 0.0 <= self.temperature < math.inf:
            raise _error("temperature", self.temperature, "is below 0 or infinite; use 0 (greedy) or 0.7")
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise _error("temperature", self.temperature, f"is below {MIN_TEMPERATURE}; use 0 for greedy")
        if self.top_k is not None and self.top_k < 0:
            raise _error("top_k", self.top_k, "is below 0; use null for no limit or e.g. 50")
        if not 0.0 <= self.top_p <= 1.0:
            raise _error("top_p", self.top_p, "is not in [0, 1]; use 1 for no limit or e.g. 0.9")
        if not 0.0 <= self.min_p <= 1.0:
            raise _error("min_p", self.min_p, "is not in [0, 1]; use 0 for no limit or e.g. 0.05")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise _error("repetition_penalty", self.repetition_penalty, "is not above 0; use 1 for none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise _error(name, getattr(self, name), "is not finite; use 0 for none or e.g. 0.5")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not -MOST_BIAS <= bias <= MOST_BIAS:
                rule = "is not from token ids to numbers in [-100, 100]; use e.g. {42: -100}"
                raise _error("logit_bias", {token_id: bias}, rule)
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            raise _error("no_repeat_ngram_size", self.no_repeat_ngram_size, "is below 1; use null for any")
        if isinstance(self.stop, str):
            raise _error("stop", self.stop, "is one string; give a list of them")
        if "" in self.stop:
            raise _error("stop", self.stop, "holds an empty string, which would stop at once; remove it")
        if self.num_samples < 1:
            raise _error("num_samples", self.num_samples, "is below 1; use e.g. 1")
        if self.top_logprobs < 0:
            raise _error("top_logprobs", self.top_logprobs, "is below 0; use 0 for none or e.g. 5")
        if self.context_stride is not None and self.context_stride < 1:
            raise _error("context_stride", self.context_stride, "is below 1; use null for half the context")
        if self.quantize not in (None, "int8"):
            raise _error("quantize", self.quantize, "is unknown; use int8 or null")

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0.0

    @property
    def gives_logprobs(self) -> bool:
        return self.logprobs or self.top_logprobs > 0

    @property
    def of_sampler(self) -> str:
        """Names what a Sampler depends on: the same for all settings that may share one."""
        return repr(replace(self, max_new_tokens=1, seed=0, stop=[], num_samples=1, context_stride=None))


def _error(name: str, value: object, rule_and_remedy: str) -> UserError:
    return UserError(f"generation.{name}={value!r} {rule_and_remedy}")


class Sampler:
    """Chooses tokens by the settings, which say once for all steps what is to be done to the logits."""

    def __init__(self, settings: GenerationConfig) -> None:
        self._is_greedy = settings.is_greedy
        self._logprobs, self._n_top = settings.gives_logprobs, settings.top_logprobs
        self.width = 3 + self._logprobs + 2 * self._n_top  # of the numbers for a row
        # What changes logits, also by the texts so far and by where their completions begin.
        self.processors: list[Callable[[Tensor, list[list[int]], list[int]], Tensor]] = []
        # What leaves the unlikely ones out of the draw.
        self.filters: list[Callable[[Tensor], Tensor]] = [partial(torch.div, other=settings.temperature)]
        if settings.logit_bias:
            self.processors.append(lambda logits, *_: add_bias(logits, settings.logit_bias))
        if (penalty := settings.repetition_penalty) != 1.0:
            self.processors.append(lambda logits, texts, _: penalize_repetition(logits, texts, penalty))
        penalties = settings.presence_penalty, settings.frequency_penalty
        if any(penalties):
            self.processors.append(
                lambda logits, texts, starts: penalize_counts(
                    logits, [text[start:] for text, start in zip(texts, starts)], *penalties
                )
            )
        if (size := settings.no_repeat_ngram_size) is not None:
            self.processors.append(lambda logits, texts, _: forbid_repeated_ngrams(logits, texts, size))
        if settings.top_k:
            self.filters.append(partial(top_k_filter, k=settings.top_k))
        if 0.0 < settings.top_p < 1.0:
            self.filters.append(partial(top_p_filter, p=settings.top_p))
        if settings.min_p > 0.0:
            self.filters.append(partial(min_p_filter, min_p=settings.min_p))

    def choose(
        self, logits: Tensor, texts: list[list[int]], starts: list[int], uniforms: list[float]
    ) -> Tensor:
        """Returns for each row a token, the greatest logit before and after the processors, and logprobs.

        They are the columns of one tensor, for one look from the host; logprobs only if they were asked for:
        the token's, then the likeliest tokens' ids, then theirs. float32 holds every token id below 2**24.
        `logits` [B, V] are float32, `texts` the rows' tokens so far, in which the completions begin at
        `starts`, and `uniforms`, one a row in [0, 1), decide what is drawn.
        """
        left = logits
        for process in self.processors:
            left = process(left, texts, starts)
        if self._is_greedy:
            tokens = left.argmax(dim=-1)
        else:
            filtered = left
            for keep_likely in self.filters:
                filtered = keep_likely(filtered)
            drawn_at = torch.tensor(uniforms, device=logits.device, dtype=torch.float32)
            tokens = pick(filtered.softmax(dim=-1), drawn_at)
        columns = [tokens.float(), logits.amax(dim=-1), left.amax(dim=-1)]
        if self._logprobs:
            of_tokens = logits.gather(1, tokens[:, None])[:, 0]
            whole = logits.logsumexp(dim=-1)
            columns.append(of_tokens - whole)
            if self._n_top:
                likeliest = logits.topk(self._n_top, dim=-1)
                columns += [*likeliest.indices.float().T, *(likeliest.values - whole[:, None]).T]
        return torch.stack(columns, dim=1)


def choose_each(
    samplers: list[Sampler],
    logits: Tensor,
    texts: list[list[int]],
    starts: list[int],
    uniforms: list[float],
) -> Tensor:
    """Has each row's sampler choose, those of rows that share one at once; short rows end in zeros."""
    places: dict[Sampler, list[int]] = {}
    for place, sampler in enumerate(samplers):
        places.setdefault(sampler, []).append(place)
    if len(places) == 1:
        return samplers[0].choose(logits, texts, starts, uniforms)
    chosen = logits.new_zeros(len(samplers), max(sampler.width for sampler in places))
    for sampler, group in places.items():
        chosen[group, : sampler.width] = sampler.choose(
            logits[group],
            [texts[place] for place in group],
            [starts[place] for place in group],
            [uniforms[place] for place in group],
        )
    return chosen


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keeps the logits of the k likeliest tokens, and of any that tie with the last; -inf elsewhere."""
    smallest_kept = torch.topk(logits, min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keeps the logits of the likeliest tokens whose probabilities together just reach p; -inf elsewhere."""
    # Summed from the least likely token up: the small probabilities are added while the sum is small too.
    ascending, tokens = torch.sort(logits, dim=-1)
    mass_up_to = torch.softmax(ascending, dim=-1).cumsum(dim=-1)
    removed = mass_up_to <= 1.0 - p  # the likelier tokens alone hold p already
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, tokens, removed), -math.inf)


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Keeps the logits of tokens at least `min_p` times as likely as the likeliest one; -inf elsewhere."""
    probabilities = torch.softmax(logits, dim=-1)
    threshold = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, -math.inf)


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token a row, [B], by inverting the cumulative distribution at `uniforms` [B] in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    # Zero where a token has no probability: a sum made in parallel may round up there, on some devices.
    cumulative = torch.where(probabilities > 0, cumulative, 0.0)
    total = cumulative.amax(dim=-1)
    # A uniform that rounds to 1 would be the total itself, above which there is no token.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniforms.to(total) * total, below_total)
    return (cumulative > threshold[:, None]).int().argmax(dim=-1)  # the first of equal maxima
