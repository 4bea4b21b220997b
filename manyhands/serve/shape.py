"""What a JSON body must look like, said with the place of what is wrong: `input[2].content[0].text`.

Only what a translation needs to read; ranges of numbers that pass through unchanged are the chat core's to check.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.config.base import short_repr
from manyhands.serve.errors import ApiError

OWN = (
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "return_expert_ledger",
    "seed",
    "skip_special_tokens",
    "stop_token_ids",
)
"""Fields of our chat requests that the other interfaces do not have; here they mean the same."""


def wrong(place: str, message: str) -> ApiError:
    """A 400 about the field at `place`."""
    return ApiError(400, f"{place}: {message}", param=place)


def text(value: Any, place: str) -> str:
    """A string, or 400."""
    if not isinstance(value, str):
        raise wrong(place, f"expected a string, found {short_repr(value)}")
    return value


def name(value: Any, place: str) -> str:
    """A string that is not empty, or 400."""
    if not text(value, place):
        raise wrong(place, "must not be empty")
    return str(value)


def flag(value: Any, place: str, default: bool) -> bool:
    """A boolean; `default` for null. Or 400."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(place, f"expected true or false, found {short_repr(value)}")
    return value


def whole(value: Any, place: str, least: int, most: int | None = None) -> int:
    """An integer from `least` to `most`, or 400."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise wrong(place, f"expected an integer {limits}, found {short_repr(value)}")
    return value


def number(value: Any, place: str, least: float, most: float) -> float:
    """A number from `least` to `most`, or 400."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise wrong(place, f"expected a number from {least:g} to {most:g}, found {short_repr(value)}")
    return value


def record(value: Any, place: str) -> Mapping[str, Any]:
    """An object, or 400."""
    if not isinstance(value, dict):
        raise wrong(place, f"expected an object, found {short_repr(value)}")
    return value


def several(value: Any, place: str) -> Sequence[Any]:
    """An array, or 400."""
    if not isinstance(value, list):
        raise wrong(place, f"expected an array, found {short_repr(value)}")
    return value


def choice(value: Any, place: str, allowed: Sequence[str]) -> str:
    """One of `allowed`, or 400."""
    if not isinstance(value, str) or value not in allowed:
        raise wrong(place, f"expected one of {', '.join(allowed)}; found {short_repr(value)}")
    return value


def given(body: Mapping[str, Any], field: str, default: Any) -> Any:
    """The field's value, whatever it is; `default` where it is absent or null."""
    value = body.get(field)
    return default if value is None else value


def kept(body: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those fields of `body` that are there and not null."""
    return {name: body[name] for name in names if body.get(name) is not None}


def short(value: Any) -> str:
    """The value as a message shows it."""
    return short_repr(value)


def written(value: Any) -> str:
    """The value as JSON text."""
    return json.dumps(value, ensure_ascii=False)
