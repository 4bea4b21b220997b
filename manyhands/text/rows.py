"""Rows to tune a model on, with the names that TRL gives them.

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}
    {"prompt": "…", "completion": "…"}         strings, or lists of messages

From .jsonl, .jsonl.gz and .parquet files, folders and globs of them, `hf:NAME`, and `stdlib-docstrings`, which is made
of the standard library (`stdlib_rows.py`). A .txt, .md or .py file is a row of `text`. All rows of a run are of one
form. They are read one by one: a data set may be larger than the memory.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manyhands import strict_json
from manyhands.errors import DataError
from manyhands.text.chat import Message
from manyhands.text.corpus import files_of, say_left_out
from manyhands.text.formats import WHOLE, read_records, text_of
from manyhands.text.hub import read_hub_records
from manyhands.text.stdlib_rows import STDLIB_ROWS, stdlib_rows

_log = logging.getLogger(__name__)
Form = Literal["text", "messages", "prompt-completion"]
FORMS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
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


Row = TextRow | ChatRow | PairRow


def read_rows(
    sources: Sequence[str],
    text_field: str = "text",
    form: Form | None = None,
    say: Callable[[str], None] = _log.warning,
) -> Iterator[Row]:
    """Every row of every source, in order; files of a folder in the order of their names, each file once.

    `form` chooses where rows have the columns of several; None: the one that they have. Other columns are not looked
    at. `say` gets a line of files that are left out of a folder or a glob, because their kind is unknown.

    Raises `DataError` naming the file and the row: for one that is no row, of another form than the first, or empty;
    also for a source without any.
    """
    if not sources:
        raise DataError("no data sources given; name files, folders, globs, 'stdlib-docstrings' or hf:NAME")
    first: Row | None = None
    seen: set[Path] = set()
    for source in sources:
        found, before = False, len(seen)
        for where, record in _records(source, text_field, seen, say):
            row = row_of(record, where, text_field, form)
            first = row if first is None else first
            if row.form != first.form:
                raise DataError(
                    f"{where}: a row of {_named(row.form)}, after rows of {_named(first.form)} (the first: "
                    f"{first.where}); all rows of a run are of one form"
                )
            found = True
            yield row
        if not found and (len(seen) > before or source.startswith("hf:")):
            raise DataError(f"{source}: there are no rows in it")


def row_of(record: Mapping[str, Any], where: str, text_field: str = "text", form: Form | None = None) -> Row:
    """The row that `record` is. Raises `DataError`, beginning with `where`."""
    held = {name for name in (*COLUMNS, text_field) if record.get(name) is not None}
    if form is None:
        if {"chosen", "rejected"} <= held:
            raise DataError(
                f"{where}: a row of chosen and rejected answers: preferences are not learnt yet, only rows of "
                f"{_all_forms(text_field)}"
            )
        forms = [name for name, columns in _columns(text_field).items() if held.issuperset(columns)]
        if len(forms) > 1:
            raise DataError(f"{where}: it could be a row of {' or of '.join(map(_named, forms))}: say which (columns)")
        if not forms:
            there = ", ".join(sorted(record)[:20]) or "nothing"
            raise DataError(f"{where}: not a row of {_all_forms(text_field)}; it has {there}")
        form = forms[0]
    elif missing := [name for name in _columns(text_field)[form] if name not in held]:
        raise DataError(f"{where}: no {missing[0]!r}, which a row of {_named(form)} has")
    if form == "text":
        return TextRow(where, _filled(record[text_field], text_field, where))
    tools = _tools(record.get("tools"), where)
    if form == "messages":
        return ChatRow(where, _messages(record["messages"], "messages", where), tools)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PairRow(where, _filled(prompt, "prompt", where), _filled(completion, "completion", where))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"{where}: prompt and completion are two texts or two lists of messages, not one of each")
    given, answer = _messages(prompt, "prompt", where), _messages(completion, "completion", where)
    return ChatRow(where, given + answer, tools, len(given), "prompt-completion")


def digest_of(row: Row) -> bytes:
    """Of what is in it, wherever it lies: rows of the same content are on one side of a split."""
    values = {name: getattr(row, name) for name in row.__slots__ if name not in ("where", "form")}
    return hashlib.sha256(json.dumps([row.form, values], sort_keys=True, default=repr).encode()).digest()


def _records(
    source: str, text_field: str, seen: set[Path], say: Callable[[str], None]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each record is, and the record."""
    if source == STDLIB_ROWS:
        for name, messages in stdlib_rows():
            yield f"{source}: {name}", {"messages": messages}
        return
    if source.startswith("hf:"):
        yield from read_hub_records(source)
        return
    found, unknown = files_of(source)
    for path, _ in found:
        if (real := path.resolve()) in seen:
            continue
        seen.add(real)
        for number, record in read_records(path, (*COLUMNS, text_field), text_field):
            yield str(path) if path.name.lower().endswith(WHOLE) else f"{path}:{number}", record
    say_left_out(say, source, unknown)


def _columns(text_field: str) -> dict[Form, tuple[str, ...]]:
    return {**FORMS, "text": (text_field,)}


def _named(form: Form) -> str:
    return " and ".join(FORMS[form])


def _all_forms(text_field: str) -> str:
    return f"{text_field!r}, of 'messages', or of 'prompt' and 'completion'"


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
