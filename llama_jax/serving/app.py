"""The routes of the server, and what they refuse."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, override
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.data import ChatTemplate
from llama_jax.sampling import Engine, tokenizer_of
from llama_jax.serving.answers import Answer, error_of, event
from llama_jax.serving.metrics import Metrics
from llama_jax.serving.requests import Limits, Refused, chat, completion, parsed
from llama_jax.serving.worker import Call, Worker

MAX_BODY = 8 << 20  # bytes
READ_SECONDS = 60.0  # in which a body has to arrive
STALLED_SECONDS = 120.0  # after which a client that reads nothing is given up
CLIENT_LEFT = 499  # nginx's status for it
LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How a model is served.

    name: of the model, in answers.
    rows: texts that are continued together, at most.
    max_queue: prompts that wait for a row, at most; more are refused with status 429.
    max_model_len: tokens of a text, its prompt included, at most; None for the model's positions.
    max_tokens: new tokens of a text, at most; None for as many as there is room for.
    api_key: key that requests must have; None for none.
    local: only requests to this machine by its own names are answered.
    """

    name: str
    rows: int = 8
    max_queue: int = 64
    max_model_len: int | None = None
    max_tokens: int | None = None
    api_key: str | None = None
    local: bool = True

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("max_queue", 0), ("max_model_len", 2), ("max_tokens", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if self.api_key == "":
            raise UserError("api_key is empty: give a key, or none")


class Service:
    """A model, its worker, and the answers to requests."""

    def __init__(self, lm: LanguageModel, config: ServingConfig, template: ChatTemplate | str | None = None):
        self.lm, self.config, self.template, self.metrics = lm, config, template, Metrics()
        self.tokenizer, model = tokenizer_of(lm), lm.model.config
        length = min(config.max_model_len or model.max_positions, model.length_limit)
        self.limits = Limits(length, min(config.max_tokens or length, length))
        engine = functools.partial(Engine, lm, rows=config.rows, length=length)
        self.worker = Worker(lm, engine, rows=config.rows, max_queue=config.max_queue, metrics=self.metrics)
        self.created = int(time.time())

    async def answer(self, request: Request) -> Response:
        """Answer /v1/completions and /v1/chat/completions."""
        is_chat = request.url.path.endswith("/chat/completions")
        read = functools.partial(chat, template=self.template) if is_chat else completion
        body = parsed(await _body(request))
        self._check_name(body.get("model"))
        arrived = time.monotonic()
        # A long prompt takes its time.
        call = Call(await asyncio.to_thread(read, self.lm, body, self.limits), arrived)
        self.worker.submit(call)
        return _Reply(self.worker, Answer(call, self.config.name, self.tokenizer, is_chat))

    async def models(self, request: Request) -> Response:
        """Answer /v1/models and /v1/models/NAME."""
        name = request.path_params.get("name")
        self._check_name(name)
        card = {
            "id": self.config.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llama_jax",
            "max_model_len": self.limits.length,
            "max_tokens": self.limits.max_new_tokens,
            "chat": bool(self.template or self.lm.chat_template or self.tokenizer.chat_templates),
        }
        return JSONResponse({"object": "list", "data": [card]} if name is None else card)

    def _check_name(self, name: Any) -> None:
        if name not in (None, self.config.name):
            raise Refused(404, f"there is no model {name!r}: this is '{self.config.name}'", "model_not_found")

    async def health(self, request: Request) -> Response:
        """Answer /health: 200, or 503 while the server stops."""
        state = "stopping" if self.worker.draining else "failed" if self.worker.ended else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def metrics_text(self, request: Request) -> Response:
        """Answer /metrics."""
        worker = self.worker
        gauges = {
            "requests_waiting": ("Prompts in the queue.", worker.num_waiting),
            "rows_running": ("Texts that are continued.", worker.num_running),
            "rows": ("Texts that can be continued together.", self.config.rows),
        }
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")


def application(service: Service) -> ASGIApp:
    """Return the ASGI application of a service, which runs the service's worker as its lifespan."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"}

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(service.worker.run())
        yield
        work.cancel()
        await asyncio.wait({work})

    return Starlette(
        routes=[
            Route("/", index),
            Route("/health", service.health),
            Route("/metrics", service.metrics_text),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.models),
            Route("/v1/completions", service.answer, methods=["POST"]),
            Route("/v1/chat/completions", service.answer, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, service)],
        exception_handlers={Refused: _refusal, UserError: _refusal, HTTPException: _refusal, Exception: _failure},
        lifespan=lifespan,
    )


def _refusal(request: Request, error: Exception) -> Response:
    """Return the answer to a request that is refused."""
    if isinstance(error, HTTPException):
        what = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        error = Refused(error.status_code, what.get(error.status_code, error.detail))
    elif not isinstance(error, Refused):
        error = Refused(400, str(error))
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "10"}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse(error_of(error), error.status, headers.get(error.status))


def _failure(request: Request, error: Exception) -> Response:
    return _refusal(request, Refused(500, f"the server has failed: {type(error).__name__}"))


async def _body(request: Request) -> bytes:
    """Return the body. Raises Refused for one that is too large or does not arrive."""
    too_large = Refused(413, f"the body is larger than {MAX_BODY} bytes", "body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for part in request.stream():
                found += part
                if len(found) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body has not arrived in {READ_SECONDS:.0f} seconds") from None
    return bytes(found)


class _Reply(Response):
    """An answer that is written while it is sent, and given up when its client leaves."""

    def __init__(self, worker: Worker, answer: Answer):
        super().__init__()
        self._worker, self._answer = worker, answer

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send(scope, receive, send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope["state"]["status"] = CLIENT_LEFT
        finally:
            self._worker.cancel(self._answer.call)
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            work.result()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._answer.call.asked.stream:
            return await JSONResponse(await self._answer.whole())(scope, receive, send)
        chunks = self._answer.chunks()
        first = await anext(chunks)  # a refusal has a status as long as nothing is sent
        kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        try:
            await _write(send, event(first))
            async for chunk in chunks:
                await _write(send, event(chunk))
        except Refused as error:
            await _write(send, event(error_of(error)))
        await _write(send, event("[DONE]"), more=False)
        return None


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(STALLED_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Guard:
    """Refuse requests of other sites and without the key, and count all of them."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["state"] = state = {"status": 500}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        request = Request(scope, receive)
        try:
            self._check(request)
            await self._app(scope, receive, counted)
        except Refused as error:
            await _refusal(request, error)(scope, receive, counted)
        except TimeoutError:  # the client reads nothing
            state["status"] = CLIENT_LEFT
        finally:
            path = scope["path"] if scope.get("route") is not None else "other"
            self._service.metrics.request("/v1/models" if path.startswith("/v1/models") else path, state["status"])
        return None

    def _check(self, request: Request) -> None:
        """Raise Refused for a request that must not reach a route."""
        config, headers = self._service.config, request.headers
        host = urlsplit(f"//{headers.get('host', '')}")
        # Another site's page may have this address under its own name (DNS rebinding), or send forms to it.
        with contextlib.suppress(ValueError):
            if config.local and host.hostname not in LOCAL:
                raise Refused(403, "the server is at http://localhost", "wrong_host")
        if (origin := headers.get("origin")) is not None and urlsplit(origin).netloc != host.netloc:
            raise Refused(403, "requests of other sites' pages are not answered", "wrong_origin")
        if config.api_key is None or request.url.path in ("/", "/health"):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), config.api_key.encode()):
            raise Refused(401, "the API key is wrong or missing: send Authorization: Bearer KEY", "invalid_api_key")
