"""The application: routes, who may use them, and every error as OpenAI's error object.

app = build(Models([...]), keys=[b"secret"])
"""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from manyhands.errors import ManyhandsError
from manyhands.serve import about, auth, chat, completions, limits, others, sse, unexpected
from manyhands.serve.errors import ApiError, as_api_error
from manyhands.serve.metrics import CONTENT_TYPE, Metrics
from manyhands.serve.models import Models
from manyhands.serve.origins import Origins
from manyhands.serve.served import Served
from manyhands.terminal import shown
from manyhands.version import __version__

log = logging.getLogger(__name__)
Body = dict[str, Any]
Whole = Callable[[Served, Body], Awaitable[Mapping[str, Any]]]
Stream = Callable[[Served, Body], AsyncGenerator[dict[str, Any], None]]
Endpoint = Callable[[Request], Awaitable[Response]]
ASKED_MOST = (
    "POST /v1/chat/completions, /v1/completions, /v1/responses (OpenAI's), /v1/messages (Anthropic's), GET /v1/models"
)
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build(
    models: Models,
    keys: Collection[bytes] = (),
    body_bytes: int = limits.BODY_BYTES,
    origins: Collection[str] = (),
    closed: bool = False,
) -> Starlette:
    """The ASGI application. Web pages of `origins` may ask, beside this machine's; `closed`: others are refused."""
    server = Server(models, keys, body_bytes)
    app = Starlette(
        routes=server.routes(),
        middleware=[Middleware(Origins, allowed=origins, closed=closed)],
        exception_handlers={HTTPException: server.not_here},
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


def reply(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(sse.dumps(value), status, headers, "application/json")


def error_reply(error: ApiError, path: str) -> Response:
    """An error as an answer, in the form of the interface that the path belongs to."""
    headers: dict[str, str] = {}
    if error.status in (429, 503):
        headers["Retry-After"] = "1" if error.status == 429 else "5"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"
    status, body = others.in_its_form(path, error)
    return reply(body, status, headers)


class Server:
    """The endpoints."""

    def __init__(self, models: Models, keys: Collection[bytes], body_bytes: int) -> None:
        self.models, self.keys, self.body_bytes = models, keys, body_bytes
        self.metrics = Metrics(models)
        self._page = _page()

    def routes(self) -> list[Route]:
        """All of them, each with `/v1` and without."""
        get: dict[str, Endpoint] = {
            "/health": self.health,
            "/models": self.list_models,
            "/models/{name:path}": self.one_model,
            "/metrics": self.metrics_text,
            "/version": self.version,
            "/routing": self.routing,
            "/tokenizer_info": self.tokenizer_info,
        }
        post: dict[str, Endpoint] = {
            "/completions": self.answering(completions.create, completions.stream),
            "/chat/completions": self.answering(chat.create, chat.stream),
            "/responses": self.answering(others.create_response, others.stream_response, named=True),
            "/messages": self.answering(others.create_message, others.stream_message, named=True),
            "/messages/count_tokens": self.answering(others.count_tokens, named=True),
            "/tokenize": self.answering(about.tokenize),
            "/detokenize": self.answering(about.detokenize),
        }
        routes = [Route("/", self.guarded(self.page), methods=["GET"])]
        for methods, endpoints in (("GET", get), ("POST", post)):
            for path, endpoint in endpoints.items():
                for prefix in ("/v1", ""):
                    routes.append(Route(prefix + path, self.guarded(endpoint), methods=[methods]))
        return routes

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """With the key checked, errors as answers, a line in the log; not for what is asked every second."""
        looked_at = (self.health, self.metrics_text, self.routing)

        async def call(request: Request) -> Response:
            begin = time.monotonic()
            response = await self._answer(endpoint, request)
            self.metrics.requests.labels(response.status_code).inc()
            took = 1000 * (time.monotonic() - begin)
            level = logging.DEBUG if endpoint in looked_at and response.status_code == 200 else logging.INFO
            log.log(level, "%s %d %.0f ms", _said(request), response.status_code, took)
            return response

        return call

    async def _answer(self, endpoint: Endpoint, request: Request) -> Response:
        try:
            limits.check_head(request)
            auth.check(request, self.keys)
            return await endpoint(request)
        except ApiError as error:
            problem = error
        except ManyhandsError as error:
            problem = as_api_error(error)
        except limits.Gone:
            problem = ApiError(499, "the client has closed the connection")
        except Exception as error:
            problem = unexpected.broken(error, _said(request))
        return error_reply(problem, request.scope["path"])

    def answering(self, create: Whole, stream: Stream | None = None, named: bool = False) -> Endpoint:
        """An endpoint that has a model make something of a JSON body. `named`: events have their type as a name."""

        async def call(request: Request) -> Response:
            body = await limits.read_object(request, self.body_bytes)
            async with contextlib.AsyncExitStack() as stack:
                served = await stack.enter_async_context(self.models.use(body.get("model")))
                if not named:
                    self.metrics.count_unknown(body)
                if stream is not None:
                    served.service.check()  # a template, a grammar, a long prompt cost time that there is none for
                if stream is None or body.get("stream") is not True:
                    return reply(await limits.while_there(request, _coroutine(create, served, body)))
                events = _events(stream(served, body), named)
                held = stack.pop_all()  # in use until the stream is over
                try:
                    response = sse.respond(events, b"" if named else sse.DONE, left=held.aclose)
                    return await limits.while_there(request, response)
                except BaseException:
                    await held.aclose()
                    raise

        return call

    async def not_here(self, request: Request, error: Exception) -> Response:
        """404 and 405 of the router."""
        assert isinstance(error, HTTPException)
        path, allowed = _path(request), (error.headers or {}).get("Allow", "")
        if error.status_code == 405:
            message, code = f"{request.method} {path}: the method here is {allowed}", "method_not_allowed"
        else:
            message, code = f"there is no {path} here; what is asked most: {ASKED_MOST}", "not_found"

        async def refuse(request: Request) -> Response:
            response = error_reply(ApiError(error.status_code, message, code=code), request.scope["path"])
            if allowed:
                response.headers["Allow"] = allowed
            return response

        return await self.guarded(refuse)(request)

    async def health(self, request: Request) -> Response:
        """200 while every engine is idle or moves."""
        bad = [served.name for served in self.models.loaded if not served.service.healthy]
        if bad:
            raise ApiError(503, f"the engine of {bad[0]} does not move", "unavailable_error", code="unhealthy")
        if self.models.stopping:
            raise ApiError(503, "the server is stopping", "unavailable_error", code="stopping")
        return reply({"status": "ok"})

    async def list_models(self, request: Request) -> Response:
        """`/v1/models`."""
        found = [about.model_object(entry, self.models) for entry in self.models.entries.values()]
        return reply({"object": "list", "data": found})

    async def one_model(self, request: Request) -> Response:
        """`/v1/models/{id}`."""
        return reply(about.model_object(self.models.entry(request.path_params["name"]), self.models))

    async def metrics_text(self, request: Request) -> Response:
        """`/metrics`."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, request: Request) -> Response:
        """`/version`."""
        return reply({"version": __version__})

    async def routing(self, request: Request) -> Response:
        """`/v1/routing`."""
        async with self.models.use(request.query_params.get("model")) as served:
            return reply(about.routing(served))

    async def tokenizer_info(self, request: Request) -> Response:
        """`/tokenizer_info`."""
        async with self.models.use(request.query_params.get("model")) as served:
            return reply(about.tokenizer_info(served))

    async def page(self, request: Request) -> Response:
        """`/`."""
        if self._page is None:
            return PlainTextResponse(f"manyhands {__version__}: see /v1/models\n")
        return HTMLResponse(self._page, headers=PAGE_HEADERS)


async def _coroutine(create: Whole, served: Served, body: Body) -> Mapping[str, Any]:
    return await create(served, body)


async def _events(chunks: AsyncGenerator[dict[str, Any], None], named: bool) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(unexpected.guarded(chunks)) as objects:
        async for value in objects:
            yield sse.event(value, value["type"] if named else None)


def _page() -> str | None:
    page = files("manyhands.serve") / "page.html"
    return page.read_text(encoding="utf-8") if page.is_file() else None


def _said(request: Request) -> str:
    """The request as the log has it: no query, no body, no control characters."""
    return f"{shown(request.method)[:16]} '{_path(request)}'"


def _path(request: Request) -> str:
    """As the router reads it: `request.url` is without some control characters."""
    path: str = request.scope["path"]
    return "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in path)[:200]
