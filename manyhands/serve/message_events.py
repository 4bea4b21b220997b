"""What a chat request made, as `POST /v1/messages` answers: one `message` object, or its events while it is made.

    message(body, completion) -> the object                       (from a chat.completion)
    async for event in events(body, chunks): …                    (from chat.completion.chunk objects)

Both go through one `Writer`: a completion is a stream of one chunk. An event is an object whose `type` is also its
name in the stream.
"""

import base64
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from manyhands import strict_json
from manyhands.serve import shape
from manyhands.serve.errors import ApiError
from manyhands.serve.messages import error, error_body
from manyhands.serve.response_events import as_chunk

Event = dict[str, Any]


def message(body: Mapping[str, Any], completion: Mapping[str, Any]) -> dict[str, Any]:
    """The `message` object of a chat.completion that `chat_body(body)` asked for."""
    writer = Writer(body)
    writer.push(as_chunk(completion))
    writer.finish()
    return writer.message()


async def events(body: Mapping[str, Any], chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[Event]:
    """The events of a stream that `chat_body(body)` asked for.

    What fails before the first chunk is raised, so that it can still be answered with a status. Later an `ApiError`,
    or a chunk that is an error, ends the stream with the event `error`.
    """
    writer = Writer(body)
    try:
        async for chunk in chunks:
            if "error" in chunk:
                yield error_body(500, str(chunk["error"].get("message")))
                return
            for event in writer.push(chunk):
                yield event
    except ApiError as problem:
        if not writer.begun:
            raise
        yield error(problem)[1]
        return
    for event in writer.finish():
        yield event


class Writer:
    """Chunks in, events out. The reply's blocks come one after the other: thoughts, words, then each call."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.begun = False
        self._body = body
        self._id = ""
        self._model = ""
        self._blocks: list[dict[str, Any]] = []
        """Finished blocks, and the one being written. A call's input is its text until it ends."""
        self._open = False
        self._call: int | None = None
        """Which of the chat reply's tool calls the open block is."""
        self._finish: str | None = None
        self._stop: Any = None
        self._usage: Mapping[str, Any] = {}
        self._ours: dict[str, Any] = {}
        """Our own field, with the ledger of experts if it was asked for."""

    def push(self, chunk: Mapping[str, Any]) -> list[Event]:
        """The events of one chunk."""
        self._usage = chunk.get("usage") or self._usage
        self._ours |= shape.kept(chunk, ("manyhands",))
        events = [] if self.begun else self._begin(chunk)
        for one in chunk.get("choices") or []:
            delta = one.get("delta") or {}
            if thought := delta.get("reasoning_content"):
                events += self._piece("thinking", {"thinking": "", "signature": ""}, thought)
            if words := delta.get("content"):
                events += self._piece("text", {"text": ""}, words)
            for call in delta.get("tool_calls") or []:
                events += self._arguments(call)
            self._finish = one.get("finish_reason") or self._finish
            self._stop = one.get("stop_reason") or self._stop
        return events

    def finish(self) -> list[Event]:
        """The last events."""
        events = self._close()
        if not self._blocks:  # there is always something to read
            events += [*self._start("text", {"text": ""}), *self._close()]
        reason, stop = self._reason()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        events.append({"type": "message_delta", "delta": delta, "usage": _usage(self._usage), **self._ours})
        return [*events, {"type": "message_stop"}]

    def message(self) -> dict[str, Any]:
        """The whole, once it is finished."""
        reason, stop = self._reason()
        return self._message(self._blocks, reason, stop)

    def _begin(self, chunk: Mapping[str, Any]) -> list[Event]:
        self.begun = True
        self._id = "msg_" + str(chunk.get("id", "")).removeprefix("chatcmpl-")
        self._model = chunk.get("model", "")
        return [{"type": "message_start", "message": self._message([], None, None)}, {"type": "ping"}]

    def _message(self, blocks: list[dict[str, Any]], reason: str | None, stop: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(blocks),
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": _usage(self._usage),
            **self._ours,
        }

    def _reason(self) -> tuple[str, str | None]:
        """Why it ended, and the stop sequence if that is why."""
        if self._finish == "length":
            full = self._usage.get("completion_tokens", 0) < self._body["max_tokens"] and bool(self._usage)
            return "model_context_window_exceeded" if full else "max_tokens", None
        if any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use", None
        if isinstance(self._stop, str) and self._stop in (self._body.get("stop_sequences") or []):
            return "stop_sequence", self._stop
        return "end_turn", None

    def _piece(self, kind: str, empty: Mapping[str, Any], piece: str) -> list[Event]:
        """Thoughts (`thinking`) or words (`text`)."""
        events: list[Event] = []
        if not self._open or self._blocks[-1]["type"] != kind:
            events += [*self._close(), *self._start(kind, empty)]
        self._blocks[-1][kind] += piece
        return [*events, self._delta({"type": f"{kind}_delta", kind: piece})]

    def _arguments(self, call: Mapping[str, Any]) -> list[Event]:
        """A piece of a call; the first has its name."""
        events: list[Event] = []
        function = call.get("function") or {}
        if not self._open or self._call != call.get("index"):
            call_id = call.get("id") or f"toolu_{self._id}_{len(self._blocks)}"
            empty: dict[str, Any] = {"id": call_id, "name": function.get("name") or "", "input": {}}
            events += [*self._close(), *self._start("tool_use", empty)]
            self._blocks[-1]["input"], self._call = "", call.get("index")
        if piece := function.get("arguments"):
            self._blocks[-1]["input"] += piece
            events.append(self._delta({"type": "input_json_delta", "partial_json": piece}))
        return events

    def _start(self, kind: str, empty: Mapping[str, Any]) -> list[Event]:
        self._open = True
        self._blocks.append({"type": kind, **empty})
        return [{"type": "content_block_start", "index": self._at, "content_block": dict(self._blocks[-1])}]

    def _close(self) -> list[Event]:
        """End the open block, if there is one."""
        if not self._open:
            return []
        self._open, self._call = False, None
        block, events = self._blocks[-1], []
        if block["type"] == "tool_use":
            block["input"] = _input(block["input"])
        elif block["type"] == "thinking":
            block["signature"] = _signature(block["thinking"])
            events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        return [*events, {"type": "content_block_stop", "index": self._at}]

    @property
    def _at(self) -> int:
        return len(self._blocks) - 1

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._at, "delta": delta}


def _input(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments are; empty where the reply was cut in the middle of it."""
    try:
        value = strict_json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _signature(thought: str) -> str:
    """Clients expect one and drop thoughts without it. It is a checksum without a secret, never checked."""
    return base64.b64encode(hashlib.sha256(thought.encode("utf-8", "surrogatepass")).digest()).decode()


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Chat's usage under this interface's names: tokens found in the cache are not among `input_tokens`."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "output_tokens": usage.get("completion_tokens", 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }
