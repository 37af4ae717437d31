"""The routes: from an HTTP request to a job, and from its events to a response."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from ipaddress import ip_address

from edgepress.pipeline.errors import EdgepressError
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.page.html import chat_page, script_hash
from edgepress.pipeline.serve import answers
from edgepress.pipeline.serve.answers import Answer
from edgepress.pipeline.serve.bodies import BadRequest, ChatBody, TextBody, chat_messages, job, parsed, prompt_ids
from edgepress.pipeline.serve.engine import Busy, Closed, Done, Engine, Event, Failed, Job, Piece
from edgepress.pipeline.serve.metrics import Metrics
from edgepress.pipeline.visible import one_line
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

log = logging.getLogger("edgepress")
LARGEST_BODY = 4 << 20  # bytes
LOCAL = ("127.0.0.1", "[::1]", "localhost")  # names that a browser on this machine may call the server by
KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def application(engine: Engine, name: str = "localhost") -> Starlette:
    """The web application of an engine. name: of the host as it was given, besides its address in the engine's options."""
    service = _Service(engine)
    post = {"methods": ["POST"]}
    routes = [
        Route("/v1/chat/completions", service.chat, **post),  # type: ignore[arg-type]
        Route("/v1/completions", service.text, **post),  # type: ignore[arg-type]
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/health", service.health),
        Route("/metrics", service.measured),
        Route("/", service.page),
    ]

    handlers = {HTTPException: _http_error, EdgepressError: _any_error, Exception: _any_error}
    middleware = []
    host = engine.options.host
    if is_local(host):  # a page of another site must not reach it by a name that leads here
        allowed = [*LOCAL, f"[{host}]" if ":" in host else host, name]
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)


def is_local(host: str) -> bool:
    """Whether an address, or ``localhost``, is reached from this machine alone."""
    try:
        address = ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"


class _Service:
    """The endpoints."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.metrics = Metrics(engine)
        self._page = chat_page("server.js")
        # All of the page is in its file: nothing is loaded from elsewhere, no other script runs, and no other site may frame it.
        self._policy = (
            f"default-src 'none'; script-src {script_hash(self._page)}; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        )

    async def chat(self, request: Request) -> Response:
        body = parsed(await self._content(request), ChatBody)
        ids = await run_in_threadpool(self.engine.conversation_ids, chat_messages(body))
        return await self._answer(request, body, ids)

    async def text(self, request: Request) -> Response:
        body = parsed(await self._content(request), TextBody)
        ids = await run_in_threadpool(prompt_ids, body, self.engine)
        return await self._answer(request, body, ids)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        model = {"id": self.engine.name, "object": "model", "created": 0, "owned_by": "edgepress"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        if request.path_params["name"] != self.engine.name:
            raise HTTPException(404, f"there is one model here: {self.engine.name}")
        return JSONResponse(model)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self.engine.running, "waiting": len(self.engine.waiting)})

    async def measured(self, request: Request) -> Response:
        self._check_key(request)
        content, kind = self.metrics.text()
        return Response(content, media_type=kind)

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"})

    def _check_key(self, request: Request) -> None:
        key = self.engine.options.api_key
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if key and not (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())):
            raise HTTPException(401, "the key is missing or wrong; send it as 'Authorization: Bearer KEY'")

    async def _content(self, request: Request) -> bytes:
        """The body. Its type is asked for, as a page of another site can send any other without being allowed to."""
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send JSON, with the header 'Content-Type: application/json'")
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > LARGEST_BODY:
                raise HTTPException(413, f"the body is larger than {LARGEST_BODY:,} bytes")
        return bytes(content)

    async def _answer(self, request: Request, body: ChatBody | TextBody, ids: list[int]) -> Response:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        made = job(body, ids, self.engine, lambda event: _told(loop, events, event))
        answer = Answer(self.engine, isinstance(body, ChatBody))
        self.engine.submit(made)
        followed = self.metrics.followed(made, events)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            stream = _stream(answer, made, followed, usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await _whole(request, answer, made, followed)


def _told(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event from the engine's thread to the loop, which may have ended."""
    try:
        loop.call_soon_threadsafe(events.put_nowait, event)
    except RuntimeError:
        log.debug("nobody waits for %s", event)


async def _stream(answer: Answer, made: Job, events: AsyncIterator[list[Event]], usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; a client that goes away ends this, and with it the job."""
    try:
        if (opening := answer.opening()) is not None:
            yield answers.event(opening)
        async for several in events:
            if pieces := [event for event in several if isinstance(event, Piece)]:
                yield answers.event(answer.pieces(pieces))
            if isinstance(end := several[-1], Done):
                yield answers.event(answer.closing(end))
                if usage:
                    yield answers.event(answer.accounts(end))
            elif isinstance(end, Failed):
                yield answers.event(_content_of(end.error)[1])
        yield b"data: [DONE]\n\n"
    finally:
        made.cancelled.set()


async def _whole(request: Request, answer: Answer, made: Job, events: AsyncIterator[list[Event]]) -> Response:
    gone = asyncio.ensure_future(_disconnected(request))
    pieces = list[Piece]()
    try:
        while True:
            following = asyncio.ensure_future(anext(events))
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                raise ClientDisconnect
            several = following.result()
            pieces += [event for event in several if isinstance(event, Piece)]
            if isinstance(end := several[-1], Done):
                return JSONResponse(answer.whole(pieces, end))
            if isinstance(end, Failed):
                return _error(end.error)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    finally:
        made.cancelled.set()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _content_of(error: Exception) -> tuple[int, JsonObject]:
    """Status and body of what went wrong."""
    if isinstance(error, Busy):
        return 429, answers.error(str(error), KINDS[429])
    if isinstance(error, Closed):
        return 503, answers.error(str(error), "server_error")
    if isinstance(error, BadRequest):
        return 400, answers.error(str(error), KINDS[400], error.param)
    if isinstance(error, EdgepressError):
        return 400, answers.error(one_line(str(error)), KINDS[400])
    log.error("error: a request failed: %s", one_line(f"{type(error).__name__}: {error}"))
    return 500, answers.error("the server failed at this request; its log says how", "server_error")


def _error(error: Exception) -> Response:
    status, content = _content_of(error)
    return JSONResponse(content, status, headers={"Retry-After": "1"} if status == 429 else None)


async def _any_error(_: Request, error: Exception) -> Response:
    return _error(error)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = KINDS.get(error.status_code, KINDS[400])
    return JSONResponse(answers.error(error.detail, kind), error.status_code, headers=error.headers)
