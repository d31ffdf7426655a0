"""Reads what /v1/completions is asked, and writes its answers in OpenAI's form."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpt_lightning.data.token_names import token_name, token_string
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.server.fields import Fields, Refusal, as_text
from gpt_lightning.server.job import Piece, Scores, Token
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.served import Asked, ServedModel
from gpt_lightning.server.settings import (
    HARMLESS,
    MOST_CHOICES,
    MOST_LIKELIEST,
    read_n_tokens,
    read_settings,
)

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "exhausted": "stop"}


def read_completion(body: dict[str, Any], model: ServedModel, limits: Limits) -> Asked:
    """Checks a body and encodes its prompts, which may take a while."""
    fields = Fields(body)
    fields.ignore("model", *HARMLESS)
    fields.refuse("best_of", "is not supported; ask for n completions and choose")
    fields.refuse("suffix", "is not supported; leave it out")
    n_likeliest = fields.whole("logprobs", 0, 0, MOST_LIKELIEST) if "logprobs" in fields else None
    is_echo = fields.flag("echo")
    n_tokens = read_n_tokens(fields, ["max_tokens"], model, limits, 0 if is_echo else 1)
    settings = read_settings(fields, model, n_tokens, n_likeliest)
    n = fields.whole("n", 1, 1, MOST_CHOICES)
    is_stream, include_usage = read_stream(fields)
    given = fields.take("prompt")
    fields.finish()
    prompts = _prompts("" if given is None else given)
    if len(prompts) * n > MOST_CHOICES:
        message = f"prompt and n ask for {len(prompts) * n} completions; a request has {MOST_CHOICES}"
        raise Refusal(message, "prompt" if n == 1 else "n")
    encoded = [_encoded(prompt, model, limits) for prompt in prompts]
    echoes = None
    if is_echo:
        echoes = [text if isinstance(text, str) else model.tokenizer.decode(text) for text in prompts]
    return Asked(
        model=model,
        prompts=encoded,
        settings=settings,
        n=n,
        has_completion=n_tokens > 0,
        n_likeliest=n_likeliest,
        echoes=echoes,
        is_stream=is_stream,
        include_usage=include_usage,
    )


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Reads whether the answer comes in pieces, and whether the last one tells the usage."""
    is_stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is None:
        return is_stream, False
    if not isinstance(options, dict) or not is_stream:
        raise Refusal("stream_options is no object, or stream is not true; leave it out", "stream_options")
    inner = Fields(options)
    include_usage = inner.flag("include_usage")
    inner.ignore("include_obfuscation")
    inner.finish()
    return is_stream, include_usage


def _prompts(given: object) -> Sequence[str | list[int]]:
    """Makes a list of a text, of token ids, or of several of them."""
    if isinstance(given, str):
        return [as_text(given, "prompt")]
    if isinstance(given, list) and given:
        if all(isinstance(each, str) for each in given):
            return [as_text(each, "prompt") for each in given]
        if _are_ids(given):
            return [given]
        if all(isinstance(each, list) and each and _are_ids(each) for each in given):
            return given
    message = "prompt is neither a text, nor token ids, nor a list of such, none of them empty; send one"
    raise Refusal(message, "prompt")


def _are_ids(given: Iterable[object]) -> bool:
    return all(type(each) is int for each in given)


def _encoded(prompt: str | list[int], model: ServedModel, limits: Limits) -> list[int]:
    if isinstance(prompt, str):
        # One text in a batch, which lets other threads go on meanwhile.
        ids = model.tokenizer.encode_batch([prompt])[0] or [model.tokenizer.eos_token_id]
        return check_length(ids, limits, "prompt")
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        raise Refusal(f"prompt holds a token id that is not from 0 to {model.vocab_size - 1}", "prompt")
    return check_length(prompt, limits, "prompt")


def check_length(ids: list[int], limits: Limits, name: str) -> list[int]:
    if len(ids) > limits.max_prompt_tokens:
        most = limits.max_prompt_tokens
        message = f"{name} has {len(ids):,} tokens, the server takes {most:,}; shorten it"
        raise Refusal(message, name, code="context_length_exceeded")
    return ids


