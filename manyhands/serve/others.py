"""The newer interfaces, `/v1/responses` and `/v1/messages`: each is the chat's, translated both ways."""

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from manyhands.serve import chat, message_events, messages, response_events, responses
from manyhands.serve.chat_request import prompt_ids
from manyhands.serve.errors import ApiError
from manyhands.serve.protocol import ChatBody, parse
from manyhands.serve.served import Served

Body = Mapping[str, Any]
Events = AsyncGenerator[dict[str, Any], None]


async def create_response(served: Served, body: Body) -> dict[str, Any]:
    """A `response`. Raises `ApiError`."""
    return response_events.response(body, await chat.create(served, responses.chat_body(body)))


async def stream_response(served: Served, body: Body) -> Events:
    """Its events. Raises `ApiError`, for what is wrong with the request before the first."""
    async with contextlib.aclosing(chat.stream(served, responses.chat_body(body))) as chunks:
        async for event in response_events.events(body, chunks):
            yield event


async def create_message(served: Served, body: Body) -> dict[str, Any]:
    """A `message`. Raises `ApiError`."""
    return message_events.message(body, await chat.create(served, messages.chat_body(body)))


async def stream_message(served: Served, body: Body) -> Events:
    """Its events. Raises `ApiError`, for what is wrong with the request before the first."""
    async with contextlib.aclosing(chat.stream(served, messages.chat_body(body), usage_first=True)) as chunks:
        async for event in message_events.events(body, chunks):
            yield event


async def count_tokens(served: Served, body: Body) -> dict[str, Any]:
    """`/v1/messages/count_tokens`."""
    return {"input_tokens": len(await prompt_ids(served, parse(ChatBody, messages.counted_body(body))))}


def in_its_form(path: str, error: ApiError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as clients of this path read it."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["messages"] or parts[:2] == ["v1", "messages"]:
        return messages.error(error)
    return error.status, error.body()
