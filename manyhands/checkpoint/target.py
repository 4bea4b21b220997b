"""The one decision about what may be written over: nothing that exists, unless we made it and the user asked.

A directory to write is free if it does not exist or is an empty folder. With `overwrite` it may also be one that this
program wrote: its manifest lists every file in it, and every byte is as it was written; a manifest beside somebody's
files does not make them ours. What is read is never written: not the same directory, by whatever name, nor one inside
the other.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from manyhands.checkpoint.manifest import MANIFEST, verify
from manyhands.errors import CheckpointError, UserError
from manyhands.files import check_replaceable


def claim(
    target: str | Path, *, overwrite: bool = False, sources: Iterable[str | Path] = (), hashes: bool = True
) -> Path:
    """The real path of a directory that may be written, after every check; touches nothing.

    Raises `UserError` in one line: what is in the way, and what would be right.
    """
    if str(target).startswith("~"):
        raise UserError(f"{target}: ~ reached the program as it is; write $HOME, or ./{target} for that very name")
    if not str(target) or "\0" in str(target):
        raise UserError("the target has no name; name a directory to write")
    real = Path(os.path.realpath(target))
    _check_place(target, real)
    for source in sources:
        _check_apart(target, real, Path(source))
    if not real.exists() or not any(real.iterdir()):
        return real
    problem = _not_ours(real, hashes)
    if overwrite and problem is None:
        return real
    if overwrite:
        raise UserError(f"{target}: {problem}, so it is not all this program's and stays; choose another directory")
    hint = "choose another directory" + ("" if problem else ", or --overwrite (overwrite=True) to replace it")
    raise UserError(f"{target}: exists and is not empty; {hint}")


def claim_file(target: str | Path, mark: bytes, *, overwrite: bool = False, sources: Iterable[str | Path] = ()) -> Path:
    """The same of a single file; one that this program made bears `mark` near its head."""
    if str(target).startswith("~"):
        raise UserError(f"{target}: ~ reached the program as it is; write $HOME, or ./{target} for that very name")
    if not str(target) or "\0" in str(target):
        raise UserError("the target has no name; name a file to write")
    real = Path(os.path.realpath(target))
    for source in sources:
        if Path(source).exists() and _same(real, Path(os.path.realpath(source))):
            raise UserError(f"{target}: the source and the target are the same file; choose another target")
        if Path(source).is_dir() and any(_same(place, Path(source)) for place in real.parents):
            raise UserError(f"{target}: lies inside the source {source}; choose a target outside it")
    if not os.path.lexists(target):
        return real
    check_replaceable(target, mark)
    if not overwrite:
        raise UserError(f"{target}: exists; choose another name, or --overwrite (overwrite=True) to replace it")
    return real


def _check_place(target: str | Path, real: Path) -> None:
    """A directory could stand at `real`, and it is nobody's anchor."""
    try:
        status = os.stat(real)
    except FileNotFoundError:
        if os.path.lexists(target):
            raise UserError(f"{target}: a link to nothing; remove it, or choose another name") from None
    except NotADirectoryError:
        pass  # said below, of the parent
    except (OSError, ValueError) as error:
        raise UserError(f"{target}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    else:
        if not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{target}: exists and is not a directory; choose another name")
        if os.path.ismount(real):
            raise UserError(f"{target}: a mount point, which cannot be replaced; name a directory in it")
        here = Path.cwd()
        if any(_same(real, place) for place in (here, *here.parents)):
            raise UserError(f"{target}: the folder you are in, or one around it; name a new directory")
        if not os.access(real, os.R_OK | os.X_OK):
            raise UserError(f"{target}: cannot be looked into: Permission denied")
    parent = next(place for place in real.parents if os.path.lexists(place))
    if not parent.is_dir():
        raise UserError(f"{target}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target}: cannot be written: no permission to write in {parent}")


def _check_apart(target: str | Path, real: Path, source: Path) -> None:
    if not source.exists():
        return  # a name on the hub, or an error that whoever reads it reports
    origin = Path(os.path.realpath(source))
    if _same(real, origin):
        raise UserError(f"{target}: the source and the target are the same directory; choose another target")
    if any(_same(place, origin) for place in real.parents):
        raise UserError(f"{target}: lies inside the source {source}; choose a target outside it")
    if any(_same(place, real) for place in origin.parents):
        raise UserError(f"{target}: holds the source {source}; choose a target outside it")


def _same(a: Path, b: Path) -> bool:
    """By device and inode, so that spelling, case and links do not matter."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return a == b


def _not_ours(directory: Path, hashes: bool) -> str | None:
    """Why a directory is not, whole and as it was, what this program wrote; None if it is."""
    try:
        manifest = verify(directory, hashes=hashes, exact=True)
    except CheckpointError as error:
        return str(error).removeprefix(f"{directory}: ")
    foreign = next(foreign_in(directory, {*manifest.files, MANIFEST}), None)
    return None if foreign is None else f"it holds {foreign!r}, which is not in its {MANIFEST}"


def foreign_in(directory: Path, known: set[str]) -> Iterator[str]:
    """Files, links and empty folders that are not `known`."""
    folders = {str(parent) for name in known for parent in Path(name).parents}
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if name not in known and not (path.is_dir() and not path.is_symlink() and name in folders):
            yield name
