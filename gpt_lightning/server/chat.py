"""Reads what /v1/chat/completions is asked, and writes its answers in OpenAI's form."""

import codecs
from collections.abc import Mapping
from typing import Any

from gpt_lightning.data.chat_template import SAID_OTHERWISE, render_chat
from gpt_lightning.data.token_names import token_name
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.server.completions import FINISH_REASONS, check_length, read_stream, rounded
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

_MOST_MESSAGES = 1024
_UNSUPPORTED = "tools tool_choice functions function_call audio prediction web_search_options".split()


def read_chat_completion(body: dict[str, Any], model: ServedModel, limits: Limits) -> Asked:
    """Checks a body, and renders and encodes its messages, which may take a while."""
    if not model.tokenizer.chat:
        message = f"the tokenizer of {model.name} has no chat template; ask /v1/completions with a prompt"
        raise Refusal(message, "messages", code="no_chat_template")
    fields = Fields(body)
    fields.ignore("model", "parallel_tool_calls", *HARMLESS)
    for name in _UNSUPPORTED:
        fields.refuse(name, "is not supported; leave it out")
    for name, supported in (("response_format", {"type": "text"}), ("modalities", ["text"])):
        if fields.take(name) not in (None, supported):
            raise Refusal(f"{name} is not supported but for text; leave it out", name)
    n_likeliest = _read_logprobs(fields)
    n_tokens = read_n_tokens(fields, ["max_completion_tokens", "max_tokens"], model, limits, 1)
    settings = read_settings(fields, model, n_tokens, n_likeliest)
    n = fields.whole("n", 1, 1, MOST_CHOICES)
    is_stream, include_usage = read_stream(fields)
    messages, options = _messages(fields.take("messages")), _options(fields.take("chat_template_kwargs"))
    fields.finish()
    try:
        text = render_chat(model.tokenizer.chat, messages, options)
    except UserError as error:
        raise Refusal(str(error), "messages") from None
    prompt = model.tokenizer.parse_batch([text])[0] or [model.tokenizer.eos_token_id]
    return Asked(
        model=model,
        prompts=[check_length(prompt, limits, "messages")],
        settings=settings,
        n=n,
        n_likeliest=n_likeliest,
        is_stream=is_stream,
        include_usage=include_usage,
    )


def _read_logprobs(fields: Fields) -> int | None:
    """Reads how many of the likeliest tokens are told, None for no log-probability at all."""
    is_wanted = fields.flag("logprobs")
    if "top_logprobs" in fields and not is_wanted:
        raise Refusal("top_logprobs is given, and logprobs is not true; send both", "top_logprobs")
    n = fields.whole("top_logprobs", 0, 0, MOST_LIKELIEST)
    return n if is_wanted else None


def _messages(given: object) -> list[dict[str, str]]:
    if not isinstance(given, list) or not 0 < len(given) <= _MOST_MESSAGES:
        message = f"messages is no list of 1 to {_MOST_MESSAGES}; send e.g. "
        raise Refusal(message + '[{"role": "user", "content": "Hello"}]', "messages")
    return [_message(each, f"messages[{place}]") for place, each in enumerate(given)]


def _message(given: object, name: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise Refusal(f"{name} is no object; send one with role and content", name)
    fields = Fields(given)
    found = {"role": as_text(fields.take("role"), f"{name}.role")}
    content = fields.take("content")
    found["content"] = _content(content, f"{name}.content")
    if (author := fields.take("name")) is not None:
        found["name"] = as_text(author, f"{name}.name")
    fields.ignore("refusal")
    fields.finish()
    return found


def _content(given: object, name: str) -> str:
    """Returns a text, or several parts of one after the other."""
    if not isinstance(given, list):
        return as_text(given, name)
    texts = []
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise Refusal(f"{name} has a part that is no text; send {{type: text, text: ...}}", name)
        texts.append(as_text(part["text"], name))
    return "".join(texts)


def _options(given: object) -> Mapping[str, Any]:
    """Returns what a template is told beside the messages, such as Qwen's enable_thinking."""
    name = "chat_template_kwargs"
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(value, bool | str) for value in given.values()):
        raise Refusal(f"{name} is no object of texts, true and false; send one", name)
    if taken := SAID_OTHERWISE & given.keys():
        raise Refusal(f"{name} holds {min(taken)}, which is said otherwise; leave it out", name)
    for value in given.values():
        if isinstance(value, str):
            as_text(value, name)
    return given


class ChatForm:
    """Writes the choices of one answer."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._decoders = [codecs.getincrementaldecoder("utf-8")("ignore") for _ in range(asked.n)]

    def before(self) -> list[dict[str, Any]]:
        """Returns who speaks, which a stream begins with."""
        if not self._asked.is_stream:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._choice(choice, delta, None, None) for choice in range(self._asked.n)]

    def scores(self, scores: Scores) -> list[dict[str, Any]]:
        return []  # nobody can ask for them here

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.n_likeliest is not None:
            decoder = self._decoders[piece.choice]
            logprobs = {"content": [self._token(token, decoder) for token in piece.tokens], "refusal": None}
        reason = None if piece.finish_reason is None else FINISH_REASONS[piece.finish_reason]
        delta = {"content": piece.text} if piece.text else {}
        return self._choice(piece.choice, delta, logprobs, reason)

    def whole(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a choice of its parts."""
        text = "".join(part["delta"].get("content", "") for part in parts)
        lists = [part["logprobs"]["content"] for part in parts if part["logprobs"] is not None]
        logprobs = {"content": [each for part in lists for each in part], "refusal": None} if lists else None
        return {
            "index": parts[0]["index"],
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": parts[-1]["finish_reason"],
        }

    def _token(self, token: Token, decoder: codecs.IncrementalDecoder) -> dict[str, Any]:
        tokenizer, begun = self._asked.model.tokenizer, decoder.getstate()[0]
        likeliest = [_entry(tokenizer, other, logprob, begun) for other, logprob in token.likeliest]
        found = _entry(tokenizer, token.token_id, token.logprob, begun)
        decoder.decode(tokenizer.bytes_of(token.token_id) or b"\n")
        return {**found, "top_logprobs": likeliest}

    @staticmethod
    def _choice(choice: int, delta: dict[str, str], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _entry(tokenizer: TextTokenizer, token_id: int, logprob: float | None, begun: bytes) -> dict[str, Any]:
    found = tokenizer.bytes_of(token_id) or tokenizer.name_of(token_id).encode()
    return {
        "token": found.decode(errors="replace"),
        "logprob": rounded(logprob),
        "bytes": [*found],
        "name": token_name(tokenizer, token_id, begun),
    }
