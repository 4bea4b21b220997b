"""Web pages that may ask: a browser sends where a page is from, its `Origin`. Programs that are no browsers send none.

Without `--allow-origin` those are the server's own page and any other of this machine. A server that only this machine
reaches and that needs no key refuses other pages (403): whoever looks at one in a browser would else lend it the model.
Elsewhere the key decides, and the browser keeps an answer from a page that is not allowed (CORS).
"""

import logging
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from manyhands.errors import UserError
from manyhands.serve import others, sse
from manyhands.serve.errors import ApiError
from manyhands.terminal import shown

log = logging.getLogger(__name__)
_HERE = r"https?://(localhost|[\w-]+\.localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[::1\])(:\d{1,5})?"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


def origins(texts: Collection[str]) -> list[str]:
    """As a browser writes them. Raises `UserError` for what none would write."""
    found = [text.lower() for text in texts]
    for text, origin in zip(texts, found, strict=True):
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise UserError(
                f"--allow-origin {text}: expected SCHEME://HOST or SCHEME://HOST:PORT with nothing behind, as a "
                "browser writes it (https://chat.example.org), or * for every page"
            )
    return found


class Origins(CORSMiddleware):
    """Starlette's CORS; `closed`: what other pages send is refused, and not only kept from them."""

    def __init__(self, app: ASGIApp, allowed: Collection[str], closed: bool) -> None:
        super().__init__(app, allowed, ("GET", "POST"), ("*",), allow_origin_regex=_HERE)
        self.closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request of a page that may ask, or of no page, goes on."""
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or self.is_allowed_origin(origin) or not (self.closed or _asks_first(scope)):
            await super().__call__(scope, receive, send)
            return
        said = shown(origin)[:100]
        log.info("a web page of %s was refused; --allow-origin %s would let it ask", said, said)
        message = f"web pages of {said} may not ask here; start the server with --allow-origin {said}"
        error = ApiError(403, message, "permission_error", code="origin_not_allowed")
        status, body = others.in_its_form(scope["path"], error)
        await Response(sse.dumps(body), status, media_type="application/json")(scope, receive, send)


def _asks_first(scope: Scope) -> bool:
    """Whether it is the question that a browser asks before it sends a request of another place."""
    return bool(scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope))