class TokenWriter:
    """Writes tokens one after the other, and knows where in the text each begins."""

    def __init__(self, tokenizer: TextTokenizer, offset: int) -> None:
        self._tokenizer, self.offset = tokenizer, offset  # of the next token
        self._piece: Callable[[int], str] = tokenizer.pieces()
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add(self, token: Token) -> tuple[str, str, int, dict[str, float]]:
        """Returns how the token is written and called, where it begins, and the likeliest ones there."""
        begun, offset = self._decoder.getstate()[0], self.offset
        name = token_name(self._tokenizer, token.token_id, begun)
        self._decoder.decode(self._tokenizer.bytes_of(token.token_id) or b"\n")
        self.offset += len(self._piece(token.token_id))
        own = token_string(self._tokenizer, token.token_id)
        own_logprob = [] if token.logprob is None else [(token.token_id, token.logprob)]
        likeliest: dict[str, float] = {}
        for other, logprob in [*token.likeliest, *own_logprob]:  # of two with one text the first
            likeliest.setdefault(token_string(self._tokenizer, other), round(logprob, 6))
        return own, name, offset, likeliest


class CompletionForm:
    """Writes the choices of one answer; `usage` counts what it has written."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        lengths = [len(text) for text in asked.echoes] if asked.echoes else [0] * len(asked.prompts)
        self._writers = [
            TokenWriter(asked.model.tokenizer, length) for length in lengths for _ in range(asked.n)
        ]
        self._echoing: dict[int, TokenWriter] = {}  # of the prompts

    def before(self) -> list[dict[str, Any]]:
        """Returns what stands before all tokens: the prompts, where they are wanted without scores."""
        if self._asked.echoes is None or self._asked.is_scored:
            return []
        reason = None if self._asked.has_completion else "length"
        echoes = [echo for echo in self._asked.echoes for _ in range(self._asked.n)]
        return [self._choice(choice, text, None, reason) for choice, text in enumerate(echoes)]

    def scores(self, scores: Scores) -> list[dict[str, Any]]:
        """Returns the next tokens of a prompt with their log-probabilities, and the text that they write."""
        assert self._asked.echoes is not None
        prompt, n = scores.prompt, self._asked.n
        writer = self._echoing.setdefault(prompt, TokenWriter(self._asked.model.tokenizer, 0))
        tokens = [
            Token(token_id, rounded(logprob), _with_own(token_id, logprob, others, self._n_likeliest))
            for token_id, logprob, others in scores.tokens
        ]
        reason = "length" if scores.is_last and not self._asked.has_completion else None
        begin, logprobs = writer.offset, self._logprobs(writer, tokens)
        text = self._asked.echoes[prompt][begin : None if scores.is_last else writer.offset]
        return [self._choice(choice, text, logprobs, reason) for choice in range(prompt * n, prompt * n + n)]

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.n_likeliest is not None:
            # Programs that score texts count on a token after the echoed ones, which may be the eos.
            end = [piece.end] if piece.end is not None and self._asked.is_scored else []
            tokens = [token._replace(logprob=rounded(token.logprob)) for token in [*piece.tokens, *end]]
            logprobs = self._logprobs(self._writers[piece.choice], tokens)
        reason = None if piece.finish_reason is None else FINISH_REASONS[piece.finish_reason]
        return self._choice(piece.choice, piece.text, logprobs, reason)

    @property
    def _n_likeliest(self) -> int:
        return self._asked.n_likeliest or 0

    def _logprobs(self, writer: TokenWriter, tokens: list[Token]) -> dict[str, list[Any]]:
        written = [(*writer.add(token), token.logprob) for token in tokens]
        return {
            "tokens": [own for own, *_ in written],
            "token_logprobs": [logprob for *_, logprob in written],
            "top_logprobs": [likeliest if likeliest else None for *_, likeliest, _ in written],
            "text_offset": [offset for _, _, offset, *_ in written],
            "token_names": [name for _, name, *_ in written],
        }

    def _choice(
        self, choice: int, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a choice of its parts."""
        lists = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        logprobs = None
        if lists:
            logprobs = {key: [each for part in lists for each in part[key]] for key in lists[0]}
        text = "".join(part["text"] for part in parts)
        return self._choice(parts[0]["index"], text, logprobs, parts[-1]["finish_reason"])


def _with_own(
    token_id: int, logprob: float | None, others: list[tuple[int, float]], n: int
) -> list[tuple[int, float]]:
    """Returns the n likeliest tokens of a place, of which the one that stands there may be one."""
    if logprob is None:
        return []
    return sorted([(token_id, logprob), *others], key=lambda pair: -pair[1])[:n]


def rounded(logprob: float | None) -> float | None:
    return None if logprob is None else round(logprob, 6)  # as predict writes it
