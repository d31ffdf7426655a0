"""Sends the answer to one request while a worker makes it, and lets go of it where the client leaves."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gpt_lightning.server.fields import Refusal
from gpt_lightning.server.job import Job, News, Piece, Scores
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.metrics import Metrics
from gpt_lightning.server.served import Asked

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # by which proxies pass on at once
]
_AT_ONCE = 256  # tokens written without a pause
_CLIENT_LEFT = 499  # what proxies log of it; nobody reads it


class Form(Protocol):
    """Writes what a worker tells as the choices of an answer."""

    kind: str
    chunk_kind: str
    prefix: str

    def before(self) -> list[dict[str, Any]]: ...

    def scores(self, scores: Scores) -> list[dict[str, Any]]: ...

    def piece(self, piece: Piece) -> dict[str, Any]: ...

    def whole(self, parts: list[dict[str, Any]]) -> dict[str, Any]: ...


class Answer:
    """Is the response, an application of ASGI's, to what is asked."""

    def __init__(self, asked: Asked, form: Form, limits: Limits, metrics: Metrics) -> None:
        self._asked, self._form, self._metrics = asked, form, metrics
        self._job = asked.job(limits)
        self._n_completion_tokens = 0
        self._has_first = False
        self._head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        if self._job.n_open:
            asked.model.worker.submit(self._job)  # or raises a Refusal
        metrics.prompt_tokens += sum(map(len, asked.prompts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_tell_of_leaving(self._job, receive))
        try:
            if self._asked.is_stream:
                await self._send_stream(send)
            else:
                await self._send_whole(scope, receive, send)
        finally:
            watch.cancel()
            if self._job.n_open:
                self._asked.model.worker.cancel(self._job)
            self._metrics.request_seconds.add(time.monotonic() - self._job.start)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: dict[int, list[dict[str, Any]]] = {}
        try:
            async for choices in self._choices():
                for choice in choices:
                    parts.setdefault(choice["index"], []).append(choice)
        except Refusal as refusal:
            await JSONResponse(refusal.body, refusal.status)(scope, receive, send)
            return
        whole = [self._form.whole(parts[index]) for index in sorted(parts)]
        body = {**self._head, "object": self._form.kind, "model": self._asked.model.name}
        text = await _json({**body, "choices": whole, "usage": self._usage()})
        await Response(text, media_type="application/json")(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        head = {**self._head, "object": self._form.chunk_kind, "model": self._asked.model.name}
        tail: dict[str, Any] = {"usage": None} if self._asked.include_usage else {}
        try:
            async for choices in self._choices():
                chunks = ({**head, "choices": [choice], **tail} for choice in choices)
                await send(_event(*chunks))
            if self._asked.include_usage:
                await send(_event({**head, "choices": [], "usage": self._usage()}))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        except Refusal as refusal:
            await send(_event(refusal.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yields parts of choices as the worker tells of them; raises the Refusal that ends the request."""
        if before := self._form.before():
            yield before
        n_open = self._job.n_choices_and_scores
        while n_open:
            news = await self._next()
            n_open -= sum(map(_is_last, news))
            yield [part for each in _merged(news) for part in self._written(each)]

    async def _next(self) -> list[Piece | Scores]:
        try:
            news = await self._job.take()
        except asyncio.CancelledError:  # the grace time is over
            self._metrics.cut += 1
            message = "the server ends"
            raise Refusal(message, status=503, kind="server_error", code="shutting_down") from None
        for each in news:
            if isinstance(each, Refusal):
                if each.status == _CLIENT_LEFT:
                    self._metrics.cancelled += 1
                raise each
        return [each for each in news if not isinstance(each, Refusal)]

    def _written(self, news: Piece | Scores) -> list[dict[str, Any]]:
        if isinstance(news, Scores):
            return self._form.scores(news)
        self._n_completion_tokens += len(news.tokens)
        if not self._has_first:
            self._has_first = True
            self._metrics.first_token_seconds.add(time.monotonic() - self._job.start)
        return [self._form.piece(news)]

    def _usage(self) -> dict[str, int]:
        n_prompt = sum(map(len, self._asked.prompts))
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": self._n_completion_tokens,
            "total_tokens": n_prompt + self._n_completion_tokens,
        }


def _is_last(news: Piece | Scores) -> bool:
    """Tells whether it is the end of a choice or of a prompt's scores."""
    return news.is_last if isinstance(news, Scores) else news.finish_reason is not None


def _merged(news: list[Piece | Scores]) -> Iterator[Piece | Scores]:
    """Makes one piece of those of each choice: a client that reads slowly gets fewer and longer ones."""
    pieces: dict[int, list[Piece]] = {}
    for each in news:
        if isinstance(each, Scores):
            yield each
        else:
            pieces.setdefault(each.choice, []).append(each)
    for choice, several in pieces.items():
        text = "".join(piece.text for piece in several)
        tokens = [token for piece in several for token in piece.tokens]
        yield Piece(choice, text, tokens, several[-1].finish_reason, several[-1].end)


async def _json(value: Any) -> str:
    """Writes JSON; what is long in parts, between which the loop has its turn."""
    if isinstance(value, dict):
        return "{%s}" % ",".join([f"{_dumped(name)}:{await _json(each)}" for name, each in value.items()])
    if isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:  # choices
        return "[%s]" % ",".join([await _json(each) for each in value])
    if not isinstance(value, list) or len(value) <= _AT_ONCE:
        return _dumped(value)
    written = []
    for begin in range(0, len(value), _AT_ONCE):
        written.append(_dumped(value[begin : begin + _AT_ONCE])[1:-1])
        await asyncio.sleep(0)
    return "[%s]" % ",".join(written)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _event(*bodies: dict[str, Any]) -> Message:
    body = "".join(f"data: {_dumped(body)}\n\n" for body in bodies).encode()
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _tell_of_leaving(job: Job, receive: Receive) -> None:
    """Waits for the end of the connection, and ends the request with it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left: list[News] = [Refusal("the client has left", status=_CLIENT_LEFT)]
    job.put(left)
