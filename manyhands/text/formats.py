"""The text in one file, by its suffix. Nothing here unpickles."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from manyhands.errors import DataError
from manyhands.text.document import Document

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE_BYTES = 1 << 26
"""Longest line of a .jsonl file. Without a limit, a small .gz of one endless line fills the memory."""


def known_suffix(path: Path) -> bool:
    """Whether `read_file` has a reader for it."""
    return path.name.lower().endswith(SUFFIXES)


def read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """The documents in one file of a known suffix. Rows are named `name:row`, counted from 1.

    Raises `DataError` naming the file, and the row where there is one.
    """
    lower = path.name.lower()
    try:
        if lower.endswith(".parquet"):
            yield from _read_parquet(path, name, text_field)
        elif lower.endswith(".jsonl"):
            with path.open("rb") as file:
                yield from _read_jsonl(file, path, name, text_field)
        elif lower.endswith(".jsonl.gz"):
            with gzip.open(path, "rb") as file:
                yield from _read_jsonl(cast(BinaryIO, file), path, name, text_field)
        else:
            yield Document(name, path.read_bytes().decode("utf-8"))
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


def _read_jsonl(file: BinaryIO, path: Path, name: str, field: str) -> Iterator[Document]:
    row = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        row += 1
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
            raise DataError(f"{where}: expected an object with a field {field!r}, found {type(record).__name__}")
        if field not in record:
            raise DataError(f"{where}: no field {field!r}; there are: {', '.join(sorted(record)[:20]) or 'none'}")
        yield Document(f"{name}:{row}", text_of(record[field], field, where))


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f'{path}: reading parquet needs pyarrow: pip install "manyhands[parquet]"') from None
    row = 0
    try:
        with pq.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path}: no column {field!r}; there are: {', '.join(columns[:20]) or 'none'}")
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield Document(f"{name}:{row}", text_of(value, field, f"{path}:{row}"))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())[:200]}") from None
