"""What breaks in the server while an answer is made: in the log where, to the client that it did."""

import contextlib
import logging
import traceback
from collections.abc import AsyncGenerator
from typing import Any

from manyhands.serve.errors import ApiError

log = logging.getLogger(__name__)
Chunks = AsyncGenerator[dict[str, Any], None]


def broken(error: Exception, where: str) -> ApiError:
    """The answer to it, 500. What an error says may be a prompt: the log has only its kind and its place."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("%s in %s:\n%s", type(error).__name__, where, frames)
    return ApiError(500, f"{type(error).__name__} in the server", "server_error")


async def guarded(chunks: Chunks) -> Chunks:
    """The same chunks, and no error but `ApiError`; they are closed when this is."""
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
        except (ApiError, GeneratorExit):
            raise
        except Exception as error:
            raise broken(error, "a stream") from None
