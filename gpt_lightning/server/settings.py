"""Reads from a request the settings that OpenAI has, and those of ours beside them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.server.fields import Fields, Refusal, as_number, as_text
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.served import ServedModel, any_seed

MOST_LIKELIEST = 20
MOST_CHOICES = 128
_MOST_STOPS, _MOST_STOP_LETTERS, _MOST_BIASES = 16, 512, 1024
_SEEDS = 2**63
# OpenAI's clients may send these, and they change no answer here.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def read_settings(
    fields: Fields, model: ServedModel, n_tokens: int, n_likeliest: int | None
) -> GenerationConfig:
    """Returns the settings of a request for so many tokens; what it leaves out is as the server has it."""
    ours = model.settings
    seed = any_seed() if model.seed is None else model.seed
    changes: dict[str, Any] = {
        "max_new_tokens": max(n_tokens, 1),
        "temperature": fields.number("temperature", ours.temperature, 0, 100),
        "top_p": fields.number("top_p", ours.top_p, 0, 1),
        "top_k": fields.whole("top_k", ours.top_k or 0, 0, 2**31),
        "min_p": fields.number("min_p", ours.min_p, 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", ours.repetition_penalty, 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", ours.presence_penalty, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", ours.frequency_penalty, -2, 2),
        "logit_bias": _biases(fields.take("logit_bias"), ours.logit_bias, model.vocab_size),
        "seed": fields.whole("seed", seed, -_SEEDS, _SEEDS - 1),
        "logprobs": n_likeliest is not None,
        "top_logprobs": min(n_likeliest or 0, model.vocab_size),
        "stop": _stops(fields.take("stop"), ours.stop),
    }
    try:
        return replace(ours, **changes)
    except UserError as error:  # a rule of a setting's own, such as the least temperature
        message = str(error).removeprefix("generation.")
        raise Refusal(message, message.partition("=")[0]) from None


def read_n_tokens(
    fields: Fields, names: Sequence[str], model: ServedModel, limits: Limits, least: int
) -> int:
    """Reads how long a completion may be, by whichever of these names is given."""
    given = {fields.whole(name, 1, least, limits.max_tokens) for name in names if name in fields}
    if len(given) > 1:
        raise Refusal(f"{' and '.join(names)} are not the same; send one of them", names[0])
    return next(iter(given), min(model.settings.max_new_tokens, limits.max_tokens))


def _stops(value: object, default: list[str]) -> list[str]:
    if value is None:
        return default
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > _MOST_STOPS:
        raise Refusal(f"stop is neither a text nor a list of at most {_MOST_STOPS}; send one of them", "stop")
    found = [as_text(text, "stop") for text in texts]
    if any(not 0 < len(text) <= _MOST_STOP_LETTERS for text in found):
        message = f"stop holds an empty text or one beyond {_MOST_STOP_LETTERS} letters; leave it out"
        raise Refusal(message, "stop")
    return found


def _biases(value: object, default: dict[int, float], vocab_size: int) -> dict[int, float]:
    if value is None:
        return default
    if not isinstance(value, dict) or len(value) > _MOST_BIASES:
        message = f"logit_bias is no object of at most {_MOST_BIASES} token ids with numbers; send one"
        raise Refusal(message, "logit_bias")
    for key in value:
        is_id = key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))
        if not is_id or int(key) >= vocab_size:
            message = f"logit_bias names a token that there is not; use ids from 0 to {vocab_size - 1}"
            raise Refusal(message, "logit_bias")
    return {int(key): as_number(bias, "logit_bias", -100, 100) for key, bias in value.items()}
