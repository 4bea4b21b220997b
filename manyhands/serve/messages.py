"""`POST /v1/messages`, Anthropic's interface: its request as a chat request, and its errors.

    chat_body(body) -> body of /v1/chat/completions

What comes back is `message_events.py`. A last message of the assistant's is a beginning that the reply continues.
"""

from collections.abc import Mapping
from typing import Any

from manyhands.serve import shape
from manyhands.serve.errors import ApiError

_SAME = ("model", "top_p", "top_k")
_ROLES = ("user", "assistant", "system")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
OVERLOADED = 529
"""Anthropic's status for 503."""


def error(problem: ApiError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error in Anthropic's shape."""
    return OVERLOADED if problem.status == 503 else problem.status, error_body(problem.status, str(problem))


def error_body(status: int, message: str) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message"}}`."""
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that asks for the same. Raises `ApiError` 400 that names what is malformed or not served."""
    shape.name(_required(body, "model"), "model")
    chat = counted_body(body)
    chat["max_completion_tokens"] = shape.whole(_required(body, "max_tokens"), "max_tokens", 1)
    if body.get("temperature") is not None:
        chat["temperature"] = shape.number(body["temperature"], "temperature", 0, 1)
    if stops := shape.several(shape.given(body, "stop_sequences", []), "stop_sequences"):
        chat["stop"] = [shape.name(stop, f"stop_sequences[{at}]") for at, stop in enumerate(stops)]
    user = shape.record(shape.given(body, "metadata", {}), "metadata").get("user_id")
    if user is not None:
        chat["user"] = shape.text(user, "metadata.user_id")
    chat |= _format(body)
    if shape.flag(body.get("stream"), "stream", False):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return chat


def counted_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of the chat request its prompt is made of; all that `/v1/messages/count_tokens` is asked with."""
    chat = shape.kept(body, (*_SAME, *shape.OWN)) | _thinking(body) | tools(body)
    chat["messages"] = found = messages(body)
    if found[-1]["role"] == "assistant" and not found[-1].get("tool_calls"):
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat


def _required(body: Mapping[str, Any], field: str) -> Any:
    if body.get(field) is None:
        raise ApiError(400, f"{field}: this field is required", param=field)
    return body[field]


def messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Chat messages of `system` and `messages`."""
    found: list[dict[str, Any]] = []
    if words := _words(shape.given(body, "system", ""), "system", "\n\n"):
        found.append({"role": "system", "content": words})
    given = shape.several(_required(body, "messages"), "messages")
    if not given:
        raise shape.wrong("messages", "must not be empty")
    for at, message in enumerate(given):
        here = f"messages[{at}]"
        role = shape.choice(shape.record(message, here).get("role"), f"{here}.role", _ROLES)
        content, here = message.get("content"), f"{here}.content"
        if role == "system":
            found.append({"role": role, "content": _words(content, here, "\n\n")})
        elif role == "assistant":
            found.append(_said(content, here))
        else:
            found += _asked(content, here)
    if len(found) > 1 and found[-1] == {"role": "assistant", "content": ""}:  # an empty beginning
        found.pop()
    return found


def _blocks(content: Any, place: str) -> list[tuple[str, Mapping[str, Any], str]]:
    """Kind, block and place of each."""
    if isinstance(content, str):
        return [("text", {"type": "text", "text": content}, place)]
    found = []
    for at, block in enumerate(shape.several(content, place)):
        here = f"{place}[{at}]"
        found.append((shape.name(shape.record(block, here).get("type"), f"{here}.type"), block, here))
    return found


def _refused(kind: str, place: str) -> ApiError:
    return shape.wrong(f"{place}.type", f"{shape.short(kind)} is not served here; this server reads text")


def _words(content: Any, place: str, between: str = "") -> str:
    words = []
    for kind, block, here in _blocks(content, place):
        if kind != "text":
            raise _refused(kind, here)
        words.append(shape.text(block.get("text"), f"{here}.text"))
    return between.join(words)


def _asked(content: Any, place: str) -> list[dict[str, Any]]:
    """A user's message: results of tools are messages of their own, in the order of the blocks."""
    found: list[dict[str, Any]] = []
    for kind, block, here in _blocks(content, place):
        if kind == "tool_result":
            call_id = shape.name(block.get("tool_use_id"), f"{here}.tool_use_id")
            words = _words(shape.given(block, "content", ""), f"{here}.content")
            if shape.flag(block.get("is_error"), f"{here}.is_error", False):  # chat has no other place to say it
                words = f"Error: {words}"
            found.append({"role": "tool", "tool_call_id": call_id, "content": words})
        elif kind == "text":
            words = shape.text(block.get("text"), f"{here}.text")
            if found and found[-1]["role"] == "user":
                found[-1]["content"] += words
            else:
                found.append({"role": "user", "content": words})
        else:
            raise _refused(kind, here)
    if not found:
        raise shape.wrong(place, "must not be empty")
    return found


def _said(content: Any, place: str) -> dict[str, Any]:
    """A message of the assistant's: words, thoughts and calls."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for kind, block, here in _blocks(content, place):
        if kind == "text":
            message["content"] += shape.text(block.get("text"), f"{here}.text")
        elif kind == "thinking":
            thought = shape.text(block.get("thinking"), f"{here}.thinking")
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            arguments = shape.written(shape.record(block.get("input"), f"{here}.input"))
            call = {"name": shape.name(block.get("name"), f"{here}.name"), "arguments": arguments}
            entry = {"id": shape.name(block.get("id"), f"{here}.id"), "type": "function", "function": call}
            message.setdefault("tool_calls", []).append(entry)
        elif kind != "redacted_thinking":
            raise _refused(kind, here)
    return message


def tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """`tools`, `tool_choice` and `parallel_tool_calls` of the chat request."""
    offered: list[dict[str, Any]] = []
    for at, tool in enumerate(shape.several(shape.given(body, "tools", []), "tools")):
        here = f"tools[{at}]"
        kind = shape.record(tool, here).get("type") or "custom"
        if kind != "custom":
            raise shape.wrong(f"{here}.type", f"{shape.short(kind)} is not served; tools here are of type 'custom'")
        function: dict[str, Any] = {"name": shape.name(tool.get("name"), f"{here}.name")}
        function |= shape.kept(tool, ("description", "strict"))
        function["parameters"] = shape.record(tool.get("input_schema"), f"{here}.input_schema")
        offered.append({"type": "function", "function": function})
    chat: dict[str, Any] = {"tools": offered} if offered else {}
    if body.get("tool_choice") is None:
        return chat
    wanted = shape.record(body["tool_choice"], "tool_choice")
    kind = shape.choice(wanted.get("type"), "tool_choice.type", (*_CHOICES, "tool"))
    if shape.flag(wanted.get("disable_parallel_tool_use"), "tool_choice.disable_parallel_tool_use", False):
        chat["parallel_tool_calls"] = False
    if kind in ("any", "tool") and not offered:
        raise shape.wrong("tool_choice", f"{kind!r} needs tools")
    if kind == "tool":
        names = [tool["function"]["name"] for tool in offered]
        name = shape.choice(wanted.get("name"), "tool_choice.name", names)
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif offered:
        chat["tool_choice"] = _CHOICES[kind]
    return chat


def _thinking(body: Mapping[str, Any]) -> dict[str, Any]:
    """Thinking on or off, for templates with that switch. Without the field the template decides."""
    if body.get("thinking") is None:
        return {}
    wanted = shape.record(body["thinking"], "thinking").get("type")
    kinds = ("enabled", "disabled", "adaptive", "between_tools")
    thinks = shape.choice(wanted, "thinking.type", kinds) != "disabled"
    given = shape.record(shape.given(body, "chat_template_kwargs", {}), "chat_template_kwargs")
    return {"chat_template_kwargs": {"enable_thinking": thinks, **given}}


def _format(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = shape.record(shape.given(body, "output_config", {}), "output_config").get("format")
    if wanted is None:
        return {}
    here = "output_config.format"
    shape.choice(shape.record(wanted, here).get("type"), f"{here}.type", ("json_schema",))
    schema = shape.record(wanted.get("schema"), f"{here}.schema")
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}}
