"""Documents as one long row of token ids on disk, read back through a memory map.

`tokens.npy` holds the ids, 1-D, uint16 where the vocabulary allows and uint32 otherwise; `tokens.npy.json` beside
it says how many tokens and bytes of text that is. N = number of tokens.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.files import writing
from manyhands.strict_json import read_object
from manyhands.text.document import Document
from manyhands.text.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 22
"""Text encoded at once. The tokenizer's own records are some 100 bytes per token; this bounds them."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What a token file holds. `num_bytes` is the documents' UTF-8 text, without the ends of text."""

    num_tokens: int
    num_bytes: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class TokenFile:
    """`ids [N]`, uint16 or uint32, on disk; and what they are."""

    ids: npt.NDArray[Any]
    info: TokenInfo

    @classmethod
    def open(cls, path: str | Path, vocab_size: int) -> Self:
        """Map a file that `write_tokens` wrote, and read it through once.

        Raises `DataError` if it is missing, damaged, or has an id that does not fit into `vocab_size`.
        """
        path = Path(path)
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            info = TokenInfo(**read_object(info_path(path), 1 << 20, DataError))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, TypeError, EOFError) as error:
            raise DataError(f"{path}: not a token file: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
            raise DataError(f"{path}: not a token file: expected one row of uint16 or uint32")
        if len(ids) != info.num_tokens:
            raise DataError(f"{path}: has {len(ids)} tokens, but {info.num_tokens} were written")
        largest = int(ids.max(initial=0))
        if largest >= vocab_size:
            raise DataError(f"{path}: token id {largest} does not fit into a vocabulary of {vocab_size}")
        return cls(ids, info)

    def ends(self, eos_token_id: int) -> npt.NDArray[np.int64] | None:
        """[X]: behind which token each document ends; None where a document has the end of text within it."""
        ends_X = np.flatnonzero(self.ids == eos_token_id) + 1
        return ends_X if len(ends_X) == self.info.num_documents and ends_X[-1:] == [len(self.ids)] else None


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
) -> npt.NDArray[Any]:
    """Ids `[N]` of each document, uint16 where the vocabulary allows, else uint32.

    `progress` gets the number of characters done so far.

    In front of each what the tokenizer puts there (`<s>`, or nothing), behind it the end of text.

    Raises `DataError` if the tokenizer has no end of text.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no token that ends a text (<|endoftext|>, </s>, …)")
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    front = tokenizer.front_ids
    rows = [np.empty(0, dtype)]
    done = 0
    for texts in _chunks(documents):
        rows += [np.asarray([*front, *ids, eos], dtype) for ids in tokenizer.encode_batch(texts)]
        done += sum(map(len, texts))
        if progress is not None:
            progress(done)
    return np.concatenate(rows)


def write_tokens(
    path: str | Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    progress: Callable[[int], None] | None = None,
) -> TokenInfo:
    """Encode each document, followed by the end of text, into one file; atomically.

    Raises `DataError` if the tokenizer has no end of text, `StorageError` if the disk refuses.
    """
    path = Path(path)
    ids = encode_documents(documents, tokenizer, progress)
    info = TokenInfo(len(ids), sum(document.num_bytes for document in documents), len(documents))
    # Nested, so that neither file is replaced unless both could be written.
    with writing(info_path(path)) as info_file, writing(path) as ids_file:
        info_file.write(json.dumps(asdict(info)).encode())
        np.save(ids_file, ids, allow_pickle=False)
    return info


def info_path(path: Path) -> Path:
    """The file beside a token file that says what is in it."""
    return path.with_name(path.name + ".json")


def _chunks(documents: Sequence[Document]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document.text)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk
