"""Checks what a client sends, field by field, and says in OpenAI's form what is wrong with it."""

import json
import math
from collections import Counter
from typing import Any, NoReturn

# What is meant by a field that another address has, or another program.
_INSTEAD = {
    "messages": "ask /v1/chat/completions with it",
    "prompt": "ask /v1/completions with it",
    "max_new_tokens": "send max_tokens",
    "n_predict": "send max_tokens",
}
_SHOWN = 64  # characters of a name that a client has made up


class Refusal(Exception):
    """Tells a client what cannot be done, as OpenAI's programs expect it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_object(body: bytes) -> dict[str, Any]:
    """Reads a JSON object; what JSON does not have, such as NaN, is refused too."""
    try:
        found = json.loads(body, parse_constant=_no_number, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise Refusal("the body is no JSON; send an object such as {\"prompt\": \"The \"}") from None
    if not isinstance(found, dict):
        raise Refusal("the body is no JSON object; send one such as {\"prompt\": \"The \"}")
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a name that comes twice, of which readers take the one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = _shown(Counter(name for name, _ in pairs).most_common(1)[0][0])
        raise Refusal(f"{twice} is given twice; leave one out", twice)
    return found


def _shown(name: str) -> str:
    """Makes of a name that a client has made up one that can be written, and is not long."""
    shown = name.encode(errors="replace").decode()
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


class Fields:
    """Takes the fields of a body one by one, null for left out; `finish` refuses the rest."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Any:
        """Returns the value as it is, None where there is none."""
        return self._left.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise Refusal(f"{name} is neither true nor false; send one of them", name)
        return value

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refusal(f"{name} is no whole number; send one from {least} to {most}", name)
        if not least <= value <= most:
            raise Refusal(f"{name} is not from {least} to {most}; send a number that is", name)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        return as_number(self._left.pop(name, default), name, least, most)

    def refuse(self, name: str, reason: str) -> None:
        """Refuses a field that OpenAI has and this server has not."""
        if name in self._left:
            raise Refusal(f"{name} {reason}", name)

    def ignore(self, *names: str) -> None:
        """Drops what changes nothing in the answer."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        for name in self._left:
            shown = _shown(name)
            remedy = _INSTEAD.get(name, "leave it out")
            raise Refusal(f"{shown} is no field of this request; {remedy}", shown)


def as_number(value: object, name: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(f"{name} is no number; send one from {least:g} to {most:g}", name)
    if not least <= value <= most or isinstance(value, float) and math.isnan(value):
        raise Refusal(f"{name} is not from {least:g} to {most:g}; send a number that is", name)
    return float(value)


def as_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise Refusal(f"{name} is no text; send a string", name)
    if not is_unicode(value):
        raise Refusal(f"{name} holds half of a surrogate pair; send whole characters", name)
    return value


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
