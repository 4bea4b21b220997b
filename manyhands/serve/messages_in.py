"""The messages of a chat request: checked, and as the model's template takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.config.base import short_repr
from manyhands.serve.errors import wrong

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def checked(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """For the template: developers are the system, parts of a text are one text. Raises `ApiError` with the place."""
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise wrong(place, f"expected an object with role and content, found {short_repr(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{place}.role", f"expected one of {', '.join(ROLES)}, found {short_repr(role)}")
    calls = _calls(message.get("tool_calls"), f"{place}.tool_calls")
    if calls and role != "assistant":
        raise wrong(f"{place}.tool_calls", "only the assistant calls tools")
    if "content" not in message and not calls:
        raise wrong(f"{place}.content", "this field is required")
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    found["content"] = _text(message.get("content"), f"{place}.content")
    if calls:
        found["tool_calls"] = calls
    for name in _KEPT:
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise wrong(f"{place}.{name}", f"expected a text, found {short_repr(message[name])}")
            found[name] = message[name]
    return found


def _text(content: Any, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(place, f"expected a text or a list of parts, found {short_repr(content)}")
    texts: list[str] = []
    for at, part in enumerate(content):
        here = f"{place}[{at}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal"):
            shown = short_repr(part if kind is None else kind)
            raise wrong(here, f"expected a part of type text, found {shown}: this server reads text only")
        text = part.get(kind)
        if not isinstance(text, str):
            raise wrong(f"{here}.{kind}", f"expected a text, found {short_repr(text)}")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise wrong(place, f"expected a list, found {short_repr(calls)}")
    found: list[dict[str, Any]] = []
    for at, call in enumerate(calls):
        here = f"{place}[{at}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise wrong(here, "expected {id, type: function, function: {name, arguments}}")
        if not isinstance(function.get("arguments", ""), str | dict):
            raise wrong(f"{here}.function.arguments", "expected JSON as text")
        kept = {"name": function["name"], "arguments": function.get("arguments", "{}")}
        found.append({"id": str(call.get("id", "")), "type": "function", "function": kept})
    return found
