"""Server-sent events: objects as `data:` lines as they come, a comment when nothing does, an error as the last one."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from manyhands.serve.errors import ApiError

PING = 15.0
"""Seconds of silence after which a comment says that the server is there: a prompt may take long."""
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def dumps(value: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event; with a name for the interfaces that name them."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + dumps(value) + b"\n\n"


async def respond(
    events: AsyncGenerator[bytes, None],
    last: bytes = DONE,
    failed: Callable[[ApiError], bytes] = lambda error: event(error.body()),
    left: Callable[[], Awaitable[None]] | None = None,
) -> StreamingResponse:
    """A response of these events. Raises what the first of them raises: that is still an answer with a status.

    `left` is called when the stream is over, however it ends.
    """
    try:
        first = await anext(events, None)
    except BaseException:
        await events.aclose()
        raise
    return _Stream(_with_pings(first, events, last, failed), events, left)


class _Stream(StreamingResponse):
    """One whose events are closed in any case, also when the client had gone before the first byte."""

    def __init__(
        self,
        sent: AsyncGenerator[bytes, None],
        events: AsyncGenerator[bytes, None],
        left: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__(sent, media_type="text/event-stream", headers=HEADERS)
        self._sent, self._events, self._left = sent, events, left

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._sent.aclose()
            await self._events.aclose()
            if self._left is not None:
                await self._left()


async def _with_pings(
    first: bytes | None, events: AsyncGenerator[bytes, None], last: bytes, failed: Callable[[ApiError], bytes]
) -> AsyncGenerator[bytes, None]:
    if first is None:
        yield last
        return
    yield first
    pending: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(events, None))
            while not (await asyncio.wait({pending}, timeout=PING))[0]:
                yield b": keepalive\n\n"
            found = pending.result()
            pending = None
            if found is None:
                break
            yield found
    except ApiError as error:
        yield failed(error)
        return
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
    if last:
        yield last
