"""Signatures as docs/api.md prints them: names and defaults, no types."""

import inspect
from operator import attrgetter
from typing import Any

from pydantic import BaseModel

import manyhands


def signature(path: str) -> str:
    """`Decoder.forward(ids, mask=None)` for a dotted path below `manyhands`; `self` is left out."""
    found = attrgetter(path)(manyhands)
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in ("self", "cls")]
    parts: list[str] = []
    for number, parameter in enumerate(parameters):
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        if keyword and (number == 0 or parameters[number - 1].kind is not parameter.KEYWORD_ONLY):
            parts.append("*")
        parts.append(parameter.name if parameter.default is parameter.empty else f"{parameter.name}={_text(parameter)}")
    return f"{path}({', '.join(parts)})"


def _text(parameter: inspect.Parameter) -> str:
    value: Any = parameter.default
    if repr(value) == "<factory>":  # of a dataclass
        return "…"
    return f"{type(value).__name__}()" if isinstance(value, BaseModel) else repr(value)


if __name__ == "__main__":  # what to paste
    for name in manyhands.__all__:
        if not issubclass(type(getattr(manyhands, name)), type) or not issubclass(getattr(manyhands, name), Exception):
            print(signature(name))
