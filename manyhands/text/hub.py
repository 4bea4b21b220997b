"""Documents of a Hugging Face data set, where the `datasets` library is installed.

`hf:NAME`, `hf:OWNER/NAME` or `hf:OWNER/NAME/CONFIG`, always the `train` split. What the data set's own
validation split holds is not read: the run makes its own (see `split.py`).
"""

from collections.abc import Iterator
from typing import Any

from manyhands.errors import DataError
from manyhands.text.document import Document
from manyhands.text.formats import text_of, without_nulls
from manyhands.text.hub_error import why


def read_hub(source: str, text_field: str) -> Iterator[Document]:
    """The rows of `source`, named `hf:NAME:row`, counted from 1.

    Raises `DataError` if `datasets` is missing, the data set cannot be loaded, or it lacks the column.
    """
    name, rows = source.removeprefix("hf:").strip("/"), _load(source)
    columns = list(rows.column_names)
    if text_field not in columns:
        raise DataError(f"{source}: no column {text_field!r}; there are: {', '.join(columns[:20]) or 'none'}")
    for row, record in enumerate(rows, start=1):
        yield Document(f"hf:{name}:{row}", text_of(record[text_field], text_field, f"{source}:{row}"))


def read_hub_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of `source` is, and the row, without what is null in it. Raises `DataError` as `read_hub` does."""
    for row, record in enumerate(_load(source), start=1):
        yield f"{source}:{row}", without_nulls(record)


def _load(source: str) -> Any:
    """The `train` split of a data set."""
    name = source.removeprefix("hf:").strip("/")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{source}: expected hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f'{source}: Hugging Face data sets need the datasets library: pip install "manyhands[hub]"'
        ) from None
    config = parts[2] if len(parts) == 3 else None
    try:
        return datasets.load_dataset("/".join(parts[:2]), config, split="train")
    except Exception as error:  # the library raises its own, the hub's and the network's errors here
        page = f"https://huggingface.co/datasets/{'/'.join(parts[:2])}"
        raise DataError(f"{source}: cannot be loaded: {why(error, page)}") from None
