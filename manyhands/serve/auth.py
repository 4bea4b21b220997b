"""Who may ask: those with the key, compared in constant time."""

import hmac
from collections.abc import Collection, Sequence

from starlette.requests import Request

from manyhands.serve.errors import ApiError

OPEN = ("/health", "/")
"""Paths that need no key: whether the server lives, and the page, which asks for the key itself."""


def check(request: Request, keys: Collection[bytes]) -> None:
    """Raises `ApiError` 401 where a key is needed and none of them is there, as a bearer token or `x-api-key`."""
    if not keys or request.scope["path"] in OPEN:
        return
    given = _given([(name.lower(), value) for name, value in request.headers.raw])
    if given is None:
        raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", "authentication_error")
    right = False
    for key in keys:
        right |= hmac.compare_digest(key, given)
    if not right:
        raise ApiError(401, "the API key is wrong", "authentication_error", code="invalid_api_key")


def _given(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    values = dict(headers)
    kind, _, key = values.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer" and key:
        return key.strip()
    return values.get(b"x-api-key")
