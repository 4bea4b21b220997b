"""The text in one file, by its suffix. Nothing here unpickles."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from manyhands.errors import DataError
from manyhands.system import installed_memory
from manyhands.text.document import Document

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
WHOLE = (".txt", ".md", ".py")
"""Of files that are one text."""
MAX_LINE_BYTES = 1 << 26
"""Longest line of a .jsonl file. Without a limit, a small .gz of one endless line fills the memory."""

_ROWS = 256
"""Of a parquet file, read at once."""
_EXPANSION = 64
_ALWAYS = 64 << 20
"""A file may hold 64 MiB of text, and more if it has a 64th of that on the disk. Text seldom shrinks to a tenth."""


def memory_for_text() -> int:
    """The bytes that all texts together may have: half of this machine's memory."""
    return installed_memory() // 2


class _Budget:
    """The bytes of text that one file may hold: by its size on the disk, and by this machine's memory."""

    def __init__(self, path: Path) -> None:
        status = path.stat()
        stored = min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)  # less where it has holes
        memory = memory_for_text()
        self.path, self.left = path, min(max(_ALWAYS, _EXPANSION * stored), memory)
        self.why = (
            f"half of this machine's memory ({memory >> 20:,} MiB)"
            if self.left == memory
            else f"{_EXPANSION} times its {stored:,} bytes on the disk"
        )

    def spend(self, count: int) -> None:
        """Raises `DataError` when it is more than is left."""
        self.left -= count
        if self.left < 0:
            raise DataError(f"{self.path}: holds more text than {self.why}")


def known_suffix(path: Path) -> bool:
    """Whether `read_file` has a reader for it."""
    return path.name.lower().endswith(SUFFIXES)


def read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """The documents in one file of a known suffix. Rows are named `name:row`, counted from 1.

    Raises `DataError` naming the file, and the row where there is one.
    """
    lower = path.name.lower()
    with _told(path):
        budget = _Budget(path)
        if lower.endswith(".parquet"):
            yield from _read_parquet(path, name, text_field, budget)
        elif lower.endswith(WHOLE):
            yield _whole(path, name, budget)
        else:
            with _opened(path) as file:
                yield from _texts(_read_jsonl(file, path, budget), path, name, text_field)


def read_records(path: Path, columns: Sequence[str], text_field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows in one file of a known suffix, counted from 1, each with at least those of `columns` that it has.

    A file that is one text is one row of `text_field`. Raises `DataError` naming the file, and the row where there is
    one.
    """
    lower = path.name.lower()
    with _told(path):
        budget = _Budget(path)
        if lower.endswith(".parquet"):
            yield from _parquet_records(path, columns, budget)
        elif lower.endswith(WHOLE):
            yield 1, {text_field: _whole(path, path.name, budget).text}
        else:
            with _opened(path) as file:
                yield from _read_jsonl(file, path, budget)


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb"))


def _whole(path: Path, name: str, budget: _Budget) -> Document:
    budget.spend(path.stat().st_size)
    return Document(name, path.read_bytes().decode("utf-8"))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong with the file, in one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def text_of(value: object, field: str, where: str) -> str:
    """`value` if it is text that UTF-8 can hold. Raises `DataError`, starting with `where`."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {field!r} holds half a surrogate pair at character {error.start}") from None
    return value


def _read_jsonl(file: BinaryIO, path: Path, budget: _Budget) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that is not empty: its number and its object."""
    row = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        row += 1
        budget.spend(len(line))
        where = f"{path}:{row}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 text: byte {error.start} of the line") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, found {type(record).__name__}")
        yield row, record


def _texts(records: Iterator[tuple[int, dict[str, Any]]], path: Path, name: str, field: str) -> Iterator[Document]:
    """What each has in `field`."""
    for row, record in records:
        if field not in record:
            there = ", ".join(sorted(record)[:20]) or "none"
            raise DataError(f"{path}:{row}: no field {field!r}; there are: {there}")
        yield Document(f"{name}:{row}", text_of(record[field], field, f"{path}:{row}"))


def _read_parquet(path: Path, name: str, field: str, budget: _Budget) -> Iterator[Document]:
    with _parquet(path) as pa:
        import pyarrow.parquet as pq

        row = 0
        with pq.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path}: no column {field!r}; there are: {', '.join(columns[:20]) or 'none'}")
            is_text = table.schema_arrow.field(field).type in (pa.string(), pa.large_string())
        # A column's dictionary is read as one: rows that repeat a long text would take its memory again for each.
        with pq.ParquetFile(path, read_dictionary=[field] if is_text else None) as table:
            _check_declared(table, {field}, budget)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in _values(batch.column(0)):
                    row += 1
                    text = text_of(value, field, f"{path}:{row}")
                    budget.spend(len(text))
                    yield Document(f"{name}:{row}", text)


def _parquet_records(path: Path, columns: Sequence[str], budget: _Budget) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row, of those of `columns` that there are, else of all; without what is null in it."""
    with _parquet(path):
        import pyarrow.parquet as pq

        row = 0
        with pq.ParquetFile(path) as table:
            wanted = [name for name in table.schema_arrow.names if name in columns]
            if not wanted:
                yield 1, dict.fromkeys(table.schema_arrow.names)
                return
            _check_declared(table, set(wanted), budget)
            for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
                budget.spend(batch.nbytes)
                for record in batch.to_pylist():
                    row += 1
                    yield row, without_nulls(record)


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """pyarrow, whose errors are told in one line."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f'{path}: reading parquet needs pyarrow: pip install "manyhands[parquet]"') from None
    try:
        yield pa
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())[:200]}") from None


def without_nulls(value: Any) -> Any:
    """A table's row as it was before its columns had one type: what one message lacks and another has is null there."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_declared(table: Any, columns: set[str], budget: _Budget) -> None:
    """By what the columns' pages take before compression, as the file says."""
    if sum(_column_bytes(table.metadata, group, columns) for group in range(table.num_row_groups)) > budget.left:
        raise DataError(f"{budget.path}: holds more text than {budget.why}")


def _column_bytes(metadata: Any, group: int, columns: set[str]) -> int:
    """A nested column's path begins with its name."""
    parts = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    return sum(int(part.total_uncompressed_size) for part in parts if part.path_in_schema.split(".")[0] in columns)


def _values(column: Any) -> Iterator[object]:
    """The rows of an Arrow array; those of a dictionary share its texts."""
    if not hasattr(column, "dictionary"):
        yield from column.to_pylist()
        return
    texts: dict[int | None, object] = {None: None}
    for index in column.indices.to_pylist():
        if index not in texts:
            texts[index] = column.dictionary[index].as_py()
        yield texts[index]
