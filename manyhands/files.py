"""Files that are complete or not there: made under a hidden name beside the final one, flushed, renamed."""

import contextlib
import difflib
import errno
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from manyhands.errors import StorageError, UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
"""What files of a checkpoint are called that several rooms name."""
TUNED, TUNED_WEIGHTS = "tuned.json", "tuned.safetensors"
"""Of a checkpoint that holds what tuning trains, and not the whole model."""
RUN, JOURNAL, STATE = "run.yaml", "journal.jsonl", "state.json"
TRAIN_TOKENS, VALID_TOKENS, PREPARED = "train.npy", "valid.npy", "data.json"
DOCUMENTS, VALID_DOCUMENTS = "documents.safetensors", "valid.documents.safetensors"
"""The same of a run."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes if it fails. Makes missing parents.

    The temporary `.NAME.partial-PID` lies in the same folder, so the rename never crosses file systems. Raises
    `StorageError` if the disk refuses; what stood at `path` is then unchanged.
    """
    path = Path(os.path.realpath(path))
    partial = beside(path, "partial")
    try:
        if path.exists() and not path.is_file():
            raise FileExistsError(errno.EEXIST, "it exists and is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


OUTSIDE = (
    "a symbolic link out of the checkpoint, which is not followed; put the file itself there (cp, or ln without -s)"
)
"""What is said of a file that is not `within`."""


def within(path: Path) -> bool:
    """Whether an existing file really lies in its directory: no link leads out of it.

    The Hugging Face hub's cache, whose `snapshots/REVISION` link to `blobs`, counts as one place.
    """
    real, directory = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    blobs = directory.parent.parent / "blobs" if directory.parent.name == "snapshots" else None
    return real.parent in (directory, blobs)


def did_you_mean(path: str | Path) -> str:
    """` (did you mean …?)` where a path that is not there is nearly one that is; else nothing."""
    path = Path(path)
    try:
        there = [entry.name for entry in itertools.islice(path.parent.iterdir(), 1000)]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.6)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Put `data` (text as UTF-8) at `path`, whole or not at all. Raises `StorageError` as `writing` does."""
    with writing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def check_replaceable(path: str | Path, mark: bytes) -> None:
    """Let a file that a person named be written: it is not there, or bears the `mark` of what this program writes.

    Looks into the first and the last 64 kB. Raises `UserError` for somebody else's file.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path}: exists and is not a regular file; choose another name")
    try:
        with open(path, "rb") as file:
            seen = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            seen += file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{path}: cannot be looked into: {error.strerror}; choose another name") from None
    if mark not in seen:
        raise UserError(f"{path}: exists and was not made by this program, so it stays; choose another name")


def check_place(path: str | Path) -> None:
    """Let a file that is written after long work be possible. Raises `UserError` if its folder takes none.

    Makes no folder: that of the first existing one is asked, by a file that is gone at once.
    """
    folder = next(place for place in Path(os.path.realpath(path)).parents if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {folder}: {error.strerror or error}") from None


def cannot_write(path: str | Path, error: Exception) -> StorageError:
    """The one line for a write that failed."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return StorageError(f"cannot write {path}: {reason}; what was there before is unchanged")


def beside(path: Path, kind: str) -> Path:
    """The hidden name of this process beside `path`: `.NAME.KIND-PID`."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def sync_directory(directory: Path) -> None:
    """Make renames and deletions in `directory` survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no directories
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
