"""One row to tune a model on: which form it has, and what is wrong with it. `rows.py` reads them.

{"text": "…"}
{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}
{"prompt": "…", "completion": "…"}             texts, or lists of messages
{"prompt": "…", "chosen": "…", "rejected": "…"}  the same; lists of messages may leave the prompt to their beginning
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from manyhands import strict_json
from manyhands.errors import DataError
from manyhands.text.chat import Message
from manyhands.text.formats import text_of

Form = Literal["text", "messages", "prompt-completion", "preference"]
FORMS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
}
"""The columns that make each."""
COLUMNS = ("messages", "tools", "prompt", "completion", "chosen", "rejected")
"""All that are looked at, beside the one of the text."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text, every token of which is learnt."""

    where: str
    """File and row, for messages; the same for the others."""
    text: str

    form: Form = "text"


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation, of which the assistant's turns are learnt: those behind the first `given` messages."""

    where: str
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    given: int = 0
    form: Form = "messages"


@dataclass(frozen=True, slots=True)
class PairRow:
    """A beginning, and how it goes on, which is learnt."""

    where: str
    prompt: str
    completion: str
    form: Form = "prompt-completion"


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to the same, of which one is better; each as the row that it would be alone."""

    where: str
    chosen: ChatRow | PairRow
    rejected: ChatRow | PairRow
    form: Form = "preference"


Row = TextRow | ChatRow | PairRow | PreferenceRow


def row_of(record: Mapping[str, Any], where: str, text_field: str = "text", form: Form | None = None) -> Row:
    """The row that `record` is. Raises `DataError`, beginning with `where`."""
    held = {name for name in (*COLUMNS, text_field) if record.get(name) is not None}
    if form is None:
        forms = [name for name, columns in _columns(text_field).items() if held.issuperset(columns)]
        if len(forms) > 1:
            raise DataError(f"{where}: it could be a row of {' or of '.join(map(named, forms))}: say which (columns)")
        if not forms:
            there = ", ".join(sorted(record)[:20]) or "nothing"
            raise DataError(f"{where}: not a row of {_all_forms(text_field)}; it has {there}")
        form = forms[0]
    elif missing := [name for name in _columns(text_field)[form] if name not in held]:
        raise DataError(f"{where}: no {missing[0]!r}, which a row of {named(form)} has")
    if form == "text":
        return TextRow(where, _filled(record[text_field], text_field, where))
    tools = _tools(record.get("tools"), where)
    if form == "messages":
        return ChatRow(where, _messages(record["messages"], "messages", where), tools)
    if form == "preference":
        return _preference(record, where, tools)
    return _answer(record, "completion", where, tools)


def digest_of(row: Row) -> bytes:
    """Of what is in it, wherever it lies: rows of the same content are on one side of a split."""
    if isinstance(row, PreferenceRow):
        return hashlib.sha256(digest_of(row.chosen) + digest_of(row.rejected)).digest()
    values = {name: getattr(row, name) for name in row.__slots__ if name not in ("where", "form")}
    return hashlib.sha256(json.dumps([row.form, values], sort_keys=True, default=repr).encode()).digest()


def _answer(record: Mapping[str, Any], column: str, where: str, tools: tuple[Any, ...] | None) -> ChatRow | PairRow:
    """The prompt and what is in `column`."""
    prompt, completion = record["prompt"], record[column]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PairRow(where, _filled(prompt, "prompt", where), _filled(completion, column, where))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"{where}: prompt and {column} are two texts or two lists of messages, not one of each")
    given, answer = _messages(prompt, "prompt", where), _messages(completion, column, where)
    return ChatRow(where, given + answer, tools, len(given), "prompt-completion")


def _preference(record: Mapping[str, Any], where: str, tools: tuple[Any, ...] | None) -> PreferenceRow:
    """Without a prompt it is what both conversations begin with."""
    if record.get("prompt") is None:
        both = [_messages(record[column], column, where) for column in ("chosen", "rejected")]
        pairs = enumerate(zip(*both, strict=False))
        given = next((number for number, (one, other) in pairs if one != other), min(map(len, both)))
        if not given:
            raise DataError(f"{where}: no 'prompt', and chosen and rejected do not begin alike")
        chosen, rejected = (ChatRow(where, messages, tools, given, "prompt-completion") for messages in both)
        row = PreferenceRow(where, chosen, rejected)
    else:
        better, worse = (_answer(record, column, where, tools) for column in ("chosen", "rejected"))
        row = PreferenceRow(where, better, worse)
    if digest_of(row.chosen) == digest_of(row.rejected):
        raise DataError(f"{where}: chosen and rejected are the same")
    return row


def _columns(text_field: str) -> dict[Form, tuple[str, ...]]:
    return {**FORMS, "text": (text_field,)}


def named(form: Form) -> str:
    """Its columns, for a message."""
    return " and ".join(FORMS[form])


def _all_forms(text_field: str) -> str:
    return f"{text_field!r}, of 'messages', of 'prompt' and 'completion', or of 'chosen' and 'rejected'"


def _filled(value: object, field: str, where: str) -> str:
    text = text_of(value, field, where)
    if not text.strip():
        raise DataError(f"{where}: field {field!r} is empty")
    return text


def _messages(value: object, field: str, where: str) -> tuple[Message, ...]:
    """Messages as templates take them: each an object with a role."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not a list of messages")
    if not value:
        raise DataError(f"{where}: field {field!r} is empty")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} of {field!r} is not an object with 'role' and 'content'")
        if not isinstance(message.get("content"), str | list | None):
            raise DataError(f"{where}: message {number} of {field!r}: its content is neither text nor a list of parts")
    return tuple(value)


def _tools(value: object, where: str) -> tuple[Any, ...] | None:
    """Also as JSON text: a table's column has one type, and tools have many."""
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: field 'tools' is text, and not JSON: {error}") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: field 'tools' is not a list of objects")
    return tuple(value)
