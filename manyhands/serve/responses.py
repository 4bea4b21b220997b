"""`POST /v1/responses`, OpenAI's newer interface: its request as a chat request.

    chat_body(body) -> body of /v1/chat/completions

What comes back is `response_events.py`. Nothing is stored: `store` is accepted and has no effect, and what would need
a stored response (`previous_response_id`, `conversation`, `background`, `item_reference`) is refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.serve import shape
from manyhands.serve.errors import ApiError

_STATEFUL = ("previous_response_id", "conversation", "prompt")
_SAME = ("model", "temperature", "top_p", "metadata", "parallel_tool_calls", "user", "stop", "top_k")
_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
_FORMATS = ("text", "json_object", "json_schema")
MOST_LOGPROBS = 20


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that asks for the same. Raises `ApiError` 400 that names what is malformed or not served."""
    for field in _STATEFUL:
        if body.get(field) is not None:
            raise _stateless(field)
    if shape.flag(body.get("background"), "background", False):
        raise _stateless("background")
    if body.get("truncation") is not None:
        shape.choice(body["truncation"], "truncation", ("auto", "disabled"))
    shape.record(shape.given(body, "metadata", {}), "metadata")
    chat = shape.kept(body, (*_SAME, *shape.OWN))
    chat["messages"] = messages(body)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = shape.whole(body["max_output_tokens"], "max_output_tokens", 1)
    chat |= _logprobs(body) | _format(body) | _effort(body) | tools(body)
    if shape.flag(body.get("stream"), "stream", False):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return chat


def _stateless(field: str) -> ApiError:
    return shape.wrong(field, "not served: this server keeps no responses; send the whole conversation in input")


def messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Chat messages of `instructions` and `input`. What the model did in one turn, its thoughts, words and calls, is
    one message."""
    given = body.get("input")
    if given is None:
        raise ApiError(400, "input: this field is required", param="input")
    if isinstance(given, str):
        found = [{"role": "user", "content": given}]
    else:
        found = []
        for at, item in enumerate(shape.several(given, "input")):
            _add(found, shape.record(item, f"input[{at}]"), f"input[{at}]")
    if not found:
        raise shape.wrong("input", "must not be empty")
    if body.get("instructions") is not None:
        words = shape.text(body["instructions"], "instructions")
        if found[0]["role"] in ("system", "developer"):  # templates read one system message, the first
            words = f"{words}\n\n{found.pop(0)['content']}"
        found.insert(0, {"role": "system", "content": words})
    return found


def _add(found: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = shape.choice(item.get("role"), f"{place}.role", ("user", "assistant", "system", "developer"))
        words = _words(item.get("content"), f"{place}.content")
        if role != "assistant":
            found.append({"role": role, "content": words})
            return
        turn = _turn(found)
        turn["content"] = (turn["content"] or "") + words
    elif kind == "reasoning":
        turn = _turn(found)
        thought = _words(item.get("content") or item.get("summary") or [], f"{place}.content")
        if thought:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
    elif kind == "function_call":
        call = {part: shape.text(item.get(part), f"{place}.{part}") for part in ("name", "arguments")}
        entry = {"id": shape.name(item.get("call_id"), f"{place}.call_id"), "type": "function", "function": call}
        _turn(found).setdefault("tool_calls", []).append(entry)
    elif kind == "function_call_output":
        words = _words(item.get("output"), f"{place}.output")
        call_id = shape.name(item.get("call_id"), f"{place}.call_id")
        found.append({"role": "tool", "tool_call_id": call_id, "content": words})
    elif kind == "item_reference":
        raise _stateless(f"{place}.type = 'item_reference'")
    else:
        raise shape.wrong(f"{place}.type", f"{shape.short(kind)} is not served; served are {_ITEMS}")


_ITEMS = "message, function_call, function_call_output, reasoning"


def _turn(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's turn that the conversation ends with; a new one where it does not."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": None})
    return found[-1]


def _words(content: Any, place: str) -> str:
    """The text of a string or of a list of parts."""
    if isinstance(content, str):
        return content
    words = []
    for at, part in enumerate(shape.several(content, place)):
        here = f"{place}[{at}]"
        kind = shape.record(part, here).get("type")
        if kind not in _TEXTS:
            raise shape.wrong(f"{here}.type", f"{shape.short(kind)} is not served; this server reads text")
        field = "refusal" if kind == "refusal" else "text"
        words.append(shape.text(part.get(field), f"{here}.{field}"))
    return "".join(words)


def tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """`tools` and `tool_choice` of the chat request."""
    offered = []
    for at, tool in enumerate(shape.several(shape.given(body, "tools", []), "tools")):
        here = f"tools[{at}]"
        kind = shape.record(tool, here).get("type")
        if kind != "function":
            raise shape.wrong(f"{here}.type", f"{shape.short(kind)} is not served; tools here are of type 'function'")
        shape.name(tool.get("name"), f"{here}.name")
        fields = shape.kept(tool, ("name", "description", "parameters", "strict"))
        offered.append({"type": "function", "function": fields})
    wanted = body.get("tool_choice")
    if isinstance(wanted, dict) and wanted.get("type") == "allowed_tools":
        offered, wanted = _allowed(wanted, offered)
    chat: dict[str, Any] = {"tools": offered} if offered else {}
    if isinstance(wanted, dict):
        if wanted.get("type") != "function":
            kind = shape.short(wanted.get("type"))
            raise shape.wrong("tool_choice.type", f"{kind} is not served; served are function, allowed_tools")
        name = _offered(wanted.get("name"), "tool_choice.name", offered)
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif wanted is not None:
        shape.choice(wanted, "tool_choice", ("none", "auto", "required"))
        if wanted == "required" and not offered:
            raise shape.wrong("tool_choice", "'required' needs tools")
        if offered:
            chat["tool_choice"] = wanted
    return chat


def _allowed(wanted: Mapping[str, Any], offered: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The tools that may be called, and auto or required."""
    names = set()
    for at, tool in enumerate(shape.several(wanted.get("tools"), "tool_choice.tools")):
        here = f"tool_choice.tools[{at}]"
        names.add(_offered(shape.record(tool, here).get("name"), f"{here}.name", offered))
    mode = shape.choice(wanted.get("mode"), "tool_choice.mode", ("auto", "required"))
    return [tool for tool in offered if tool["function"]["name"] in names], mode


def _offered(name: Any, place: str, offered: Sequence[Mapping[str, Any]]) -> str:
    names = [tool["function"]["name"] for tool in offered]
    return shape.choice(name, place, names) if names else _no_tools(place)


def _no_tools(place: str) -> str:
    raise shape.wrong(place, "there are no tools to choose from")


def _format(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = shape.record(shape.given(body, "text", {}), "text").get("format")
    if wanted is None:
        return {}
    kind = shape.choice(shape.record(wanted, "text.format").get("type"), "text.format.type", _FORMATS)
    if kind != "json_schema":
        return {"response_format": {"type": kind}}
    shape.name(wanted.get("name"), "text.format.name")
    shape.record(wanted.get("schema"), "text.format.schema")
    schema = shape.kept(wanted, ("name", "description", "schema", "strict"))
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    extra = shape.several(shape.given(body, "include", []), "include")
    if body.get("top_logprobs") is None:
        return {"logprobs": True} if "message.output_text.logprobs" in extra else {}
    best = shape.whole(body["top_logprobs"], "top_logprobs", 0, MOST_LOGPROBS)
    return {"logprobs": True, "top_logprobs": best}


def _effort(body: Mapping[str, Any]) -> dict[str, Any]:
    effort = shape.record(shape.given(body, "reasoning", {}), "reasoning").get("effort")
    return {} if effort is None else {"reasoning_effort": shape.name(effort, "reasoning.effort")}
