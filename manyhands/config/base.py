"""Strict, frozen descriptions, and errors a person can act on.

Every config class inherits `Strict`: unknown fields are refused, values are checked on construction and never
change afterwards. `parse`, and calling the class, turn pydantic's report into one `ConfigError` line: the field, the
value, what is allowed, and the nearest valid name. So the library says what the command line says.
"""

import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from manyhands.errors import ConfigError

C = TypeVar("C", bound="Strict")


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


if TYPE_CHECKING:  # checkers see pydantic's own class, and with it the fields as arguments
    _Model = BaseModel
else:

    class _Speaking(type(BaseModel)):
        """Calls that fail raise `ConfigError`. Nested values are built by pydantic, so errors keep the whole path."""

        def __call__(cls, *args, **values):
            """An instance."""
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise _config_error(cls, error, cls.__name__) from None

    class _Model(BaseModel, metaclass=_Speaking):
        """pydantic's model, with `ConfigError` for invalid values."""


class Strict(_Model):
    """Base of all configs: frozen, no unknown fields, no NaN or infinity, integers not converted from other types.

    A call with invalid values raises `ConfigError` with one line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def parse(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build `cls` from plain values. `where` (a file name, say) starts the message if it fails.

    Raises `ConfigError` with one line about the first thing that is wrong.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _config_error(cls, error, where) from None


def _config_error(cls: type[Strict], error: ValidationError, where: str) -> ConfigError:
    problems = error.errors(include_url=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    prefix = f"{where}: " if where else ""
    return ConfigError(prefix + _one_line(cls, problems[0]) + more)


def _one_line(cls: type[Strict], problem: ErrorDetails) -> str:
    parts, parent = _walk(cls, problem["loc"])
    path = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        names = sorted(parent.model_fields) if parent else []
        return f"unknown field {path!r}; " + suggest(str(problem["loc"][-1]), names)
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):  # one of several classes, by a field's value
        tag = problem["ctx"]["discriminator"].strip("'")
        known = problem["ctx"].get("expected_tags") or ", ".join(f"'{name}'" for name in _tags(cls, parts, tag))
        return f"{path}.{tag}: " + (
            f"{problem['ctx']['tag']!r} is none of {known}" if "tag" in problem["ctx"] else f"which of {known} is it?"
        )
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "missing":
        return f"{path}: this field is required"
    if not path:  # a rule about several fields; its own message names them
        return message
    return f"{path} = {short_repr(problem['input'])}: {message}"


def _tags(cls: type[Strict], parts: list[str], tag: str) -> list[str]:
    """The values of `tag` that say of which class the field at `parts` is."""
    here, *below = parts
    classes = _strict_classes(cls.model_fields[here].annotation)
    return _tags(classes[0], below, tag) if below else [str(c.model_fields[tag].default) for c in classes]


def short_repr(value: Any) -> str:
    """`repr`, cut to 80 characters without ever being built in full: YAML aliases make small files huge values."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers beyond 4300 digits
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) < 80 else text[:77] + "..."


def suggest(name: str, allowed: list[str]) -> str:
    """`did you mean 'x'?`, or the list of what is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "allowed: " + ", ".join(allowed)


def _walk(cls: type[Strict], loc: tuple[int | str, ...]) -> tuple[list[str], type[Strict] | None]:
    """The names of the fields on the way to `loc`, and the class that has the last; None where that is no class's.

    Where a field may be of several classes pydantic says in one more part of `loc` by which kind it read it.
    """
    names: list[str] = []
    here: type[Strict] | None = cls
    kinds: dict[str, type[Strict]] = {}
    for number, part in enumerate(loc):
        if part in kinds:
            here, kinds = kinds[str(part)], {}
            continue
        names.append(str(part))
        if number == len(loc) - 1 or here is None:
            continue
        field = here.model_fields.get(str(part))
        classes = [] if field is None else _strict_classes(field.annotation)
        here = classes[0] if classes else None
        if len(classes) > 1:
            tags = [(tag, c) for c in classes for tag in ("kind", "method") if tag in c.model_fields]
            kinds = {str(c.model_fields[tag].default): c for tag, c in tags}
    return names, here


def _strict_classes(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    if typing.get_origin(annotation) is Annotated:
        return _strict_classes(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for arg in typing.get_args(annotation) for found in _strict_classes(arg)]
    return []
