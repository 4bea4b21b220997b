"""What a disk reads per second past the page cache: in order, and records at random places, as experts are read.

No torch. A figure is the best of short trials: others' work can only make it slower.
"""

import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from manyhands.errors import UserError
from manyhands.system import forget, read_at

RECORD_BYTES = 1 << 20
"""Of a random read, where nobody says how large an expert is."""
THREADS = 4
"""That read at a time, as the expert store's do."""
_PAGE = 4096
_FILE_BYTES = 1 << 28
_BLOCK = 1 << 22
_TRIAL_SECONDS = 0.5
_TRIALS = 3


def measure_disk(directory: Path, record_bytes: int = RECORD_BYTES) -> tuple[float, float] | None:
    """(in order, at random) bytes per second, on a file that is made in `directory` and removed; None if it cannot be.

    `directory` is made if need be.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stat = os.statvfs(directory)
        if stat.f_bavail * stat.f_frsize < 4 * _FILE_BYTES:
            return None
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".disk-") as file:
            block = os.urandom(_BLOCK)
            for _ in range(_FILE_BYTES // _BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return max(_in_order(file.name) for _ in range(_TRIALS)), random_rate(file.name, record_bytes)
    except (OSError, AttributeError):
        return None


def random_rate(path: str | Path, record_bytes: int = RECORD_BYTES) -> float:
    """Bytes per second of reading records at random places of a file, `THREADS` at a time.

    A record takes whole pages. Raises `UserError` for a file that cannot be read or is smaller than 16 records.
    """
    record = -(-record_bytes // _PAGE) * _PAGE
    try:
        size = os.stat(path).st_size
        if not Path(path).is_file() or size < 16 * record:
            raise UserError(f"{path}: expected a file of at least 16 records of {record:,} bytes")
        return max(_at_random(path, size, record) for _ in range(_TRIALS))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _in_order(path: str) -> float:
    with _opened(path) as descriptor:

        def read(offset: int) -> int:
            with mmap.mmap(-1, _BLOCK) as buffer:
                return read_at(descriptor, memoryview(buffer), offset)

        start = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            total = sum(pool.map(read, range(0, _FILE_BYTES, _BLOCK)))
        return total / (time.perf_counter() - start)


def _at_random(path: str | Path, size: int, record: int) -> float:
    with _opened(path) as descriptor:
        end = time.perf_counter() + _TRIAL_SECONDS

        def reader(seed: int) -> int:
            places, total = random.Random(seed), 0
            with mmap.mmap(-1, record) as buffer:
                while time.perf_counter() < end:
                    total += read_at(
                        descriptor, memoryview(buffer), places.randrange((size - record) // _PAGE + 1) * _PAGE
                    )
            return total

        start = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            total = sum(pool.map(reader, range(THREADS)))
        return total / (time.perf_counter() - start)


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    """Past the page cache where that can be (page-aligned memory and offsets); else after dropping it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        forget(descriptor, 0, 0)
        yield descriptor
    finally:
        os.close(descriptor)
