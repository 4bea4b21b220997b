"""Rows to tune a model on, with the names that TRL gives them.

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}
    {"prompt": "…", "completion": "…"}             texts, or lists of messages
    {"prompt": "…", "chosen": "…", "rejected": "…"}  preferences

From .jsonl, .jsonl.gz and .parquet files, folders and globs of them, `hf:NAME`, and `stdlib-docstrings`, which is made
of the standard library (`stdlib_rows.py`). A .txt, .md or .py file is a row of `text`. All rows of a run are of one
form. They are read one by one: a data set may be larger than the memory.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from manyhands.errors import DataError
from manyhands.text.corpus import files_of, say_left_out
from manyhands.text.formats import WHOLE, read_records
from manyhands.text.hub import read_hub_records
from manyhands.text.row import COLUMNS, Form, Row, named, row_of
from manyhands.text.stdlib_rows import STDLIB_ROWS, stdlib_rows

_log = logging.getLogger(__name__)


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
                    f"{where}: a row of {named(row.form)}, after rows of {named(first.form)} (the first: "
                    f"{first.where}); all rows of a run are of one form"
                )
            found = True
            yield row
        if not found and (len(seen) > before or source.startswith("hf:")):
            raise DataError(f"{source}: there are no rows in it")


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
