"""What this machine can do at most, measured in the run that uses it: bare instructions, and reading memory."""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from manyhands.kernels.native import available, levels, views
from manyhands.kernels.native.library import default_level

UNITS = ("fma256", "maddubs256", "fma512", "dpbusd512", "dpbf16_512", "tdpbf16ps", "tdpbssd")  # as in rates.cpp
OF_LEVEL = {  # of float32, bf16 and integer weights
    "portable": (None, None, None),
    "avx2": ("fma256", "fma256", "maddubs256"),
    "avx512": ("fma512", "fma512", "dpbusd512"),
    "avx512_bf16": ("fma512", "dpbf16_512", "dpbusd512"),
    "amx": ("fma512", "tdpbf16ps", "tdpbssd"),
}


def unit(format: str, level: str) -> str | None:
    """The fastest instruction there is at a level for weights in a format; None: nobody says."""
    return OF_LEVEL[level][{"float32": 0, "bf16": 1}.get(format, 2)]


def unit_rates(threads: int) -> dict[str, float]:
    """Operations per second (a multiply-add is two) of each of this CPU's units, by name; empty without a compiler."""
    if not available():
        return {}
    wanted = {name for level in levels() for name in OF_LEVEL[level] if name}
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "rates.so"
        source = Path(__file__).with_name("rates.cpp")
        command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", "-pthread", str(source), "-o", str(built)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        call = ctypes.CDLL(str(built)).unit_rate
        call.restype = ctypes.c_double
        return {name: call(UNITS.index(name), threads) for name in UNITS if name in wanted}


def read_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second at which this process reads memory, all its threads together: the best of a few sums."""
    block = torch.ones(size // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        best = max(best, size / (time.perf_counter() - started))
    return best


@contextmanager
def at(level: str | None) -> Iterator[str]:
    """The native library at a level unless a call names another; None: as it is. Gives the level's name."""
    known = views.default_level
    name = level or default_level()
    views.default_level = lambda: name  # type: ignore[assignment]
    views._run.cache_clear()
    try:
        yield name
    finally:
        views.default_level = known
        views._run.cache_clear()
