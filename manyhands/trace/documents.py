"""What a run's model says of each validation document: its loss there, kept beside the journal for `compare`.

    RUN/data/valid.documents.safetensors   which documents: bytes [X], sha256 [X, 16]
    RUN/documents.safetensors              the same, and nats [2, X], targets [X], steps [2]: at the last and the best
                                           validation, the one with the least loss

A document is known by the beginning of the SHA-256 of its text, so that runs with different tokenizers are compared
document by document. X documents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from manyhands.checkpoint.safetensors.header import read_header
from manyhands.errors import DataError, ManyhandsError
from manyhands.files import write_atomic

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
KNOWN_BY = 16  # bytes of a SHA-256
MOST = 1_000_000
"""Of more documents no losses are kept: the file would be written for longer than the validation takes."""
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a validation text, in its order."""

    bytes_X: Ints
    """Of each one's text in UTF-8; 0 for each where losses are not per byte: rows."""
    sha256_X: npt.NDArray[np.uint8]
    """[X, 16]"""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """Of these texts."""
        encoded = [text.encode() for text in texts]
        return cls(np.array([len(text) for text in encoded], np.int64), digests(encoded))

    def save(self, path: Path) -> None:
        """Raises `StorageError` if the disk refuses."""
        write_atomic(path, safetensors.numpy.save({"bytes": self.bytes_X, "sha256": self.sha256_X}))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises `DataError` naming the file if it is missing or damaged."""
        found = _load(path, {"bytes": (np.int64, 1), "sha256": (np.uint8, 2)})
        if len(found["bytes"]) != len(found["sha256"]) or found["sha256"].shape[1] != KNOWN_BY:
            raise DataError(f"{path}: not the documents of a validation text: its rows do not fit together")
        return cls(found["bytes"], found["sha256"])


@dataclass(frozen=True, slots=True)
class Sums:
    """What a text's losses add up to, document by document, as they come."""

    ends_X: Ints
    """Behind which token of the text each document ends."""
    nats_X: Floats
    targets_X: Ints

    @classmethod
    def of(cls, ends_X: Ints) -> Self:
        """Nothing yet."""
        return cls(ends_X, np.zeros(len(ends_X)), np.zeros(len(ends_X), np.int64))

    def add(self, first: int, losses_N: Floats, asked_N: npt.NDArray[np.bool_]) -> None:
        """The losses of N tokens of the text, the first of which is its token `first`; of those that were `asked`."""
        document_N = np.searchsorted(self.ends_X, first + np.arange(len(losses_N)), side="right")
        if not len(document_N):
            return
        lowest = int(document_N[0])
        nats = np.bincount(document_N - lowest, np.where(asked_N, losses_N, 0.0))
        self.nats_X[lowest : lowest + len(nats)] += nats
        self.targets_X[lowest : lowest + len(nats)] += np.bincount(document_N - lowest, asked_N).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Losses:
    """What one validation found."""

    step: int
    nats_X: Floats
    """Over each document's targets."""

    @property
    def sum(self) -> float:
        """Over all of them."""
        return float(self.nats_X.sum())


@dataclass(frozen=True, slots=True)
class DocumentLosses:
    """A run's validation, document by document."""

    documents: Documents
    targets_X: Ints
    """Tokens of each that were predicted."""
    last: Losses
    best: Losses

    @property
    def of_text(self) -> bool:
        """Whether the losses are of whole texts, whose bytes they may be divided by."""
        return bool(self.documents.bytes_X.sum() > 0)

    @property
    def size_X(self) -> Ints:
        """What nats are divided by: bytes, or targets where there are none."""
        return self.documents.bytes_X if self.of_text else self.targets_X

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises `DataError` naming the file if it is missing or damaged."""
        kinds: dict[str, tuple[type[np.generic], int]] = {
            "bytes": (np.int64, 1),
            "sha256": (np.uint8, 2),
            "targets": (np.int64, 1),
            "nats": (np.float64, 2),
            "steps": (np.int64, 1),
        }
        found = _load(path, kinds)
        X = len(found["bytes"])
        shapes = {name: value.shape for name, value in found.items()}
        wanted = {"bytes": (X,), "sha256": (X, KNOWN_BY), "targets": (X,), "nats": (2, X), "steps": (2,)}
        sizes = found["bytes"], found["targets"], found["steps"]
        if shapes != wanted or any((size < 0).any() for size in sizes) or not np.isfinite(found["nats"]).all():
            raise DataError(f"{path}: not a run's losses by document: its rows do not fit together")
        last, best = (Losses(int(step), nats_X) for step, nats_X in zip(found["steps"], found["nats"], strict=True))
        return cls(Documents(found["bytes"], found["sha256"]), found["targets"], last, best)

    def save(self, path: Path) -> None:
        """Raises `StorageError` if the disk refuses."""
        values: dict[str, npt.NDArray[Any]] = {
            "bytes": self.documents.bytes_X,
            "sha256": self.documents.sha256_X,
            "targets": self.targets_X,
            "nats": np.stack([self.last.nats_X, self.best.nats_X]),
            "steps": np.array([self.last.step, self.best.step], np.int64),
        }
        write_atomic(path, safetensors.numpy.save(values))


def keep_losses(path: Path, documents: Documents | None, step: int, sums: Sums | None) -> None:
    """Write `sums`, if there are any, as the last validation, and as the best if no earlier one was better.

    What is there from a later step than this one is of a run that went back, and is replaced. Losses that are no
    numbers are not kept. Raises `StorageError`.
    """
    if documents is None or sums is None or not np.isfinite(sums.nats_X).all():
        return
    best = found = Losses(step, sums.nats_X)
    try:
        before = DocumentLosses.open(path)
    except DataError:  # none yet, or not readable: it is written anew
        pass
    else:
        same = np.array_equal(before.documents.sha256_X, documents.sha256_X)
        if same and before.best.step < found.step and before.best.sum <= found.sum:
            best = before.best
    DocumentLosses(documents, sums.targets_X, found, best).save(path)


def digests(values: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """[X, 16]: what each is known by."""
    joined = b"".join(hashlib.sha256(value).digest()[:KNOWN_BY] for value in values)
    return np.frombuffer(joined, np.uint8).reshape(len(values), KNOWN_BY)


def _load(path: Path, kinds: dict[str, tuple[type[np.generic], int]]) -> dict[str, npt.NDArray[Any]]:
    """Exactly these arrays of a file, each of its type and number of dimensions."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: larger than {_MOST_BYTES >> 20} MB, more than this program writes")
        read_header(path)
        found = safetensors.numpy.load(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DataError:
        raise
    except ManyhandsError as error:
        raise DataError(str(error)) from None
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a readable safetensors file: {str(error).splitlines()[0][:200]}") from None
    if found.keys() != kinds.keys() or any(
        value.dtype != kinds[name][0] or value.ndim != kinds[name][1] for name, value in found.items()
    ):
        raise DataError(f"{path}: holds other arrays than {', '.join(kinds)}")
    return found
