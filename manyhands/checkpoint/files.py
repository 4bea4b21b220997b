"""Writes that are complete or did not happen.

A file or directory is made under a hidden name beside its final one (so on the same file system), flushed to the
disk, and renamed. A directory is complete when its `manifest.json` is there: it is written last, taken away first, and
holds the size and SHA-256 of every file. What may be written over is `target.claim`'s decision; what may be deleted
is what a manifest lists, or a mark of ours in it says.

    .NAME.partial-PID     being written, `.building` in it; worthless once its process is dead
    .NAME.replaced-PID    what stood at NAME, for the instant in which the new one takes its place
    NAME/.deleting        the manifest of a directory that is being deleted
"""

import glob
import hashlib
import itertools
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from manyhands.checkpoint.manifest import MANIFEST, Entry, Manifest, names_in, read_manifest, verify
from manyhands.checkpoint.target import claim, foreign_in
from manyhands.errors import CheckpointError, StorageError
from manyhands.files import beside, cannot_write, sync_directory, write_atomic

BUILDING = ".building"
_DELETING = ".deleting"
_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-\d+(-\d+)?")
_CHECKPOINT = re.compile(
    r"(config|state|tokenizer)\.json|(model.*|optimizer|rng(-\d+-of-\d+)?)\.safetensors(\.index\.json)?"
)
"""A training checkpoint's files, for one that an older version half wrote or half deleted without a mark."""
_log = logging.getLogger(__name__)


@contextmanager
def building(
    directory: str | Path, *, overwrite: bool = False, sources: Iterable[str | Path] = (), own: bool = False
) -> Iterator[Path]:
    """Fill the directory this yields; when the block ends, it appears at `directory`, complete, in one rename.

    `overwrite` and `sources` (what is read meanwhile) are `claim`'s: what exists stays, unless it is this program's
    and `overwrite` is given. With `own` the caller answers that a directory of this name is its own, damaged or not:
    a run's checkpoint, under the run's lock; files in it that no manifest knows are kept in `NAME.before-PID`.

    Raises `UserError` as `claim` does, before anything is made, and `StorageError` if the disk refuses. After any
    exception from the block `directory` is as it was before and the temporary one is gone.
    """
    sources = list(sources)
    named, directory = (
        directory,
        Path(os.path.realpath(directory)) if own else claim(directory, overwrite=overwrite, sources=sources),
    )
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _finish_replacements(directory)
        partial = _fresh(directory, "partial")
        (partial / BUILDING).touch()
        yield partial
        _seal(partial)
        if not own:
            claim(named, overwrite=overwrite, sources=sources, hashes=False)  # it may have come meanwhile
        (partial / BUILDING).unlink()
        _take_place(partial, directory)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise cannot_write(directory, error) from error
        if isinstance(error, StorageError):  # a person never sees the temporary name
            raise StorageError(str(error).replace(str(partial), str(directory))) from error
        raise


def written_in(partial: Path) -> list[Path]:
    """What a directory that is being built holds so far, without our mark."""
    return [path for path in partial.iterdir() if path.name != BUILDING]


def remove(directory: str | Path) -> None:
    """Delete a directory that this program wrote, its manifest first, so that the rest is never taken as complete.

    Only what the manifest lists is deleted; other files stay, with the directory, and are named in a warning.
    A failure is logged and does not raise: training must not end because an old checkpoint could not be deleted.
    """
    directory = Path(directory)
    try:
        if (directory / BUILDING).is_file() and _LEFT_OVER.fullmatch(directory.name):
            shutil.rmtree(directory)
            return
        listed = _listed(directory)
        if (directory / MANIFEST).is_file():
            os.replace(directory / MANIFEST, directory / _DELETING)
            sync_directory(directory)
        for name in sorted(names_in(directory)):
            if not (directory / name).is_symlink() and (
                _CHECKPOINT.fullmatch(name) if listed is None else name in listed
            ):
                (directory / name).unlink()
        if kept := names_in(directory) - {_DELETING}:
            _log.warning("%s holds files that are not a checkpoint's (%s, …); they are kept", directory, min(kept))
        folders = [path for path in directory.rglob("*") if path.is_dir() and not path.is_symlink()]
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # not empty
                folder.rmdir()
        (directory / _DELETING).unlink(missing_ok=True)
        if not kept:
            directory.rmdir()
    except OSError as error:
        _log.warning("cannot delete %s: %s", directory, error.strerror or error)


