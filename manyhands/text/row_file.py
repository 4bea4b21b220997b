"""Examples on disk: a token file, and beside it where each row begins and which tokens are targets.

    train.npy            [N] the ids of all rows, one behind the other (`token_file.py`)
    train.targets.npy    [N] bool, the tokens that are learnt
    train.starts.npy     [R + 1] int64, where each row begins, and the end

R rows, N tokens in all.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.files import writing
from manyhands.text.targets import Example
from manyhands.text.token_file import TokenFile, TokenInfo, info_path


@dataclass(frozen=True, slots=True)
class RowFile:
    """The rows of one file, on disk."""

    tokens: TokenFile
    learnt: npt.NDArray[np.bool_]
    """[N]"""
    starts: npt.NDArray[np.int64]
    """[R + 1]"""

    @classmethod
    def open(cls, path: str | Path, vocab_size: int) -> Self:
        """Map what `write_rows` wrote. Raises `DataError` if it is missing, damaged or does not fit together."""
        path = Path(path)
        tokens = TokenFile.open(path, vocab_size)
        learnt, starts = (_open(name, kind) for name, kind in zip(beside(path), (np.bool_, np.int64), strict=True))
        N = len(tokens.ids)
        if len(learnt) != N or len(starts) < 2 or starts[0] or starts[-1] != N or (np.diff(starts) < 2).any():
            raise DataError(f"{path}: its rows and targets are not those of its {N} tokens")
        if learnt[starts[:-1]].any() or not np.logical_or.reduceat(learnt, starts[:-1]).all():
            raise DataError(f"{path}: a row has no target, or one before its first token")
        return cls(tokens, learnt, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[R]: the tokens of each row, at least two."""
        return np.diff(self.starts)

    def row(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The ids [n] of a row, and which of them are targets [n]."""
        whole = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.tokens.ids[whole].astype(np.int64), np.asarray(self.learnt[whole])


def beside(path: Path) -> tuple[Path, Path]:
    """The files of the targets and of the rows' beginnings."""
    return path.with_suffix(".targets.npy"), path.with_suffix(".starts.npy")


def write_rows(path: str | Path, examples: Iterable[Example], vocab_size: int) -> TokenInfo:
    """Write the examples, each of two tokens at least with a target among them, atomically.

    The file's `num_bytes` is 0: rows are no text whose bytes a loss could be divided by. Raises `StorageError` if the
    disk refuses.
    """
    path, kept = Path(path), list(examples)
    ids = np.concatenate([example.ids for example in kept]).astype("<u2" if vocab_size <= 1 << 16 else "<u4")
    learnt = np.concatenate([example.learnt for example in kept])
    starts = np.cumsum([0, *(len(example.ids) for example in kept)], dtype=np.int64)
    info = TokenInfo(len(ids), 0, len(kept))
    targets_path, starts_path = beside(path)
    # Nested, so that no file is replaced unless all could be written.
    with (
        writing(info_path(path)) as info_file,
        writing(targets_path) as targets_file,
        writing(starts_path) as starts_file,
        writing(path) as ids_file,
    ):
        info_file.write(json.dumps(asdict(info)).encode())
        np.save(targets_file, learnt, allow_pickle=False)
        np.save(starts_file, starts, allow_pickle=False)
        np.save(ids_file, ids, allow_pickle=False)
    return info


def _open(path: Path, kind: type[np.generic]) -> npt.NDArray[Any]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a row file: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != kind:
        raise DataError(f"{path}: not a row file: expected one row of {kind.__name__}")
    return found
