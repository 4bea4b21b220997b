"""A call that a model wrote, and its arguments as JSON text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhands import strict_json

Schemas = Mapping[str, Mapping[str, Any]]
"""By a tool's name, the schema of its parameters."""


@dataclass(frozen=True, slots=True)
class Call:
    """One."""

    name: str
    arguments: str
    """JSON, an object."""
    id: str | None = None
    """Where the model gives its calls names of their own."""


class Malformed(Exception):
    """What stands where a call should is none."""


def call_of(value: Any) -> Call:
    """`{"name": …, "arguments" or "parameters": {…}}`. Raises `Malformed`."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise Malformed
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Malformed
    return Call(value["name"], dumps(arguments))


def loads(text: str) -> Any:
    """JSON. Raises `Malformed`."""
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed from None


def first_object(text: str) -> tuple[Any, str]:
    """The JSON value a text begins with, and the rest. Raises `Malformed`."""
    try:
        return strict_json.first(text)
    except ValueError:
        raise Malformed from None


def dumps(value: Any) -> str:
    """As an API gives arguments. Raises `Malformed` for what JSON has no word for."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise Malformed from None


def typed(text: str, name: str, key: str, schemas: Schemas) -> Any:
    """An argument that was written without quotes, as the type its tool's schema has; a text where that is unknown."""
    properties = schemas.get(name, {}).get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(kinds, list) else set()
    if kinds == {"string"} or (not kinds and isinstance(schema, Mapping) and not schema.keys() & {"anyOf", "oneOf"}):
        return text
    try:
        value = loads(text.strip())
    except Malformed:
        return _boolean(text.strip()) if "boolean" in kinds else text
    if isinstance(value, str) or (kinds and not kinds & _kinds_of(value)):
        return text
    return value


def _boolean(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _kinds_of(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    return {"object"} if isinstance(value, Mapping) else {"array"}
