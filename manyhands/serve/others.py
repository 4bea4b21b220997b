"""The newer interfaces, `/v1/responses` and `/v1/messages`: each is the chat's, translated both ways."""

import contextlib
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from manyhands.serve import chat, message_events, messages, response_events, responses
from manyhands.serve.chat_request import prompt_ids
from manyhands.serve.errors import ApiError
from manyhands.serve.protocol import ChatBody, parse
from manyhands.serve.served import Served
from manyhands.serve.unexpected import guarded

Body = Mapping[str, Any]
Events = AsyncGenerator[dict[str, Any], None]
Names = Sequence[tuple[str, str]]
RESPONSES: Names = (
    (r"messages\b.*", "input"),
    (r"max_completion_tokens", "max_output_tokens"),
    (r"response_format(\.json_schema)?", "text.format"),
    (r"(tools\[\d+\])\.function", r"\1"),
)
MESSAGES: Names = (
    (r"messages\b.*", "messages"),
    (r"max_completion_tokens", "max_tokens"),
    (r"response_format(\.json_schema)?", "output_config.format"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
    (r"stop\b", "stop_sequences"),
    (r"user\b", "metadata.user_id"),
)
"""What a chat request's fields are called in these interfaces. Places in its messages are those of a translation."""


async def create_response(served: Served, body: Body) -> dict[str, Any]:
    """A `response`. Raises `ApiError`."""
    with _named(RESPONSES):
        return response_events.response(body, await chat.create(served, responses.chat_body(body)))


async def stream_response(served: Served, body: Body) -> Events:
    """Its events. Raises `ApiError`, for what is wrong with the request before the first."""
    chunks = guarded(chat.stream(served, responses.chat_body(body)))
    async with contextlib.aclosing(chunks):
        with _named(RESPONSES):
            async for event in response_events.events(body, chunks):
                yield event


async def create_message(served: Served, body: Body) -> dict[str, Any]:
    """A `message`. Raises `ApiError`."""
    with _named(MESSAGES):
        return message_events.message(body, await chat.create(served, messages.chat_body(body)))


async def stream_message(served: Served, body: Body) -> Events:
    """Its events. Raises `ApiError`, for what is wrong with the request before the first."""
    chunks = guarded(chat.stream(served, messages.chat_body(body), usage_first=True))
    async with contextlib.aclosing(chunks):
        with _named(MESSAGES):
            async for event in message_events.events(body, chunks):
                yield event


async def count_tokens(served: Served, body: Body) -> dict[str, Any]:
    """`/v1/messages/count_tokens`."""
    with _named(MESSAGES):
        return {"input_tokens": len(await prompt_ids(served, parse(ChatBody, messages.counted_body(body))))}


@contextlib.contextmanager
def _named(names: Names) -> Iterator[None]:
    """Errors about a field of the chat request name the field that the client wrote."""
    try:
        yield
    except ApiError as error:
        place = error.param or ""
        for chat_name, name in names:
            theirs, found = re.subn(f"^{chat_name}", name, place)
            if found:
                break
        else:
            raise
        said = error.message.removeprefix(f"{place}: ")
        said = error.message if said == error.message else f"{theirs}: {said}"
        raise ApiError(error.status, said, error.type, theirs, error.code) from None


def in_its_form(path: str, error: ApiError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as clients of this path read it."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["messages"] or parts[:2] == ["v1", "messages"]:
        return messages.error(error)
    return error.status, error.body()
