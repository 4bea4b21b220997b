"""Signatures as docs/api.md prints them: names and defaults, no types. `python tests/signatures.py` mends the page."""

import inspect
import re
import textwrap
from operator import attrgetter
from pathlib import Path
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
        name = f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        parts.append(name if parameter.default is parameter.empty else f"{name}={_text(parameter)}")
    return f"{path}({', '.join(parts)})"


def _text(parameter: inspect.Parameter) -> str:
    value: Any = parameter.default
    if repr(value) == "<factory>":  # of a dataclass
        return "…"
    return f"{type(value).__name__}()" if isinstance(value, BaseModel) else repr(value)


def rewrite(page: str) -> str:
    """The page with every signature as it is now, wrapped."""

    def block(found: re.Match[str]) -> str:
        paths = re.findall(r"^([A-Za-z_.]+)\(", found[1], re.MULTILINE)
        lines = [
            textwrap.fill(signature(path), 118, subsequent_indent=" " * (len(path) + 1), break_on_hyphens=False)
            for path in paths
        ]
        return "```text\n" + "\n".join(lines) + "\n```"

    return re.sub(r"```text\n(.+?)```", block, page, flags=re.DOTALL)


if __name__ == "__main__":  # mend the page
    path = Path(__file__).parent.parent / "docs" / "api.md"
    path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
