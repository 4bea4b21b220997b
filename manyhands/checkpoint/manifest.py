"""What a complete directory holds: the size and SHA-256 of every file, in its `manifest.json`."""

import hashlib
import logging
import os
import stat
import time
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import Strict, parse
from manyhands.errors import CheckpointError, ConfigError
from manyhands.files import GENERATION, within
from manyhands.format import show
from manyhands.strict_json import read_object

MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 4 << 20  # 30,000 files
_EDITABLE = {GENERATION, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
"""Text that people edit on purpose, and that changes no weight, no shape and no token's number; and any `*.md`."""
_EDITS = ("truncated or changed", "damaged or changed", "missing")  # ends of `_problem`'s lines; all else is refused
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


def read_manifest(directory: str | Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a complete directory; `name` is another's only while it is being deleted.

    Raises `CheckpointError` if `directory` does not exist, has no manifest, or has one that makes no sense.
    """
    directory = Path(directory)
    path = directory / name
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {'not a directory' if os.path.lexists(directory) else 'does not exist'}")
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {MANIFEST}; not a checkpoint, or an incomplete one")
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too long for a manifest")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    values = read_object(path, _MANIFEST_LIMIT, CheckpointError)
    try:
        return parse(Manifest, values, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def verify(directory: str | Path, *, hashes: bool = True, exact: bool = False) -> Manifest:
    """Hold every file against the manifest: it is there, has its size and, with `hashes`, its SHA-256.

    Returns the manifest; files it does not list are not covered. Raises `CheckpointError` naming directory and file.
    Text that people edit and that does not change what is computed (`generation_config.json`, a chat template, a
    README) may be edited or missing: that is a warning, and an error only if `exact`.
    """
    directory = Path(directory)
    manifest, began = read_manifest(directory), time.monotonic()
    for name, entry in manifest.files.items():
        problem = _problem(directory, name, entry, hashes)
        if problem is None:
            continue
        editable = name in _EDITABLE or ("/" not in name and name.endswith(".md"))
        if exact or not (editable and problem.endswith(_EDITS)):
            raise CheckpointError(f"{directory}: {name[:200]!r}: {problem}")
        _log.warning(
            "%s: %r is not as it was saved, and is taken as it is; `manyhands convert %s NEW` writes a directory that "
            "records it",
            *(directory, name[:200], directory),
        )
    size = show(sum(entry.size for entry in manifest.files.values()), "B")
    took = show(time.monotonic() - began, "s")
    _log.debug("%s: %d files, %s, are as the manifest says (%s)", directory, len(manifest.files), size, took)
    return manifest


def names_in(directory: Path) -> set[str]:
    """Relative POSIX paths of the files below a directory."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


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
