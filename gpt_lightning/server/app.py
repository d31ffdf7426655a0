"""Routes requests: the page, the models, completions, and how the server is."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_lightning.exit_codes import UserError
from gpt_lightning.server.answer import Answer, Form
from gpt_lightning.server.chat import ChatForm, read_chat_completion
from gpt_lightning.server.completions import CompletionForm, read_completion
from gpt_lightning.server.fields import Refusal, read_object
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.metrics import CONTENT_TYPE, Metrics
from gpt_lightning.server.page import page_response
from gpt_lightning.server.security import Access, Guard
from gpt_lightning.server.served import Asked, ServedModel

_log = logging.getLogger("gpt_lightning")
_PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
_ENCODERS = 2  # threads that read bodies
Reader = Callable[[dict[str, Any], ServedModel, Limits], Asked]


class Service:
    """Answers for its models; it takes no more requests from when `is_closing` is set."""

    def __init__(self, models: Sequence[ServedModel], limits: Limits, metrics: Metrics) -> None:
        self._models = {model.name: model for model in models}
        self._default = models[0]
        self.limits, self.metrics = limits, metrics
        self.is_closing = False
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encoding")

    @asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        for model in self._models.values():
            model.worker.start()
        try:
            yield
        finally:
            for model in self._models.values():
                model.worker.stop()
            self._encoders.shutdown(cancel_futures=True)

    async def page(self, request: Request) -> Response:
        return page_response()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.entry() for model in self._models.values()]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._named(request.path_params["name"]).entry())

    async def health(self, request: Request) -> Response:
        if self.is_closing or not all(model.worker.is_alive for model in self._models.values()):
            return JSONResponse({"status": "ending" if self.is_closing else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def figures(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def completions(self, request: Request) -> ASGIApp:
        return await self._answer(request, read_completion, CompletionForm)

    async def chat_completions(self, request: Request) -> ASGIApp:
        return await self._answer(request, read_chat_completion, ChatForm)

    async def _answer(self, request: Request, read: Reader, form: Callable[[Asked], Form]) -> ASGIApp:
        if self.is_closing:
            raise Refusal("the server ends", status=503, kind="server_error", code="shutting_down")
        body = read_object(await self._body(request))
        model = self._named(body.get("model"))
        loop = asyncio.get_running_loop()
        try:
            asked = await loop.run_in_executor(self._encoders, read, body, model, self.limits)
        except UserError as error:  # the tokenizer's, of a text that it does not take
            raise Refusal(str(error)) from None
        asked.check_size(self.limits)
        return Answer(asked, form(asked), self.limits, self.metrics)

    def _named(self, name: object) -> ServedModel:
        if name is None:
            return self._default
        if not isinstance(name, str):
            raise Refusal("model is no text; send a name of /v1/models", "model")
        if name not in self._models:
            message = f"there is no model of this name; send one of {', '.join(self._models)}"
            raise Refusal(message, "model", status=404, code="model_not_found")
        return self._models[name]

    async def _body(self, request: Request) -> bytes:
        """Reads the body, which must come in time and may not be longer than the server takes."""
        most = self.limits.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.header_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        message = f"the body is longer than {most:,} bytes; send less"
                        raise Refusal(message, status=413, code="body_too_long")
        except TimeoutError:
            raise Refusal("the body did not come in time; send it at once", status=408) from None
        except ClientDisconnect:
            raise Refusal("the client has left", status=499) from None
        return bytes(body)


def make_app(models: Sequence[ServedModel], limits: Limits, metrics: Metrics, access: Access) -> Starlette:
    service = Service(models, limits, metrics)
    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.figures),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
    ]
    middleware = [Middleware(_Counting, service=service)]
    if access.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=[*access.origins],
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    middleware.append(Middleware(Guard, access=access))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={Refusal: _refused, HTTPException: _not_there},  # type: ignore[dict-item]
        lifespan=service.running,
    )
    app.router.redirect_slashes = False  # it would lead to whatever the Host header names
    app.state.service = service
    return app


async def _refused(request: Request, refusal: Refusal) -> Response:
    headers = {"connection": "close"} if refusal.status in (408, 413) else {}  # its rest is not read
    if refusal.status in (429, 503):
        headers["retry-after"] = "1"
    return JSONResponse(refusal.body, refusal.status, headers=headers)


async def _not_there(request: Request, error: HTTPException) -> Response:
    what = error.detail
    if error.status_code == 404:
        what = "there is no such address; ask /v1/completions, /v1/chat/completions or /v1/models"
    elif error.status_code == 405:
        method = (error.headers or {}).get("Allow", "another")
        what = f"this address is not asked by this method; send {method}"
    refusal = Refusal(what, status=error.status_code)
    return JSONResponse(refusal.body, error.status_code, headers=error.headers)


class _Counting:
    """Counts the answers by path and status, and turns an error of the program's into OpenAI's form."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:  # the grace time is over
            self._service.metrics.cut += 1
            raise
        except Exception as error:
            _log.error("a request has failed", exc_info=error)
            if not status:
                refusal = Refusal("the server has failed", status=500, kind="server_error")
                await JSONResponse(refusal.body, 500)(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._service.metrics.requests[path, status] += 1
