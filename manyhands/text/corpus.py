"""Documents from where people keep text: files, folders, globs, the standard library, Hugging Face data sets.

    read_documents(["notes/", "books/**/*.txt", "stdlib", "hf:roneneldan/TinyStories"])

The order is fixed (sources as given, files sorted within one), and names are relative to the source, so the
same text gives the same documents, and the same split, wherever it lies on the disk.
"""

import codecs
import glob
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from manyhands.errors import DataError
from manyhands.text.document import Document
from manyhands.text.formats import SUFFIXES, WHOLE, known_suffix, memory_for_text, read_file
from manyhands.text.hub import read_hub

_log = logging.getLogger(__name__)
_SHOWN = 3  # names of files that were left out
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def read_documents(
    sources: Sequence[str], text_field: str = "text", say: Callable[[str], None] = _log.warning
) -> list[Document]:
    """Every document of every source that has any text; a file that two sources share is read once.

    A source is `stdlib` (the sources of this Python, without their tests), a file, a folder (recursive; hidden
    files and folders are skipped), a glob (`**` too), or `hf:NAME` (see `hub.py`). One document per .txt, .md
    and .py file; one per row of .jsonl, .jsonl.gz and .parquet, from `text_field`. A path called `stdlib` is
    written `./stdlib`.

    Of a folder or a glob, files of unknown kinds and texts that are not UTF-8 are left out; `say` gets a line of each.

    Raises `DataError` naming the source, or the file and the line; also for more text than half of this machine's
    memory, and for a file that holds far more of it than it has bytes on the disk.
    """
    if not sources:
        raise DataError("no data sources given; name files, folders, globs, 'stdlib' or hf:NAME")
    documents: list[Document] = []
    room = most = memory_for_text()
    seen: set[Path] = set()
    for source in sources:
        before, repeated = len(documents), False
        if source.startswith("hf:"):
            documents += read_hub(source, text_field)
        else:
            found, unknown = files_of(source)
            alone = Path(source).expanduser().is_file()
            undecodable = []
            for path, name in found:
                real = path.resolve()
                repeated |= real in seen
                if real not in seen:
                    seen.add(real)
                    if not alone and not _decodable(path):
                        undecodable.append(name)
                        continue
                    for document in read_file(path, name, text_field):
                        documents.append(document)
                        room -= len(document.text)
                        if room < 0:
                            raise DataError(
                                f"{path}: up to here the texts are longer than half of the memory ({most >> 20:,} MiB)"
                            )
            if source != "stdlib":
                say_left_out(say, source, unknown)
                say_left_out(say, source, undecodable, "not UTF-8 text")
        documents[before:] = [document for document in documents[before:] if document.text.strip()]
        if len(documents) == before and not repeated:
            raise DataError(f"{source}: there is no text in it")
    return documents


def say_left_out(
    say: Callable[[str], None],
    source: str,
    names: Sequence[str],
    why: str = f"of an unknown kind; known are {', '.join(SUFFIXES)}",
) -> None:
    """One line of the files of a source that are not read, if there are any."""
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        say(f"{source}: left out {len(names):,} file{'s' if len(names) > 1 else ''} ({shown}): {why}")


def _decodable(path: Path) -> bool:
    """Whether a file that is one text is UTF-8; rows say for themselves, with their number."""
    if not path.name.lower().endswith(WHOLE):
        return True
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return True


def files_of(source: str) -> tuple[list[tuple[Path, str]], list[str]]:
    """The files of one source and their names, sorted by name, never empty; and the names of those of unknown kinds."""
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [(path, name) for path, name in _walk(root, _NOT_LIBRARY) if name.endswith(".py")]
        if not found:
            raise DataError(f"stdlib: no .py files under {root}; name files or folders instead")
        return found, []
    path = Path(source).expanduser()
    if path.is_file():
        if not known_suffix(path):
            raise DataError(f"{source}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [(path, path.name)], []
    if path.is_dir():
        found, what = list(_walk(path, set())), "in this folder"
    elif glob.has_magic(source):
        found, what = list(_matches(str(path))), "matches"
    else:
        rows = ": rows are learnt by a run with a section rows" if source == "stdlib-docstrings" else ""
        raise DataError(f"{source}: no such file or folder (or 'stdlib', or hf:NAME){rows}")
    unknown = sorted(name for file, name in found if not known_suffix(file))
    found = sorted(((file, name) for file, name in found if known_suffix(file)), key=lambda pair: pair[1])
    if not found:
        raise DataError(f"{source}: no file {what} of a known kind: {', '.join(SUFFIXES)}")
    return found, unknown


def _walk(root: Path, leave_out: set[str]) -> Iterator[tuple[Path, str]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in leave_out and not name.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if not file.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _matches(pattern: str) -> Iterator[tuple[Path, str]]:
    """Files a glob matches, named from the first part of the pattern that has a wildcard."""
    parts = Path(pattern).parts
    root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    for match in sorted(glob.glob(pattern, recursive=True)):
        if Path(match).is_file():
            yield Path(match), Path(match).relative_to(root).as_posix()