def sweep(parent: Path, ours: re.Pattern[str]) -> None:
    """Clear what dead writers of the names `ours` left in `parent`. Call it only while nobody else writes there.

    A directory that was being replaced when its writer died is put back. Failures are logged.
    """
    for entry in sorted(parent.iterdir()):
        match = _LEFT_OVER.fullmatch(entry.name)
        if match is None or not ours.fullmatch(match["name"]) or entry.is_symlink():
            continue
        try:
            final = parent / match["name"]
            if match["kind"] == "replaced" and not final.exists() and (entry / MANIFEST).is_file():
                os.rename(entry, final)
            elif entry.is_dir():
                remove(entry)
            else:
                entry.unlink()
        except OSError as error:
            _log.warning("cannot clear %s: %s", entry, error.strerror or error)


def _listed(directory: Path) -> set[str] | None:
    """What the manifest of a directory lists, which may be in the middle of its deletion; None if there is none."""
    for name in (MANIFEST, _DELETING):
        if (directory / name).is_file():
            with suppress(CheckpointError):
                return {*read_manifest(directory, name).files, *([] if name == _DELETING else [MANIFEST])}
    return None


def _fresh(final: Path, kind: str) -> Path:
    """Make a hidden directory beside `final` under a name that nobody has."""
    first = beside(final, kind)
    for number in itertools.count():
        path = first if not number else first.with_name(f"{first.name}-{number}")
        with suppress(FileExistsError):  # left by a dead process that had our process id, or not ours at all
            path.mkdir()
            return path
    raise AssertionError


def _seal(directory: Path) -> None:
    """Flush every file to the disk and write the manifest."""
    files = {}
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666  # safetensors makes its files private; follow the umask
    for name in sorted(names_in(directory) - {BUILDING}):
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
    try:
        os.rename(new, final)  # there is none, or an empty one
        old = None
    except OSError:
        if not final.is_dir() or not any(final.iterdir()):
            raise
        old = _fresh(final, "replaced")
        os.rename(final, old)
        try:
            os.rename(new, final)
        except OSError:
            os.rename(old, final)
            raise
    sync_directory(final.parent)
    if old is not None:
        _discard(old, final)


def _finish_replacements(final: Path) -> None:
    """Resolve a replacement that was cut short: put the old one back, or discard it if the new one made it."""
    for old in final.parent.glob(f".{glob.escape(final.name)}.replaced-*"):
        if not _LEFT_OVER.fullmatch(old.name) or old.is_symlink():
            continue
        try:
            verify(old, exact=True)
        except CheckpointError:
            continue  # not ours, or damaged: it stays where it is
        if not final.exists():
            os.rename(old, final)
        else:
            _discard(old, final)


def _discard(old: Path, final: Path) -> None:
    """Delete the directory that `final` replaced, unless it holds files that are not a checkpoint's."""
    listed = _listed(old)
    known = {name for name in names_in(old) if _CHECKPOINT.fullmatch(name)} if listed is None else listed
    foreign = next(foreign_in(old, {*known, MANIFEST, _DELETING}), None)
    if foreign is not None:
        kept = _unused(final.with_name(f"{final.name}.before-{os.getpid()}"))
        _log.warning("%s held files that are not a checkpoint's (%s, …); kept in %s", final, foreign, kept)
        os.rename(old, kept)
    else:
        remove(old)


def _unused(path: Path) -> Path:
    names = (path if not number else path.with_name(f"{path.name}-{number}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))
