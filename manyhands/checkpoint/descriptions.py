"""JSON that describes a checkpoint: bounded, since it may be anything, and never followed out of its directory."""

import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from manyhands.errors import CheckpointError
from manyhands.files import OUTSIDE, within
from manyhands.strict_json import parse_object

_WIDE_LIMIT = 4 << 20  # text that is not ASCII takes up to four times its bytes
_MARKS_LIMIT = 3 << 17  # commas and brackets: 49,000 tensors in one file, 390,000 in an index
_NAME_LIMIT = 512


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes."""
    check_inside(path)
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too long for a description")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_description(data, str(path))


def parse_description(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object that is a description: no name twice, or longer than names are, and not so much as to fill memory.

    `where` begins the message of an error.
    """

    wide = len(data) > _WIDE_LIMIT and (not data.isascii() or b"\\u" in data)
    if wide or sum(map(data.count, (b",", b"[", b"{"))) > _MARKS_LIMIT:
        raise CheckpointError(f"{where}: more values, or wider letters, than any model needs")
    values = parse_object(data, where, CheckpointError)
    _check_names(values, where)
    return values


def _check_names(value: Any, where: str) -> None:
    """Refuse a name longer than names are, at any depth."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if max(map(len, value), default=0) > _NAME_LIMIT:
                name = max(value, key=len)
                raise CheckpointError(f"{where}: {reprlib.repr(name)}: a name of {len(name)} characters")
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def check_inside(path: Path) -> None:
    """Refuse a link that leads out of its directory."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise CheckpointError(f"{path}: {'does not exist' if missing else 'cannot be read'}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    if not within(path):
        raise CheckpointError(f"{path}: {OUTSIDE}")
