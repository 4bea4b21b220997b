"""A conversation as a file: its messages, in the form that chat templates and the usual HTTP interfaces have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manyhands import strict_json
from manyhands.errors import DataError
from manyhands.files import check_replaceable, write_atomic

_KIND = "manyhands conversation"
_MARK = f'"kind": "{_KIND}"'.encode()
_LARGEST = 16 << 20


def save_conversation(path: str | Path, messages: Sequence[dict[str, Any]]) -> None:
    """Write `messages` as JSON, whole or not at all.

    Raises `UserError` for a file that is there and is not such a one, `StorageError` if the disk refuses.
    """
    check_replaceable(path, _MARK)
    value = {"kind": _KIND, "version": 1, "messages": list(messages)}
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def load_conversation(path: str | Path) -> list[dict[str, Any]]:
    """The messages of such a file, or of any object with `messages`: a system's first, if any, then turns in pairs.

    Raises `DataError` naming what is wrong.
    """
    found = strict_json.read_object(path, _LARGEST, DataError)
    if found.get("version", 1) != 1:
        raise DataError(f"{path}: version {found['version']!r} of conversations is not known here; 1 is")
    messages = found.get("messages")
    if not isinstance(messages, list):
        raise DataError(f'{path}: no conversation: {{"messages": [{{"role": "user", "content": "…"}}, …]}} is one')
    roles = ["system"] if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system" else []
    if (len(messages) - len(roles)) % 2:
        raise DataError(f"{path}: the last question has no answer; each turn is a user's message and an assistant's")
    roles += ["user", "assistant"] * ((len(messages) - len(roles)) // 2)
    for number, (message, role) in enumerate(zip(messages, roles, strict=True)):
        if not isinstance(message, dict) or message.get("role") != role:
            raise DataError(f"{path}: messages[{number}]: a message with role = {role!r} belongs here")
        if not isinstance(message.get("content"), str | None):
            raise DataError(f"{path}: messages[{number}].content is not text")
        if role != "assistant" and message.get("content") is None:
            raise DataError(f"{path}: messages[{number}]: content is missing")
    return messages
