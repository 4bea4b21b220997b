"""What systems call by other names: locks, reading at a place, the page cache, how much memory there is.

Linux is what the tests run on. macOS lacks `posix_fadvise`; Windows lacks that, `flock`, `preadv` and `sysconf`.
"""

import ctypes
import importlib
import os
import threading
from typing import Any


def module(name: str) -> Any:
    """A module of the standard library, or None where this system's Python has none of that name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = module("fcntl"), module("msvcrt")
_reading = threading.Lock()


def hold(descriptor: int) -> None:
    """Lock an open file for this process, or raise `BlockingIOError` at once; the system lets go when it dies."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)  # past the holder's number, which others read
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(*error.args) from None
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)


_LOCKED_BYTE = 1 << 20


def let_go(descriptor: int) -> None:
    """Unlock what `hold` locked."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill the beginning of `view` from a place in a file; how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _reading:  # the place is the descriptor's, whichever thread set it
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)


def forget(descriptor: int, offset: int, size: int) -> None:
    """Let the system drop these bytes of a file from its page cache, where it takes such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def expect_random(descriptor: int) -> None:
    """Say that a file is read at random places: no read-ahead. Where the system takes such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def installed_memory() -> int:
    """Bytes of memory that this machine has."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 6),
    )
