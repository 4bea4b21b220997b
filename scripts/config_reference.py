"""Write docs/configuration.md: every field of a run, its default, what it may be, what it does; from the descriptions.

`python scripts/config_reference.py`
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manyhands.config import RunConfig

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
KINDS = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
BOUNDS = {"ge": "≥", "gt": ">", "lt": "<"}
HEAD = """# Every field of a run

What a run file and `section.field=value` may say; [training.md](training.md) is the guide. An unknown field, or a value
that is not allowed, is refused with the nearest name. `python scripts/config_reference.py` writes this page.
"""


def sections(config: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted path, class) of every description in a run, in order."""
    yield path, config
    for name, field in config.model_fields.items():
        for inner in [field.annotation, *get_args(field.annotation)]:
            inner = getattr(inner, "__origin__", inner) if hasattr(inner, "__metadata__") else inner
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                yield from sections(inner, f"{path}.{name}" if path else name)


def heading(path: str, config: type[BaseModel]) -> str:
    """Of a section; a model of another kind than a decoder says so in the file, and a tuning its method."""
    if "method" in config.model_fields:
        return f"## `{path}` with `method: {config.model_fields['method'].default}`"
    kind = config.model_fields["kind"].default if path == "model" else "decoder"
    return (
        f"## `{path}` with `kind: {kind}`"
        if kind != "decoder"
        else f"## `{path}`"
        if path
        else "## The top of the file"
    )


def documents(config: type[BaseModel]) -> dict[str, str]:
    """Field -> the text that stands below it in the source."""
    body = ast.parse(inspect.getsource(config).lstrip()).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def allowed(annotation: Any, metadata: list[Any]) -> str:
    """`a`, `b`, or a kind with its bounds, for people."""
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if get_origin(annotation) in (Union, UnionType):
        every = dict.fromkeys("null" if part is type(None) else allowed(part, []) for part in inside)
        return " or ".join(every)
    if hasattr(annotation, "__metadata__"):  # of one part of a union
        nested = [m for m in annotation.__metadata__ for m in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return allowed(annotation.__origin__, nested)
    if get_origin(annotation) is tuple:
        return "a list"
    bounds = [(sign, getattr(m, name)) for name, sign in BOUNDS.items() for m in metadata if hasattr(m, name)]
    limits = [f"{sign} {bound:g}" for sign, bound in bounds if abs(bound) < 1e6]
    return " ".join([KINDS.get(annotation, "a section"), *limits])


def default(field: FieldInfo) -> str:
    """As YAML has it; a section has fields of its own."""
    value = field.default
    if isinstance(value, BaseModel) or field.is_required():
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(repr, value))}]`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def page() -> str:
    """The whole text."""
    parts, seen = [HEAD], set()
    for path, config in sections(RunConfig):
        if config in seen:  # the router of another kind of model
            continue
        seen.add(config)
        told = documents(config)
        lines = [heading(path, config), ""]
        lines += [inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].replace("\n", " "), ""]
        lines += ["| field | default | may be | |", "|---|---|---|---|"]
        for name, field in config.model_fields.items():
            cells = [f"`{name}`", default(field), allowed(field.annotation, field.metadata), told.get(name, "")]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
