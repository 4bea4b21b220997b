"""What is wrong with a description, in one line: the field, its value, what is allowed, the nearest valid name."""

import difflib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from manyhands.config.nearest import nearest
from manyhands.config.walk import classes_in, places, tag_of

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def one_line(cls: type[BaseModel], error: ValidationError) -> str:
    """About the first thing that is wrong, and how many more there are."""
    problems = error.errors(include_url=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _said(cls, problems[0]) + more


def _said(cls: type[BaseModel], problem: ErrorDetails) -> str:
    parts, parent = _walk(cls, problem["loc"])
    path, kind, about = ".".join(parts), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        tag = tag_of(parent) if parent is not None else None
        of_kind = f" with {tag[0]}: {tag[1]}" if tag is not None and any(p.path == path for p in places(cls)) else ""
        return f"unknown field {path!r}{of_kind}; " + nearest(cls, parts[-1], parent, ".".join(parts[:-1]))
    if kind in ("union_tag_not_found", "union_tag_invalid"):  # one of several classes, by a field's value
        tag = about["discriminator"].strip("'")
        known = about.get("expected_tags") or ", ".join(f"'{name}'" for name in _tags(cls, parts, tag))
        return f"{path}.{tag}: " + (
            f"{about['tag']!r} is none of {known}" if "tag" in about else f"which of {known} is it?"
        )
    if kind == "missing":
        return f"{path}: this field is required"
    message = _OURS[kind](about) if kind in _OURS else problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if kind == "literal_error" and isinstance(problem["input"], str):
        allowed = [part.strip("' ") for part in about["expected"].replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(problem["input"], allowed, n=1)
        message = (f"did you mean {close[0]!r}? " if close else "") + message
    if kind in ("tuple_type", "list_type") and isinstance(problem["input"], str):
        message += f", like [{short_repr(problem['input'])}]"
    if not path:  # a rule about several fields; its own message names them
        return message
    return f"{path} = {short_repr(problem['input'])}: {message}"


def _items(count: int) -> str:
    return f"{count} item" + ("s" if count != 1 else "")


def _expected(what: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda _: f"expected {what}"


_INTEGER, _NUMBER, _FLAG, _TEXT, _LIST = (
    _expected(what) for what in ("an integer", "a number", "true or false", "text", "a list")
)
_SECTION = _expected("a section, which has fields of its own")
_OURS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing", "int_parsing_size"), _INTEGER),
    **dict.fromkeys(("float_type", "float_parsing"), _NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), _FLAG),
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), _TEXT),
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type", "mapping_type"), _SECTION),
    "finite_number": _expected("a finite number"),
    "literal_error": lambda about: f"allowed: {about['expected'].replace(' or ', ', ')}",
    "greater_than": lambda about: f"must be above {about['gt']:g}",
    "greater_than_equal": lambda about: f"must be at least {_plain(about['ge'])}",
    "less_than": lambda about: f"must be below {_plain(about['lt'])}",
    "less_than_equal": lambda about: f"must be at most {_plain(about['le'])}",
    "string_too_short": lambda about: (
        "must not be empty" if about["min_length"] == 1 else f"must have {about['min_length']} characters at least"
    ),
    "string_too_long": lambda about: f"must have {about['max_length']} characters at most",
    "too_short": lambda about: f"needs {_items(about['min_length'])} at least",
    "too_long": lambda about: f"takes {_items(about['max_length'])} at most",
    "invalid_key": lambda _: "names of fields are text",
}
"""By pydantic's type of error. Its own sentence is shown of the others."""


def _plain(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _tags(cls: type[BaseModel], parts: list[str], tag: str) -> list[str]:
    """The values of `tag` that say of which class the field at `parts` is."""
    here, *below = parts
    classes = classes_in(cls.model_fields[here].annotation)
    return _tags(classes[0], below, tag) if below else [str(c.model_fields[tag].default) for c in classes]


def short_repr(value: Any) -> str:
    """`repr`, cut to 80 characters without ever being built in full: YAML aliases make small files huge values."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers beyond 4300 digits
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) < 80 else text[:77] + "..."


def _walk(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """The names of the fields on the way to `loc`, and the class that has the last; None where that is no class's.

    Where a field may be of several classes pydantic says in one more part of `loc` by which kind it read it.
    """
    names: list[str] = []
    here: type[BaseModel] | None = cls
    kinds: dict[str, type[BaseModel]] = {}
    for number, part in enumerate(loc):
        if part in kinds:
            here, kinds = kinds[str(part)], {}
            continue
        names.append(str(part))
        if number == len(loc) - 1 or here is None:
            continue
        field = here.model_fields.get(str(part))
        classes = [] if field is None else classes_in(field.annotation)
        here = classes[0] if classes else None
        if len(classes) > 1:
            kinds = {tag[1]: c for c in classes if (tag := tag_of(c)) is not None}
    return names, here
