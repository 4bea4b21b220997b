"""What a request offers: its tools, checked; and what `tool_choice` makes of the answer.

`required` and a named function are forced: the answer is JSON that a grammar holds to the tools' schemas, and is read
as the calls it stands for, whatever way of writing calls the model has learned.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.config.base import short_repr
from manyhands.serve.errors import wrong
from manyhands.serve.grammar import MOST_DEPTH, Grammar, compiled, shallow
from manyhands.serve.tools.calls import Call, Malformed, Schemas, call_of, loads
from manyhands.serve.tools.parser import Delta, deltas_of
from manyhands.text import Tokenizer

MOST_TOOLS = 128
MOST_CALLS = 8
"""In an answer that must call: else a small model calls without end."""
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True)
class Offer:
    """The tools of a request."""

    tools: list[dict[str, Any]]
    """As templates take them."""
    choice: str
    """`none`, `auto`, `required`, or the name of the one function."""
    parallel: bool = True

    @property
    def schemas(self) -> Schemas:
        """Of the parameters, by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.tools}

    @property
    def shown(self) -> list[dict[str, Any]]:
        """What the model is to see."""
        return [] if self.choice == "none" else self.tools

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice not in ("none", "auto")

    async def grammar(self, tokenizer: Tokenizer) -> Grammar | None:
        """What a forced answer is held to. Raises `ApiError` that names the tool whose schema is not served."""
        if not self.forced:
            return None
        if self.choice != "required":
            at = next(i for i, tool in enumerate(self.tools) if tool["function"]["name"] == self.choice)
            schema = {"type": "object", **self.schemas[self.choice]}
            return await compiled(tokenizer, json_schema=schema, param=f"tools[{at}].function.parameters")
        return await compiled(tokenizer, json_schema=self._any_calls(), param="tools")

    def _any_calls(self) -> dict[str, Any]:
        """A list of calls. Definitions that schemas refer to stand at the root, each under its tool's number."""
        definitions: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for at, (name, schema) in enumerate(self.schemas.items()):
            own = {"type": "object", **schema}
            for kind in ("$defs", "definitions"):
                inner = own.pop(kind, {})
                for key, value in inner.items() if isinstance(inner, Mapping) else ():
                    definitions[f"t{at}.{kind.lstrip('$')}.{key}"] = _moved(value, at)
            properties = {"name": {"const": name}, "parameters": _moved(own, at)}
            required = ["name", "parameters"]
            calls.append(
                {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
            )
        most = MOST_CALLS if self.parallel else 1
        schema = {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}}
        return {**schema, "$defs": definitions} if definitions else schema

    def forced_parser(self) -> "Forced":
        """Reads what the grammar forced."""
        return Forced(None if self.choice == "required" else self.choice)


class Forced:
    """A forced answer: the arguments of one function, or a list of calls."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._text = ""
        self._begun = False

    def feed(self, text: str) -> list[Delta]:
        """Of one function: its arguments as they come."""
        if self._name is None:
            self._text += text
            return []
        found: list[Delta] = []
        if not self._begun:
            self._begun = True
            found = deltas_of(Call(self._name, ""), 0)[:1]
        if text:
            found.append({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})
        return found

    def finish(self) -> list[Delta]:
        """The calls of a list; where it was cut, the whole ones of it."""
        if self._name is not None or not self._text:
            return []
        try:
            calls = [call_of(one) for one in loads(self._text)]
        except Malformed:
            return [{"content": self._text}]
        return [delta for at, call in enumerate(calls) for delta in deltas_of(call, at)]


def offer_of(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> Offer:
    """Raises `ApiError` 400 with the place of what is wrong."""
    checked = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools or ())]
    if len(checked) > MOST_TOOLS:
        raise wrong("tools", f"{len(checked)}; at most {MOST_TOOLS}")
    names = [tool["function"]["name"] for tool in checked]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise wrong(f"tools[{at}].function.name", f"{name!r} a second time")
    if choice is None:
        choice = "auto" if checked else "none"
    if isinstance(choice, Mapping):
        choice = _named(choice, names)
    elif choice not in ("none", "auto", "required"):
        raise wrong("tool_choice", f"expected none, auto, required or a function, found {short_repr(choice)}")
    elif choice != "none" and not checked:
        raise wrong("tool_choice", "there are no tools to choose from")
    return Offer(checked, choice, parallel is not False)


def _named(choice: Mapping[str, Any], names: list[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise wrong("tool_choice", "expected {type: function, function: {name: …}}")
    if name not in names:
        raise wrong("tool_choice.function.name", f"{name[:64]!r} is none of the tools: {', '.join(names) or 'none'}")
    return name


def _tool(tool: Any, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise wrong(place, f"expected an object with type and function, found {short_repr(tool)}")
    if tool.get("type", "function") != "function":
        raise wrong(f"{place}.type", f"{short_repr(tool.get('type'))} is not served; function is")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise wrong(f"{place}.function", f"expected an object with name and parameters, found {short_repr(function)}")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        what = f"expected 1 to 64 letters, digits, _, - or ., found {short_repr(name)}"
        raise wrong(f"{place}.function.name", what)
    if not isinstance(function.get("description") or "", str):
        raise wrong(f"{place}.function.description", "expected a text")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong(f"{place}.function.parameters", f"expected a JSON schema, found {short_repr(parameters)}")
    if parameters is not None and parameters.get("type", "object") != "object":
        raise wrong(f"{place}.function.parameters.type", "expected object")
    if not shallow(function):
        raise wrong(f"{place}.function", f"it nests deeper than {MOST_DEPTH} levels")
    return {"type": "function", "function": dict(function)}


def _moved(value: Any, at: int) -> Any:
    """A schema whose references lead to the root's definitions."""
    if isinstance(value, list):
        return [_moved(one, at) for one in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: _moved(inner, at) for key, inner in value.items()}
    reference = found.get("$ref")
    if isinstance(reference, str):
        for kind in ("$defs", "definitions"):
            if reference.startswith(f"#/{kind}/"):
                head = f"#/$defs/t{at}.{kind.lstrip('$')}."
                found["$ref"] = head + reference.removeprefix(f"#/{kind}/")
    return found
