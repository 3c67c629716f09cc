"""`minillama serve`: the OpenAI protocol over HTTP, and the chat page.

GET  /                       the page
GET  /health                 whether it answers, and how many wait
GET  /v1/models              models, adapters, and the models of other servers
POST /v1/chat/completions    answer a dialogue; as a stream of events, if asked for
POST /v1/completions         continue a text
POST /api/prompt             what a model would read: ids and pieces of a dialogue
     /api/conversations      what the page keeps (see `conversations`)

It binds to this machine alone, unless a token protects it.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from minillama.app.endpoints import Endpoint
from minillama.app.limits import Limits
from minillama.app.models import Job, ServedModel, closing
from minillama.app.protocol import (
    DONE,
    EVENTS,
    ApiError,
    ChatForm,
    CompletionForm,
    F,
    Reply,
    Token,
    as_json,
    check_limits,
    check_sizes,
    event,
    parse,
    parse_json,
    refusal,
    usage,
)
from minillama.config import known_name

log = logging.getLogger(__name__)
T = TypeVar("T")
PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEPT = "/api/conversations"
OPEN = ("/", "/health")  # without a token: they say nothing about anybody

# --- Who may ask, and how much -------------------------------------------------------------------


class Guard:
    """Stands before all routes: who may ask, how many at once, and how large a request may be.

    - A page of another site cannot ask: its Origin is foreign. Nor can it make this machine's
      address its own (DNS rebinding): `hosts` are the names under which the server answers, None
      is any.
    - With a `token`, only `OPEN` paths answer without "Authorization: Bearer TOKEN".
    - More than the limits allow is refused.
    - Browsers are told to guess no types and to load, frame and send nothing.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, token: str | None, hosts: Sequence[str] | None
    ) -> None:
        self.app, self.limits, self.token, self.hosts = app, limits, token, hosts
        self.n_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*HEADERS.items(), *message["headers"]]
            await send(message)

        kept = scope["path"].startswith(KEPT)
        max_body = self.limits.max_import if kept else self.limits.max_body
        counted = scope["method"] not in ("GET", "HEAD")
        self.n_requests += counted
        try:
            self._check(scope["path"], Headers(scope=scope))
            # What can end with an error of its own is given a little longer.
            async with asyncio.timeout(self.limits.max_seconds + 1):
                await self.app(scope, _Limited(receive, max_body, self.limits), guarded_send)
        except ApiError as error:
            await error_response(error)(scope, receive, guarded_send)
        except TimeoutError:
            if not started:
                await error_response(too_slow(self.limits))(scope, receive, guarded_send)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if started:
                raise
            await error_response(closing())(scope, receive, guarded_send)
        except Exception as error:
            if started:
                raise  # the connection ends without the end of the answer
            log.error("%s failed.", scope["path"], exc_info=error)
            await error_response(
                ApiError(500, f"The server failed ({type(error).__name__}). Its log says more.")
            )(scope, receive, guarded_send)
        finally:
            self.n_requests -= counted

    def _check(self, path: str, headers: Headers) -> None:
        """Raises ApiError for a request that is not to reach any route."""
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            raise ApiError(
                403,
                f"This server answers as {' or '.join(self.hosts)} only, so that no page of "
                f"another site can reach it under a name of its own.",
                "wrong_host",
            )
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "Pages of other sites may not ask this server.", "wrong_origin")
        if self.token is not None and path not in OPEN:
            scheme, _, given = headers.get("Authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self.token.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "This server needs its token: send it as the API key (Authorization: Bearer "
                    "TOKEN).",
                    "invalid_api_key",
                )
        if self.n_requests > self.limits.max_requests:
            raise ApiError(
                429,
                f"{self.limits.max_requests} requests are being answered already. Ask again soon.",
                "too_many_requests",
            )


class _Limited:
    """`receive`, but of a body that is neither too large nor too slow."""

    def __init__(self, receive: Receive, max_body: int, limits: Limits) -> None:
        self._receive, self._max_body, self._seconds = receive, max_body, limits.body_seconds
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self._n_bytes = 0
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits until the client goes
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408,
                f"The request did not come in within {self._seconds:g} seconds.",
                "timeout",
            ) from None
        self._n_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._n_bytes > self._max_body:
            raise ApiError(
                413,
                f"The body is larger than the {self._max_body:,} bytes that this server takes.",
                "body_too_large",
            )
        return message


