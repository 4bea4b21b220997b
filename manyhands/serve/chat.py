"""`/v1/chat/completions`, and what `/v1/responses` and `/v1/messages` are made of.

    await create(served, body)             a chat.completion object
    async for chunk in stream(served, body)   chat.completion.chunk objects

Both are one thing: an answer is its chunks put together, so that a stream says what the whole says.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from manyhands.engine.answer import Token
from manyhands.serve.chat_request import ChatAsking, read
from manyhands.serve.choices import Head, Reading, new_head, push, reason_of
from manyhands.serve.entries import chat as chat_entries
from manyhands.serve.served import Served


async def create(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """The whole answer. Raises `ApiError`."""
    asking = await read(served, body)
    reading = Reading(served, asking, await served.ask(asking.asked))
    choices = [_Choice(reading, asking, number) for number in range(len(asking.asked))]
    async for number, token in reading.steps():
        choices[number].push(token)
    return {
        **new_head("chatcmpl", "chat.completion", served.name).fields(),
        "choices": [choice.whole() for choice in choices],
        "usage": reading.usage(),
        **reading.ledger(),
    }


async def stream(
    served: Served, body: Mapping[str, Any], usage_first: bool = False
) -> AsyncGenerator[dict[str, Any], None]:
    """Chunk by chunk. Raises `ApiError`, for what is wrong with the request before the first chunk.

    `usage_first`: the first one says what the prompt has, for an interface that begins with it.
    """
    asking = await read(served, body)
    reading = Reading(served, asking, await served.ask(asking.asked))
    head = new_head("chatcmpl", "chat.completion.chunk", served.name)
    choices = [_Choice(reading, asking, number) for number in range(len(asking.asked))]
    for number in range(len(choices)):
        first = _chunk(head, asking, number, {"role": "assistant", "content": None})
        yield first | {"usage": reading.usage_before()} if usage_first else first
    async for number, token in reading.steps():
        choice, extras = choices[number], reading.shown(token)
        logprobs, deltas = choice.push(token)
        if not deltas and (logprobs or extras):
            deltas = [{"content": ""}]
        for at, delta in enumerate(deltas):
            said = logprobs if at == 0 else None
            yield _chunk(head, asking, number, delta, said) | (extras if at == 0 else {})
        if token.finish_reason is not None:
            last = _chunk(head, asking, number, {}, reason=choice.reason(), more=reading.extras(number))
            yield last | reading.closing(token)
    if asking.request.usage_chunk:
        yield {**head.fields(), "choices": [], "usage": reading.usage()}


def _chunk(
    head: Head,
    asking: ChatAsking,
    number: int,
    delta: dict[str, Any],
    logprobs: list[dict[str, Any]] | None = None,
    reason: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    said = {"content": logprobs} if logprobs else None
    choice = {"index": number, "delta": delta, "logprobs": said, "finish_reason": reason, **(more or {})}
    return {**head.fields(), "choices": [choice], **({"usage": None} if asking.request.usage_chunk else {})}


class _Choice:
    """One of the answers, as it grows."""

    def __init__(self, reading: Reading, asking: ChatAsking, number: int) -> None:
        self.reading, self.asking, self.number = reading, asking, number
        self._parser = asking.new_parser()
        self._entries = reading.entries()
        self._logprobs: list[dict[str, Any]] = []
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: list[dict[str, Any]] = []

    def push(self, token: Token) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Log-probabilities and deltas of a token."""
        deltas = self._parser.feed(token.text)
        if token.finish_reason is not None:
            deltas = deltas + self._parser.finish()
        for delta in deltas:
            self._keep(delta)
        if not self.asking.wants_logprobs:
            return [], deltas
        logprobs = chat_entries(self.reading.served.tokenizer, push(self._entries, token))
        self._logprobs += logprobs
        return logprobs, deltas

    def _keep(self, delta: Mapping[str, Any]) -> None:
        for name, texts in self._texts.items():
            if delta.get(name):
                texts.append(delta[name])
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(self._calls):
                self._calls.append({"id": call["id"], "type": "function", "function": {"name": "", "arguments": []}})
            function = self._calls[call["index"]]["function"]
            function["name"] += call.get("function", {}).get("name") or ""
            function["arguments"].append(call.get("function", {}).get("arguments") or "")

    def reason(self) -> str:
        """Why it ended."""
        reason = reason_of(self.reading.submission(self.number))
        return "tool_calls" if self._calls and reason == "stop" else reason

    def whole(self) -> dict[str, Any]:
        """All of it."""
        content = "".join(self._texts["content"])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._texts["reasoning_content"]:
            message["reasoning_content"] = "".join(self._texts["reasoning_content"])
        if self._calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": "".join(call["function"]["arguments"])}}
                for call in self._calls
            ]
        return {
            "index": self.number,
            "message": message,
            "logprobs": {"content": self._logprobs} if self.asking.wants_logprobs else None,
            "finish_reason": self.reason(),
            **self.reading.extras(self.number),
        }
