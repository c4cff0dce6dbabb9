"""The HTTP side of a server: OpenAI's addresses over Starlette, served by uvicorn."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rwkvpipe.base.errors import ConfigError, DataError, PipeError
from rwkvpipe.base.files import parse_json
from rwkvpipe.web.asked import Asked, House, Refused
from rwkvpipe.web.desk import Closed, Desk, Event, Full, Order
from rwkvpipe.web.told import Answer

log = logging.getLogger("rwkvpipe")

BODY = 4 << 20  # bytes of a request
LOCAL = ("127.0.0.1", "::1", "localhost")
GRACE = 5  # seconds that answers on their way have when the server is told to stop


def said(value: Any, status: int = 200, **headers: str) -> Response:
    """A JSON response; pure ASCII, so that no text can break it."""
    return Response(json.dumps(value), status, headers, "application/json")


async def body_of(request: Request) -> Any:
    """The JSON of a request. Raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send JSON, with the header Content-Type: application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > BODY:
            raise Refused(413, f"the request has more than {BODY} bytes")
    try:
        return parse_json(bytes(data), "the request", lines=False)
    except DataError as error:
        raise Refused(400, str(error)) from None


class Service:
    """Requests in, answers out; the desk writes them in a thread of its own."""

    def __init__(self, house: House, desk: Desk):
        self.house, self.desk = house, desk

    async def models(self, request: Request) -> Response:
        """GET /v1/models, and one of them by its name."""
        name = self.house.name
        found = {"id": name, "object": "model", "created": 0, "owned_by": "rwkvpipe"}
        asked = request.path_params.get("name")
        if asked not in (None, name):
            raise Refused(404, f"there is no model {asked!r} here; known: {name}", "model", "model_not_found")
        return said(found if asked else {"object": "list", "data": [found]})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, self.house.read("chat", await body_of(request)))

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, self.house.read("text", await body_of(request)))

    async def _answer(self, request: Request, asked: Asked) -> Response:
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is there to listen
                loop.call_soon_threadsafe(news.put_nowait, event)

        order = Order(asked.prompts, asked.sampling, asked.samples, asked.top, listen)
        try:
            self.desk.submit(order)
        except Full as full:
            raise Refused(429, str(full), code="queue_full") from None
        except Closed as closed:
            raise Refused(503, str(closed)) from None
        except PipeError as error:
            raise Refused(400, str(error)) from None
        answer = Answer(asked, self.house.name, self.house.engine.tokenizer)
        if asked.stream:
            return StreamingResponse(self._stream(order, answer, news), media_type="text/event-stream")
        return await self._whole(request, order, answer, news)

    async def _stream(self, order: Order, answer: Answer, news: asyncio.Queue) -> AsyncIterator[bytes]:
        """Server-sent events; whoever goes away frees the slots."""
        try:
            for piece in answer.opening():
                yield b"data: %s\n\n" % json.dumps(piece).encode()
            while not answer.over:
                event = await news.get()
                if event.error is not None:
                    yield b"data: %s\n\n" % json.dumps(_problem(event.error).body()).encode()
                    return
                for piece in answer.take(event):
                    yield b"data: %s\n\n" % json.dumps(piece).encode()
            for piece in answer.closing():
                yield b"data: %s\n\n" % json.dumps(piece).encode()
            yield b"data: [DONE]\n\n"
        finally:
            self.desk.give_up(order)

    async def _whole(self, request: Request, order: Order, answer: Answer, news: asyncio.Queue) -> Response:
        gone = asyncio.ensure_future(_gone(request))
        try:
            while not answer.over:
                event = asyncio.ensure_future(news.get())
                await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return Response(status_code=499)  # nobody reads it
                if event.result().error is not None:
                    raise _problem(event.result().error)
                answer.choices[event.result().index].take(event.result())
            return said(answer.whole())
        finally:
            gone.cancel()
            self.desk.give_up(order)


def _problem(error: PipeError) -> Refused:
    """What ended an answer: the request's own settings, or the server."""
    return Refused(400 if isinstance(error, ConfigError) else 503, str(error))


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


async def _refused(request: Request, error: Refused) -> Response:
    return said(error.body(), error.status, **({"Retry-After": "1"} if error.status == 429 else {}))


async def _no_such(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}: {error.detail}"
    return said(Refused(error.status_code, what).body(), error.status_code)


async def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return said(Refused(500, "the server made a mistake; its log says which").body(), 500)


def application(house: House, desk: Desk, host: str) -> Starlette:
    """The addresses of a server. One that listens to this machine alone answers to this machine's names alone."""
    service = Service(house, desk)
    routes = [
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.text, methods=["POST"]),
    ]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])]
    handlers = {Refused: _refused, HTTPException: _no_such, ClientDisconnect: _left, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=guards if host in LOCAL else [])


class _Server(uvicorn.Server):
    """Told to stop, it takes no more requests; the desk closes when those on their way have had their time, and a
    client that does not read the end of its answer is cut off soon after."""

    def __init__(self, config: uvicorn.Config, desk: Desk):
        super().__init__(config)
        self.timer = threading.Timer(GRACE, desk.close)
        self.timer.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal does not wait."""
        if self.should_exit:
            self.force_exit = True
        else:
            self.should_exit = True
            self.timer.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As ever, but for clients that do not read: to cancel their tasks would log a traceback for each."""
        asyncio.get_running_loop().call_later(1.5 * GRACE, self._cut)
        await super().shutdown(sockets)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(house: House, desk: Desk, host: str, port: int) -> None:
    """Listen until told to stop (SIGTERM, Ctrl-C); answers on their way then have a few seconds. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    shown = f"[{host}]" if ":" in host else host
    settings = {"log_level": "warning", "lifespan": "off", "timeout_graceful_shutdown": 2 * GRACE}
    server = _Server(uvicorn.Config(application(house, desk, host), **settings), desk)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that goes away
    writer = threading.Thread(target=_write, args=(desk, server), name="engine")
    writer.start()
    log.info("serving %s at http://%s:%d/v1", house.name, shown, listener.getsockname()[1])
    try:
        server.run(sockets=[listener])
    finally:
        server.timer.cancel()
        desk.close()
        writer.join()


def _write(desk: Desk, server: uvicorn.Server) -> None:
    """The engine's thread: a server whose engine has failed goes, too."""
    try:
        desk.run()
    finally:
        server.should_exit = True
