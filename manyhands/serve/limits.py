"""What a client may send, and how long it may take to: bodies that are bounded, JSON that is strict."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from manyhands import strict_json
from manyhands.serve.errors import ApiError
from manyhands.terminal import shown

T = TypeVar("T")
BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0
"""For a whole body to arrive."""


HEADER_BYTES = 64 << 10
"""Of a request's head."""


class Gone(Exception):
    """The client has closed the connection: nobody reads an answer."""


def check_head(request: Request) -> None:
    """Raises `ApiError` 431 for headers that are too long, though they arrived all at once."""
    if sum(len(name) + len(value) + 4 for name, value in request.headers.raw) > HEADER_BYTES:
        raise ApiError(431, f"the headers are longer than {HEADER_BYTES >> 10} KiB", code="headers_too_large")


async def read_object(request: Request, most: int = BODY_BYTES) -> dict[str, Any]:
    """The body, a JSON object. Raises `ApiError` 400, 408, 413 or 415, `Gone`."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):  # a small body could stand for an endless one
        raise ApiError(415, f"Content-Encoding: {shown(coding)[:40]} is not read here; send the JSON as it is")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _read(request, most)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", code="timeout") from None
    try:
        body = strict_json.loads(data)
    except ValueError as error:
        raise ApiError(400, f"the body: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body: expected a JSON object, found {type(body).__name__}", code="invalid_json")
    return body


async def _read(request: Request, most: int) -> bytes:
    too_long = ApiError(413, f"the body is longer than {most} bytes", code="request_too_large")
    stated = request.headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > most:
        raise too_long
    found = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        found += message.get("body", b"")
        if len(found) > most:
            raise too_long
        if not message.get("more_body", False):
            return bytes(found)


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and `Gone` raised, when the client closes the connection."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
