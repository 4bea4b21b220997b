"""A file that records are read from: past the page cache where that can be, and watched for change.

`O_DIRECT` reads from the disk into the slot. Where a file system has none of it, or none for reads like ours, the file
is read as any other and what the kernel keeps of it is dropped behind each read: either way the memory that a model
takes is its slots, and no second copy in a cache that nobody bounded.
"""

import mmap
import os
from pathlib import Path

from manyhands.errors import DiskError
from manyhands.system import expect_random, forget, read_at

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes, time of the last change in ns."""
_TRIED = 4096


class RecordFile:
    """One open file. `read` may be called from several threads at once.

    Raises `DiskError` where the file cannot be opened.
    """

    def __init__(self, path: Path, direct: bool = True) -> None:
        """`direct` False: never with O_DIRECT."""
        self.path = path
        self._fd = -1
        try:
            self._fd, self.direct = _open(path, direct)
            self._stamp = _stamp(os.fstat(self._fd))
        except OSError as error:
            self.close()
            raise DiskError(f"{path}: cannot be read: {error.strerror or error}") from None

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from a place in the file; how many bytes the kernel gave, which is all of them.

        Raises `DiskError` if the disk refuses, the file ends before, or is not what it was when it was opened.
        """
        done, size = 0, len(view)
        try:
            while done < size:
                count = read_at(self._fd, view[done:], offset + done)
                if count <= 0:
                    break
                done += count
            if not self.direct:
                forget(self._fd, offset, size)
        except OSError as error:
            if gone := self.lost():
                raise DiskError(gone) from None
            where = f"bytes {offset} to {offset + size}"
            raise DiskError(f"{self.path}: {where} cannot be read: {error.strerror or error}") from None
        if gone := self.lost():
            raise DiskError(gone)
        if done < size:
            raise DiskError(f"{self.path}: ends at byte {offset + done}, within a record; it was cut")
        return done

    def lost(self) -> str | None:
        """What became of the file since it was opened, in words; None while it is what it was."""
        try:
            now = _stamp(os.stat(self.path))
        except OSError:
            return f"{self.path}: is gone since the model was loaded: load it again"
        if now == self._stamp:
            return None
        return f"{self.path}: was changed since the model was loaded: load it again"

    def close(self) -> None:
        """No read may be going on. It also closes when nobody holds it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        """Where nobody closed it."""
        self.close()


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if direct and hasattr(os, "O_DIRECT"):
        try:
            fd = os.open(path, flags | os.O_DIRECT)
        except OSError:  # a file system that does not know it; what else is wrong shows below
            pass
        else:
            if _reads(fd):
                return fd, True
            os.close(fd)
    fd = os.open(path, flags)
    expect_random(fd)  # no read-ahead: the next record is another's
    return fd, False


def _reads(fd: int) -> bool:
    """Whether a page can be read as records are: some file systems open with O_DIRECT and refuse this."""
    try:
        with mmap.mmap(-1, _TRIED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
            return os.preadv(fd, [page], 0) > 0
    except OSError:
        return False


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
