"""Writes that are complete or did not happen.

A file or directory is made under a hidden name beside its final one (so on the same file system), flushed to the
disk, and renamed. A directory is complete when its `manifest.json` is there: it is written last, deleted first, and
holds the size and SHA-256 of every file.

    .NAME.partial-PID     being written; worthless once its process is dead
    .NAME.replaced-PID    what stood at NAME, for the instant in which the new one takes its place
"""

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field
from safetensors import SafetensorError

from manyhands.config import Strict, parse
from manyhands.errors import CheckpointError, ConfigError, StorageError
from manyhands.files import beside, cannot_write, sync_directory, within, write_atomic

MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 4 << 20  # 30,000 files
_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-\d+")
_log = logging.getLogger(__name__)


class Entry(Strict):
    """One file of a manifest."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Strict):
    """Every other file of a complete directory, by its relative POSIX path."""

    format: Literal["manyhands"] = "manyhands"
    version: Literal[1] = 1
    files: dict[str, Entry]


@contextmanager
def building(directory: str | Path) -> Iterator[Path]:
    """Fill the directory this yields; when the block ends, it appears at `directory`, complete, in one rename.

    If `directory` exists, it stays as it is until the new one is complete, and is then replaced. Files in it that
    neither its manifest nor the new directory knows are not ours to delete: they are kept in `NAME.before-PID`.

    Raises `StorageError` if the disk refuses. After any exception from the block `directory` is as it was before and
    the temporary one is gone.
    """
    directory = Path(os.path.realpath(directory))
    partial = beside(directory, "partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        for old in directory.parent.glob(f".{glob.escape(directory.name)}.replaced-*"):
            _restore(old, directory)
        if partial.exists():  # left by a dead process that had our process id
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        _seal(partial)
        _take_place(partial, directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise cannot_write(directory, error) from error
        if isinstance(error, StorageError):  # a person never sees the temporary name
            raise StorageError(str(error).replace(str(partial), str(directory))) from error
        raise


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a complete directory.

    Raises `CheckpointError` if `directory` does not exist, has no manifest, or has one that makes no sense.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {'not a directory' if os.path.lexists(directory) else 'does not exist'}")
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {MANIFEST}; not a checkpoint, or an incomplete one")
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too long for a manifest")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON; the checkpoint is damaged") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(values).__name__}")
    try:
        return parse(Manifest, values, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def verify(directory: str | Path, *, hashes: bool = True) -> Manifest:
    """Hold every file against the manifest: it is there, has its size and, with `hashes`, its SHA-256.

    Returns the manifest; files it does not list are not covered. Raises `CheckpointError` naming directory and file.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        if problem := _problem(directory, name, entry, hashes):
            raise CheckpointError(f"{directory}: {name[:200]!r}: {problem}")
    return manifest


def remove(directory: str | Path) -> None:
    """Delete a directory, its manifest first, so that what is left of a failed deletion is never taken as complete.

    A failure is logged and does not raise: training must not end because an old checkpoint could not be deleted.
    """
    directory = Path(directory)
    try:
        (directory / MANIFEST).unlink(missing_ok=True)
        sync_directory(directory)
        shutil.rmtree(directory)
    except OSError as error:
        _log.warning("cannot delete %s: %s", directory, error.strerror or error)


def sweep(parent: Path) -> None:
    """Clear what dead writers left in `parent`. Call it only while nobody else writes there.

    A directory that was being replaced when its writer died is put back. Failures are logged.
    """
    for entry in sorted(parent.iterdir()):
        match = _LEFT_OVER.fullmatch(entry.name)
        if match is None:
            continue
        try:
            if match["kind"] == "replaced":
                _restore(entry, parent / match["name"])
            elif entry.is_dir() and not entry.is_symlink():
                remove(entry)
            else:
                entry.unlink()
        except OSError as error:
            _log.warning("cannot clear %s: %s", entry, error.strerror or error)


def _names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def _seal(directory: Path) -> None:
    """Flush every file to the disk and write the manifest."""
    files = {}
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666  # safetensors makes its files private; follow the umask
    for name in sorted(_names(directory)):
        with open(directory / name, "rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = Entry(size=file.tell(), sha256=digest)
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
    write_atomic(directory / MANIFEST, Manifest(files=files).model_dump_json(indent=1))


def _take_place(new: Path, final: Path) -> None:
    """Rename `new` to `final`; what stood there is moved aside first, because a rename replaces no full directory."""
    old = beside(final, "replaced") if final.exists() else None
    if old is not None:
        if not final.is_dir():
            raise FileExistsError(errno.EEXIST, "it exists and is not a directory")
        os.rename(final, old)
    try:
        os.rename(new, final)
    except OSError:
        if old is not None:
            os.rename(old, final)
        raise
    sync_directory(final.parent)
    if old is not None:
        _discard(old, final)


def _restore(old: Path, final: Path) -> None:
    """Resolve a replacement that was cut short: put `old` back, or discard it if the new one made it."""
    if final.exists():
        _discard(old, final)
    else:
        os.rename(old, final)


def _discard(old: Path, final: Path) -> None:
    """Delete the directory that `final` replaced, unless it holds files that are not a checkpoint's."""
    try:
        listed = set(read_manifest(old).files)
    except CheckpointError:
        listed = set()
    foreign = _names(old) - listed - _names(final) - {MANIFEST}
    if foreign:
        kept = final.with_name(f"{final.name}.before-{os.getpid()}")
        _log.warning("%s held files that are not a checkpoint's (%s, …); kept in %s", final, min(foreign), kept)
        os.rename(old, kept)
    else:
        remove(old)


def _is_blob(path: Path) -> bool:
    """A link of the hub's cache to its blobs."""
    return os.path.realpath(path) != str(path) and "blobs" in Path(os.path.realpath(path)).parent.name and within(path)


def _problem(directory: Path, name: str, entry: Entry, hashes: bool) -> str | None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        return "the manifest points out of the directory"
    path = directory / name
    try:
        straight = os.path.join(os.path.realpath(directory), *PurePosixPath(name).parts)
        blob = path.parent == directory and _is_blob(path)
        if os.path.realpath(path) != straight and not blob:
            return "a symbolic link, which a checkpoint may not hold"
        status = path.stat() if blob else path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size != entry.size:
            return f"{status.st_size} bytes where the manifest says {entry.size}; truncated or changed"
        if hashes:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    return "its SHA-256 is not the manifest's; damaged or changed"
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None
