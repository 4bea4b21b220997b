"""Let the C library keep freed memory while training.

glibc hands every freed block over 32 MB straight back to the kernel, which must zero each page when the next step asks
for it again. Keeping it made a training step's large products up to 1.6 times as fast (measured: docs/performance.md).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for giving memory back. True if it worked; elsewhere nothing happens.

    For a process that trains and ends: its resident memory stays at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no C library to load, or one without mallopt (musl)
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