def too_slow(limits: Limits) -> ApiError:
    return ApiError(
        503,
        f"The answer took more than the {limits.max_seconds:g} seconds that this server gives to a "
        f"request. Ask for fewer tokens (max_tokens).",
        "timeout",
    )


HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cache-control": b"no-store",
}


def content_policy(page: str) -> str:
    """Of the page: its own inline scripts and styles, known by their sums, and this server."""

    def sums(tag: str) -> str:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in inline)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {sums('script')}; style-src {sums('style')}; "
        f"connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'"
    )


def error_response(error: ApiError) -> Response:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 429:
        headers["Retry-After"] = "1"
    elif error.status >= 500:
        headers["x-should-retry"] = "false"  # clients of the protocol would, and wait as long again
    return json_response(error.body(), error.status, headers)


def json_response(
    value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(as_json(value), status, headers, "application/json")


def _hostname(host: str) -> str:
    """Of a Host header, without the port; empty for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Does this name or address mean this machine alone?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- Answers -------------------------------------------------------------------------------------


class Tidy:
    """An answer without white space behind it, in pieces: an end of it waits for what follows."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        text = self._held + piece
        certain = text.rstrip()
        self._held = text[len(certain) :]
        return certain


class Answer:
    """What a client gets for one job, whole or as a stream."""

    def __init__(
        self, form: ChatForm | CompletionForm, job: Job, deadline: float, limits: Limits
    ) -> None:
        self.form, self.job = form, job
        self._deadline, self._limits = deadline, limits
        self._chat = isinstance(form, ChatForm)
        self._reply = Reply(form.model, self._chat, form.stream)
        n_choices = len(job.requests)
        self._n_tokens = [0] * n_choices
        self._tidy = [Tidy() for _ in range(n_choices)]

    async def _news(self) -> AsyncIterator[tuple[int, str, Sequence[Token], str | None]]:
        """(choice, text, tokens, finish_reason) as they come. Raises ApiError when it is late."""
        updates = self.job.updates()
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    update = await anext(updates, None)
            except TimeoutError:
                raise too_slow(self._limits) from None
            if update is None:
                return
            self._n_tokens[update.index] = update.n_tokens
            text = self._tidy[update.index].push(update.text) if self._chat else update.text
            yield update.index, text, update.tokens, update.finish_reason

    def usage(self) -> dict[str, Any]:
        return usage(self.job.n_prompt, self.job.n_kept, sum(self._n_tokens))

    async def whole(self) -> Response:
        n_choices = len(self.job.requests)
        texts, ends = [""] * n_choices, [""] * n_choices
        tokens: list[list[Token]] = [[] for _ in range(n_choices)]
        async for index, text, more, finish_reason in self._news():
            texts[index] += text
            tokens[index] += more
            ends[index] = finish_reason or ""

        def response() -> Response:
            choices = [
                self._reply.choice(
                    index,
                    texts[index],
                    tokens[index] if self.form.wants_logprobs else None,
                    ends[index],
                )
                for index in range(n_choices)
            ]
            return json_response(self._reply.object(choices, self.usage()))

        return await asyncio.to_thread(response)  # with logprobs it may take a second

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events. What goes wrong is an event, too: the status has been sent."""
        for index in range(len(self.job.requests) if self._chat else 0):
            yield event(self._reply.object([self._reply.choice(index, "", None, None)]))
        held: list[list[Token]] = [[] for _ in self.job.requests]  # whose text is not certain yet
        try:
            async for index, text, more, finish_reason in self._news():
                held[index] += more
                if text or finish_reason:
                    tokens = held[index] if self.form.wants_logprobs else None
                    choice = self._reply.choice(index, text, tokens, finish_reason)
                    held[index] = []
                    yield event(self._reply.object([choice]))
            if self.form.stream_options.include_usage:
                yield event(self._reply.object([], self.usage()))
            yield DONE
        except ApiError as error:
            yield event(error.body())


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is given up when the client goes. Raises ApiError then."""
    task = asyncio.create_task(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client has gone.")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


# --- Routes --------------------------------------------------------------------------------------


async def until_sent() -> AsyncIterator[AsyncExitStack]:
    """What is entered here ends when the response was sent, or the client has gone."""
    async with AsyncExitStack() as stack:
        yield stack


Resources = Annotated[AsyncExitStack, Depends(until_sent)]


class Service:
    """What there is to ask: models by name, and other servers.

    Raises ValueError if two have the same name, or if there is nothing.
    """

    def __init__(
        self, models: Sequence[ServedModel], endpoints: Sequence[Endpoint], limits: Limits
    ) -> None:
        self.models = {model.name: model for model in models}
        self.endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        self.threads = {model.thread for model in models}
        self.limits = limits
        if not models and not endpoints:
            raise ValueError("There is nothing to serve: name a checkpoint, or an endpoint.")
        if len(self.models) < len(models) or len(self.endpoints) < len(endpoints):
            names = [*(model.name for model in models), *(each.name for each in endpoints)]
            raise ValueError(
                f"Clients choose by name, so every model, adapter and endpoint needs one of its "
                f"own; these are {', '.join(names)}."
            )

    async def answer(
        self, request: Request, resources: AsyncExitStack, kind: type[ChatForm | CompletionForm]
    ) -> Response:
        """The model's answer to a form of this kind, or what the server has that has the model."""
        deadline = asyncio.get_running_loop().time() + self.limits.max_seconds
        fields = parse_json(await request.body())
        if endpoint := self.elsewhere(fields.get("model")):
            check_sizes(fields, self.limits)
            path = request.url.path.removeprefix("/v1/")
            asking = resources.enter_async_context(endpoint.asking(path, fields))
            status, media_type, body = await unless_gone(request, asking)
            return StreamingResponse(body, status, media_type=media_type)
        form, model = self.read(fields, kind)
        requests = await asyncio.to_thread(model.requests, form, self.limits)
        try:
            job = await resources.enter_async_context(model.thread.answering(requests))
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from None
        answer = Answer(form, job, deadline, self.limits)
        if form.stream:
            unbuffered = {"X-Accel-Buffering": "no"}  # where nginx stands before this server
            return StreamingResponse(answer.stream(), headers=unbuffered, media_type=EVENTS)
        return await unless_gone(request, answer.whole())

    def read(self, fields: dict[str, Any], kind: type[F]) -> tuple[F, ServedModel]:
        """The form in these fields, and the model that it names. Raises ApiError."""
        form = parse(kind, fields)
        check_limits(form, self.limits)
        try:
            return form, self.models[known_name("model", form.model, self.models)]
        except ValueError as error:
            others = ", and of other servers: " * bool(self.endpoints) + ", ".join(
                f"{name}/..." for name in self.endpoints
            )
            said = f"{str(error).removesuffix('.')}{others}."
            raise ApiError(404, said, "model_not_found", "model") from None

    def elsewhere(self, model: Any) -> Endpoint | None:
        """The server that has this model, if it is another one."""
        if not isinstance(model, str) or model in self.models:
            return None
        name, slash, _ = model.partition("/")
        return self.endpoints.get(name) if slash else None

    def interrupt(self) -> None:
        """Tell all who wait that the server closes."""
        for thread in self.threads:
            thread.interrupt(closing())

    async def close(self) -> None:
        for thread in self.threads:
            await asyncio.to_thread(thread.close)
        for endpoint in self.endpoints.values():
            await endpoint.close()


def routes(service: Service, page: str) -> APIRouter:
    """The paths, and what answers there."""
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"])
    async def the_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": content_policy(page)})

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        n_open = sum(thread.n_open for thread in service.threads)
        return json_response({"status": "ok", "requests": n_open})

    async def listed() -> dict[str, Any]:
        cards = [model.card() for model in service.models.values()]
        others = (endpoint.models() for endpoint in service.endpoints.values())
        cards += chain.from_iterable(await asyncio.gather(*others))
        return {"object": "list", "data": cards}

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response(await listed())

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        for card in (await listed())["data"]:
            if card["id"] == name:
                return json_response(card)
        raise ApiError(404, f"There is no model {name!r}.", "model_not_found", "model")

    @router.post("/v1/chat/completions")
    async def chat(request: Request, resources: Resources) -> Response:
        return await service.answer(request, resources, ChatForm)

    @router.post("/v1/completions")
    async def complete(request: Request, resources: Resources) -> Response:
        return await service.answer(request, resources, CompletionForm)

    @router.post("/api/prompt")
    async def prompt(request: Request) -> Response:
        fields = parse_json(await request.body())
        if service.elsewhere(fields.get("model")):
            said = "What a model of another server reads is known to that server alone."
            raise ApiError(400, said, "not_here", "model")
        form, model = service.read(fields, ChatForm)
        return json_response(await asyncio.to_thread(model.shown, form, service.limits))

    return router


def create_app(
    models: Sequence[ServedModel],
    endpoints: Sequence[Endpoint] = (),
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
    conversations: APIRouter | None = None,
    page: Path = PAGE,
) -> FastAPI:
    """The server as an ASGI app; whoever runs it keeps it to this machine, or gives it a token.

    `hosts` are the names it answers to, None is any (see `Guard`). The models' threads end with the
    app's lifespan. Raises ValueError for a name twice, OSError if the page cannot be read.
    """
    limits = limits or Limits()
    service = Service(models, endpoints, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    # No schema and no documentation pages: theirs load scripts from elsewhere.
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(routes(service, page.read_text(encoding="utf-8")))
    if conversations is not None:
        app.include_router(conversations)
    app.add_middleware(Guard, limits=limits, token=token, hosts=hosts)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> Response:
        return error_response(refusal(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # from within the reading of a body
            return error_response(error.__cause__)
        said = f"{request.method} {request.url.path}: {error.detail}."
        response = error_response(ApiError(error.status_code, said))
        response.headers.update(error.headers or {})  # such as the methods that there are
        return response

    return app


# --- The server ----------------------------------------------------------------------------------


def hosts_of(host: str, token: str | None) -> Sequence[str] | None:
    """The names under which a server at this address answers; None is any (see `Guard`).

    Raises ValueError where an address that others can reach has no token, or one that is guessed.
    """
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("The token must consist of letters, digits and signs, without spaces.")
    if is_loopback(host):
        return LOOPBACK if host in LOOPBACK else (*LOOPBACK, host)
    if token is None or len(token) < 16:
        raise ValueError(
            f"{host or 'An empty --host'} can be reached by others, so the server needs a token "
            f"of 16 characters or more, for example MINILLAMA_TOKEN={secrets.token_urlsafe(24)} in "
            f"the environment. --host 127.0.0.1 is for this machine alone."
        )
    return None


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to. Raises OSError or ValueError, saying what to do."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}, but must be within 0 and 65535; 0 is any that is free.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"{host}:{port} cannot be served ({error}). Choose another --port; 0 is any that is "
            f"free."
        ) from None


def serve(app: FastAPI, listening: socket.socket, grace: float = 20.0) -> None:
    """Run the app until SIGTERM or Ctrl-C, and say where once it answers.

    Answers that are being written then have `grace` seconds; a second Ctrl-C does not wait.
    """
    # uvicorn raises SIGTERM again when it is done: as an exception, it lets the caller end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server_of(app, grace).run([listening])


def server_of(app: FastAPI, grace: float) -> "Server":
    """What `serve` runs; with `should_exit` it ends like with SIGTERM.

    Raises ValueError for a `grace` that is none.
    """
    if not 0 <= grace <= 86400:
        raise ValueError(f"grace is {grace} seconds, but must be within 0 and 86400 (a day).")
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace) + 3,
    )
    return Server(config, app.state.service, grace)


class Connection(H11Protocol):
    """A client's connection; it ends where the headers of a request do not come in time.

    Nor are more kept open than twice the requests that are taken: each of them takes a descriptor,
    and where a process has no more of these, nobody gets through.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limits: Limits = self.config.app.state.service.limits  # type: ignore[union-attr]
        if len(self.connections) > 2 * self._limits.max_requests:
            transport.abort()
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late:
            self._late.cancel()

    def _await_headers(self) -> None:
        """Give them so long, from their first byte on."""
        if self.conn.their_state is not h11.IDLE:
            if self._late:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(self._limits.body_seconds, self.transport.close)


class Server(uvicorn.Server):
    """Tells where it is, and has an end that does not cut off what is being written."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            others = (f"{name}/..." for name in self._service.endpoints)
            print(f"{', '.join([*self._service.models, *others])}: {at} (API: {at}/v1)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._service.interrupt)
        await super().shutdown(sockets)
