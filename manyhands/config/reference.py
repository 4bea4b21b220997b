"""What each field of a run is by default, what it may be, what it does and where that comes from: for people who ask.

All of it is read off the descriptions themselves: a field's text is the one below it in the source.
"""

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manyhands.config.nearest import OTHER_NAMES, nearest
from manyhands.config.run import RunConfig
from manyhands.config.walk import Place, places

KINDS = {int: "integer", float: "number", str: "text"}
BOUNDS = {"ge": "≥", "gt": ">", "lt": "<", "le": "≤"}
_SOURCE = re.compile(r"arXiv \d{4}\.\d{4,5}|Shazeer et al\. \d{4}")


@dataclass(frozen=True, slots=True)
class Told:
    """One field, for a person."""

    field: str
    """Its path: `model.moe.router.score`."""
    only: str
    """`kind: recurrent` where only descriptions of that kind have it here; else empty."""
    default: str
    """As YAML has it; empty for a section and for a field that has none."""
    may_be: str
    description: str
    sources: tuple[str, ...]
    """Papers that the description names."""
    section: bool


def everything() -> list[Told]:
    """Every field of a run, in order; those of the second kind of model after all of the first's."""
    return list({(told.field, told.only): told for told in map(_told, places(RunConfig))}.values())


def find(name: str) -> list[Told]:
    """The fields that `name` is: a path, the last part of one, or another framework's name for one.

    A section brings what is in it. Empty if there is no such field.
    """
    every = everything()
    exact = [told for told in every if told.field == name]
    if not exact:
        wanted = {name, OTHER_NAMES.get(name, name)}
        exact = [told for told in every if told.field.rpartition(".")[2] in wanted or told.field.endswith(f".{name}")]
    if len({told.field for told in exact}) == 1 and exact[0].section:
        return [*exact, *(told for told in every if told.field.startswith(exact[0].field + "."))]
    return exact


def not_found(name: str) -> str:
    """What to say where `find` finds nothing."""
    return f"unknown field {name!r}; " + nearest(RunConfig, name.rpartition(".")[2], RunConfig, "")


def _told(place: Place) -> Told:
    text = documents(place.owner).get(place.leaf, "")
    if place.section and not text:
        inner = place.info.default if isinstance(place.info.default, BaseModel) else None
        text = _first(type(inner)) if inner is not None else ""
    return Told(
        field=place.path,
        only=place.only,
        default=default(place.info),
        may_be=allowed(place.info.annotation, place.info.metadata),
        description=text,
        sources=tuple(dict.fromkeys(_SOURCE.findall(text))),
        section=place.section,
    )


def _first(config: type[BaseModel]) -> str:
    """The first paragraph of what a description says of itself, in one line."""
    return inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].replace("\n", " ")


@cache
def documents(config: type[BaseModel]) -> dict[str, str]:
    """Field -> the text that stands below it in the source, of the class or of one that it inherits from."""
    found: dict[str, str] = {}
    for base in config.__mro__[1:]:
        if issubclass(base, BaseModel) and base.__module__.startswith("manyhands."):
            found = {**documents(base), **found}
    body = ast.parse(inspect.getsource(config).lstrip()).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def allowed(annotation: Any, metadata: list[Any], quote: str = "") -> str:
    """The values, each between two of `quote`, or a kind with its bounds."""
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"{quote}{value}{quote}" for value in inside)
    if get_origin(annotation) in (Union, UnionType):
        every = dict.fromkeys("null" if part is type(None) else allowed(part, [], quote) for part in inside)
        return " or ".join(every)
    if hasattr(annotation, "__metadata__"):  # of one part of a union
        nested = [m for m in annotation.__metadata__ for m in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return allowed(annotation.__origin__, nested, quote)
    if get_origin(annotation) is tuple:
        return "a list"
    if annotation is bool:
        return f"{quote}true{quote}, {quote}false{quote}"
    bounds = [(sign, getattr(m, name)) for name, sign in BOUNDS.items() for m in metadata if hasattr(m, name)]
    limits = [f"{sign} {bound:g}" for sign, bound in bounds if abs(bound) < 1e6]
    return " ".join([KINDS.get(annotation, "a section"), *limits])


def default(field: FieldInfo) -> str:
    """As YAML has it; a section has fields of its own."""
    value = field.default
    if isinstance(value, BaseModel) or field.is_required():
        return ""
    if isinstance(value, tuple):
        return f"[{', '.join(map(repr, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
