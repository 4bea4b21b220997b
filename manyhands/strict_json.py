"""JSON from files that may be anything: no key twice, no NaN or infinity, no endless number, no endless nesting.

Python's reader keeps the last of two equal keys without a word, takes `NaN`, `Infinity` and 1e999, and lets nesting
escape as RecursionError.
"""

import json
import math
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from manyhands.errors import ManyhandsError

MOST_DIGITS = 64
"""Of an integer. The longest that means anything here, a random generator's state, has 39."""


class _Refused(ValueError):
    """Well-formed, and refused all the same."""


def loads(data: bytes | str) -> Any:
    """The value of UTF-8 JSON. Raises `ValueError` with a few words that say what is wrong."""
    numbers: list[str] = []
    """What is wrong with a number, until the object around it has named its field."""

    def integer(text: str) -> int | float:
        if len(text) <= MOST_DIGITS:
            return int(text)
        numbers.append(f"{text[:16]}…: an integer of {len(text):,} digits")
        return math.nan

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            numbers.append(f"{value}: expected a finite number")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _Refused(f"{reprlib.repr(twice)} stands twice in one object")
        field = next((name for name, value in pairs if _doubtful(value)), None) if numbers else None
        if field is not None:
            raise _Refused(f"{_shown(field)} = {numbers[0]}")
        return found

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_int=integer, parse_float=number, parse_constant=number)
    except _Refused:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if numbers:
        raise ValueError(numbers[0])
    return value


def first(text: str) -> tuple[Any, str]:
    """The value a text begins with, and the rest of the text. Raises `ValueError` as `loads` does."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    return loads(text[:end]), text[end:]


def parse_object(data: bytes | str, where: str, error: type[ManyhandsError]) -> dict[str, Any]:
    """An object. Raises `error` with one line that `where`, a file's name, begins."""
    try:
        value = loads(data)
    except ValueError as problem:
        raise error(f"{where}: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected an object, found {type(value).__name__}")
    return value


def read_object(path: str | Path, limit: int, error: type[ManyhandsError]) -> dict[str, Any]:
    """An object from a file of at most `limit` bytes. Raises `error` with one line that the file's name begins."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    if len(data) > limit:
        raise error(f"{path}: more than {limit:,} bytes is too long for it")
    return parse_object(data, str(path), error)


def _doubtful(value: Any) -> bool:
    """Whether a refused number stands here."""
    if isinstance(value, list):
        return any(map(_doubtful, value))
    return isinstance(value, float) and not math.isfinite(value)


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else reprlib.repr(name)
