"""What was typed in `manyhands chat`, kept for the next session: in the user's state folder, for nobody else to read.

A line is an entry; the newest `MOST` stay. Two chats at a time lose nothing: each adds its own lines to what is there.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from manyhands.cli.loudness import LOG

MOST = 1000
_LONGEST = 4096
"""Characters of an entry that is kept: a pasted book is not one."""
_BYTES = MOST * _LONGEST * 4


def history_file() -> Path:
    """`manyhands/chat_history` in XDG_STATE_HOME, by default ~/.local/state; on Windows in LOCALAPPDATA."""
    if sys.platform == "win32":
        state = os.environ.get("LOCALAPPDATA", "")
    else:
        state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "manyhands" / "chat_history"


@contextmanager
def kept_history(path: Path) -> Iterator[None]:
    """Behind the arrow keys what was typed before; at the end the file has what was typed inside the block too.

    Nothing where there is no readline (Windows). A file that cannot be read or written is said, and no reason to stop.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    with _said(path, "read"):
        for line in read_history(path):
            readline.add_history(line)
    known = readline.get_current_history_length()
    try:
        yield
    finally:
        now = readline.get_current_history_length()
        with _said(path, "written"):
            add_history(path, [readline.get_history_item(number + 1) or "" for number in range(known, now)])


def read_history(path: Path) -> list[str]:
    """The entries, the newest last; none if there is no file. Raises `OSError`."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _BYTES))
            data = file.read(_BYTES)
    except FileNotFoundError:
        return []
    return [line for line in data.decode("utf-8", "replace").replace("\0", "").split("\n") if line][-MOST:]


def add_history(path: Path, typed: Sequence[str]) -> None:
    """Put `typed` behind what the file holds, whole or not at all, for the user alone. Raises `OSError`."""
    lines = [line for text in typed for line in text.splitlines() if line.strip() and len(line) <= _LONGEST]
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    every = [*read_history(path), *lines][-MOST:]
    handle, partial = tempfile.mkstemp(prefix=".chat_history.", dir=path.parent)  # mode 600
    try:
        with open(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write("\n".join(every) + "\n")
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


@contextmanager
def _said(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        LOG.warning("manyhands: the history %s cannot be %s: %s", path, what, error.strerror or error)
