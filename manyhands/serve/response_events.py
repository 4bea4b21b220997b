"""What a chat request made, as `POST /v1/responses` answers: one `response` object, or its events while it is made.

    response(body, completion) -> the object                      (from a chat.completion)
    async for event in events(body, chunks): …                    (from chat.completion.chunk objects)

Both go through one `Writer`: a completion is a stream of one chunk. An event is an object whose `type` is also its
name in the stream; its `sequence_number` counts from 0.
"""

import copy
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from manyhands.serve import shape
from manyhands.serve.errors import ApiError

Event = dict[str, Any]

_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "reasoning", "temperature", "top_p", "user")


def response(body: Mapping[str, Any], completion: Mapping[str, Any]) -> dict[str, Any]:
    """The `response` object of a chat.completion that `chat_body(body)` asked for."""
    writer = Writer(body)
    writer.push(as_chunk(completion))
    done: dict[str, Any] = writer.finish()[-1]["response"]
    return done


async def events(body: Mapping[str, Any], chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[Event]:
    """The events of a stream that `chat_body(body)` asked for.

    What fails before the first chunk is raised, so that it can still be answered with a status. Later an `ApiError`,
    or a chunk that is an error, ends the stream with the events `error` and `response.failed`.
    """
    writer = Writer(body)
    try:
        async for chunk in chunks:
            if "error" in chunk:
                for event in writer.fail(chunk["error"]):
                    yield event
                return
            for event in writer.push(chunk):
                yield event
    except ApiError as error:
        if not writer.begun:
            raise
        failed = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
        for event in writer.fail(failed):
            yield event
        return
    for event in writer.finish():
        yield event


def as_chunk(completion: Mapping[str, Any]) -> dict[str, Any]:
    """A chat.completion as the one chunk of a stream."""
    choices = []
    for one in completion["choices"][:1]:
        message = dict(one["message"])
        message["tool_calls"] = [{"index": at, **call} for at, call in enumerate(message.get("tool_calls") or [])]
        entries = _of_words((one.get("logprobs") or {}).get("content") or [], message.get("content") or "")
        choices.append({**one, "delta": message, "logprobs": {"content": entries}})
    return {**completion, "choices": choices}


def _of_words(entries: list[Any], words: str) -> list[Any]:
    """Those tokens of a reply that its words are made of, not its thoughts or calls."""
    spelled = [bytes(entry.get("bytes") or ()) for entry in entries]
    first = b"".join(spelled).rfind(words.encode("utf-8", "surrogatepass")) if words else -1
    if first < 0:
        return entries if words else []
    ends, last = list(itertools.accumulate(map(len, spelled))), first + len(words.encode("utf-8", "surrogatepass"))
    return [entry for entry, piece, end in zip(entries, spelled, ends, strict=True) if first < end < last + len(piece)]


class Writer:
    """Chunks in, events out. The reply's items come one after the other: thoughts, words, then each call."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.begun = False
        self._body = body
        self._id = ""
        self._model = ""
        self._created = 0
        self._count = 0
        self._output: list[dict[str, Any]] = []
        """Finished items, and the one being written."""
        self._call: int | None = None
        """Which of the chat reply's tool calls the open item is."""
        self._open = False
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text has not come yet."""
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._ours: dict[str, Any] = {}
        """Our own field, with the ledger of experts if it was asked for."""

    def push(self, chunk: Mapping[str, Any]) -> list[Event]:
        """The events of one chunk."""
        events = [] if self.begun else self._begin(chunk)
        self._usage = chunk.get("usage") or self._usage
        self._ours |= shape.kept(chunk, ("manyhands",))
        for one in chunk.get("choices") or []:
            delta = one.get("delta") or {}
            self._keep_logprobs((one.get("logprobs") or {}).get("content") or [], delta)
            if thought := delta.get("reasoning_content"):
                events += self._text("reasoning", thought)
            if words := delta.get("content"):
                events += self._text("message", words)
            for call in delta.get("tool_calls") or []:
                events += self._arguments(call)
            self._finish = one.get("finish_reason") or self._finish
        return events

    def finish(self) -> list[Event]:
        """The last events; the last of all has the whole `response`."""
        cut = self._finish == "length"
        events = self._close("incomplete" if cut else "completed")
        if not self._output:  # there is always something to read
            events += self._start(_message(self._item_id("msg")))
            events += self._close("incomplete" if cut else "completed")
        status = "incomplete" if cut else "completed"
        return [*events, self._event(f"response.{status}", response=self._response(status))]

    def fail(self, error: Mapping[str, Any]) -> list[Event]:
        """The events of a stream that cannot go on."""
        events = self._close("incomplete")
        code = "rate_limit_exceeded" if error.get("code") == "rate_limit_exceeded" else "server_error"
        about = {"code": error.get("code"), "message": error.get("message"), "param": error.get("param")}
        failed = self._response("failed") | {"error": {"code": code, "message": error.get("message")}}
        events.append(self._event("error", **about, error=dict(error)))
        return [*events, self._event("response.failed", response=failed)]

    def _keep_logprobs(self, entries: list[Any], delta: Mapping[str, Any]) -> None:
        """Keep a chunk's for the words they belong to, which may come later; thoughts and calls have none here."""
        if not delta.get("content") and (delta.get("reasoning_content") or delta.get("tool_calls")):
            self._logprobs.clear()
        else:
            self._logprobs += map(_logprob, entries)

    def _begin(self, chunk: Mapping[str, Any]) -> list[Event]:
        self.begun = True
        self._id = str(chunk.get("id", "")).removeprefix("chatcmpl-")
        self._model, self._created = chunk.get("model", ""), chunk.get("created") or int(time.time())
        names = ("response.created", "response.in_progress")
        return [self._event(name, response=self._response("in_progress")) for name in names]

    def _text(self, kind: str, piece: str) -> list[Event]:
        """Thoughts (`reasoning`) or words (`message`)."""
        events: list[Event] = []
        if not self._open or self._output[-1]["type"] != kind:
            events += self._close("completed")
            item = _message(self._item_id("msg")) if kind == "message" else _reasoning(self._item_id("rs"))
            events += self._start(item)
        item = self._output[-1]
        item["content"][0]["text"] += piece
        more = {}
        if kind == "message":
            more["logprobs"], self._logprobs = self._logprobs, []
            item["content"][0]["logprobs"] += more["logprobs"]
        name = "output_text" if kind == "message" else "reasoning_text"
        return [*events, self._part_event(f"response.{name}.delta", delta=piece, **more)]

    def _arguments(self, call: Mapping[str, Any]) -> list[Event]:
        """A piece of a call; the first has its name."""
        events: list[Event] = []
        function = call.get("function") or {}
        if not self._open or self._call != call.get("index"):
            events += self._close("completed")
            events += self._start(
                {
                    "id": self._item_id("fc"),
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": call.get("id") or self._item_id("call"),
                    "name": function.get("name") or "",
                    "arguments": "",
                }
            )
            self._call = call.get("index")
        if piece := function.get("arguments"):
            self._output[-1]["arguments"] += piece
            events.append(self._item_event("response.function_call_arguments.delta", delta=piece))
        return events

    def _start(self, item: dict[str, Any]) -> list[Event]:
        self._open = True
        self._output.append(item)
        content = item.pop("content", None)
        shown = item if content is None else {**item, "content": []}
        events = [self._event("response.output_item.added", output_index=self._at, item=dict(shown))]
        if content is not None:
            item["content"] = content
            events.append(self._part_event("response.content_part.added", part=copy.deepcopy(content[0])))
        return events

    def _close(self, status: str) -> list[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return []
        self._open, self._call = False, None
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            about = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._item_event("response.function_call_arguments.done", **about)]
        else:
            part = dict(item["content"][0])
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            events = [
                self._part_event(f"response.{part['type']}.done", text=part["text"], **more),
                self._part_event("response.content_part.done", part=part),
            ]
        return [*events, self._event("response.output_item.done", output_index=self._at, item=dict(item))]

    @property
    def _at(self) -> int:
        return len(self._output) - 1

    def _item_id(self, kind: str) -> str:
        return f"{kind}_{self._id}_{len(self._output)}"

    def _part_event(self, type: str, **fields: Any) -> Event:
        return self._item_event(type, content_index=0, **fields)

    def _item_event(self, type: str, **fields: Any) -> Event:
        return self._event(type, item_id=self._output[-1]["id"], output_index=self._at, **fields)

    def _event(self, type: str, **fields: Any) -> Event:
        self._count += 1
        return {"type": type, "sequence_number": self._count - 1, **fields}

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": [dict(item) for item in self._output],
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "store": False,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_logprobs": body.get("top_logprobs") or 0,
            "truncation": "disabled",
            "usage": _usage(self._usage) if self._usage and status != "in_progress" else None,
            **{field: body.get(field) for field in _ECHOED},
            **self._ours,
        }


def _message(id: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": id, "type": "message", "status": "in_progress", "role": "assistant", "content": [part]}


def _reasoning(id: str) -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": ""}
    return {"id": id, "type": "reasoning", "status": "in_progress", "summary": [], "content": [part]}


def _logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A token of chat's `logprobs.content`."""
    best = [{field: one.get(field) for field in ("token", "logprob", "bytes")} for one in entry["top_logprobs"]]
    return {**{field: entry.get(field) for field in ("token", "logprob", "bytes")}, "top_logprobs": best}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Chat's usage under this interface's names."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
    }
