"""The shared library: loaded from this folder, compared with what `structs.py` declares, its errors raised."""

import ctypes
import threading
from ctypes import c_char_p, c_int, c_int64
from functools import cache
from pathlib import Path

import torch

from manyhands.errors import ConfigError, ManyhandsError
from manyhands.kernels.native import structs
from manyhands.kernels.native.structs import (
    ACTIVATION_CODES,
    LEVELS,
    CAttention,
    CCache,
    CExperts,
    CFetch,
    CGradients,
    CLatent,
    CLinear,
    CMatrix,
    CNorm,
    CRotation,
    CRouter,
    CRouting,
    CRows,
    CRun,
    CSequences,
    CStacked,
    CStep,
)

__all__ = [
    "ACTIVATION_CODES",
    "LEVELS",
    "VERIFIED",
    "CAttention",
    "CCache",
    "CExperts",
    "CFetch",
    "CGradients",
    "CLatent",
    "CLinear",
    "CMatrix",
    "CNorm",
    "CRotation",
    "CRouter",
    "CRouting",
    "CRows",
    "CRun",
    "CSequences",
    "CStacked",
    "CStep",
    "NativeError",
    "available",
    "call",
    "default_level",
    "level_code",
    "levels",
    "library",
    "missing",
]

ABI = 6
"""As in native/manyhands.h: one more where a meaning changed that the layout does not show."""
VERIFIED = LEVELS
"""Levels that may run by default: all, since all pass the kernels' tests on hardware."""
NAME = "libmanyhands.so"
_NO_MEMORY, _BAD_ROUTING, _FETCH_FAILED = 3, 4, 6


class _Caught(threading.local):
    error: BaseException | None = None


caught = _Caught()
"""What a callback raised in this thread's call of the library: C++ carries a code alone."""


@cache
def _here() -> ctypes.CDLL | str:
    """The library in this folder, or why there is none."""
    path = Path(__file__).with_name(NAME)
    if not path.is_file():
        return _not_built()
    try:
        library = ctypes.CDLL(str(path))
        library.mh_abi.restype = library.mh_levels.restype = c_int64
        if (abi := library.mh_abi()) != ABI:
            return f"the library was built from other sources (interface {abi}, not {ABI}): install again"
        library.mh_error.restype = library.mh_layout.restype = c_char_p
        if (wrong := structs.difference(library.mh_layout().decode())) is not None:
            return f"the library was built from other sources ({wrong}): install again"
        for name, arguments in structs.CALLS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError) as error:
        return f"the library does not load: {error}"
    return library


def _not_built() -> str:
    # Without a cache: what pip built before there was a compiler lies in it, and would be installed again.
    return (
        "this install is without the compiled library; with a C++ compiler (g++ 12 or clang): "
        "MANYHANDS_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps --no-cache-dir --no-binary manyhands "
        "manyhands"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # which cannot be traced
def missing() -> str | None:
    """Why there is no native backend on this machine, in one clause; None where there is one."""
    found = _here()
    return found if isinstance(found, str) else None


def available() -> bool:
    """Whether the library was built and loads."""
    return missing() is None


def library() -> ctypes.CDLL:
    """The library. `ConfigError` where there is none."""
    found = _here()
    if isinstance(found, str):
        raise ConfigError(f"the native expert kernels are not here: {found}")
    return found


def levels() -> list[str]:
    """The levels this CPU can run, the best last."""
    mask = library().mh_levels()
    return [name for i, name in enumerate(LEVELS) if mask >> i & 1]


@cache
def default_level() -> str:
    """The best verified level of this CPU: what runs unless a level is named."""
    return [name for name in levels() if name in VERIFIED][-1]


def level_code(name: str | None) -> int:
    """The number of a level; -1, the default level, for None. `ConfigError` for a name there is none of."""
    if name is None:
        return -1
    if name not in LEVELS:
        raise ConfigError(f"level = {name!r}: allowed are {', '.join(LEVELS)}")
    return LEVELS.index(name)


def call(name: str, *arguments: object) -> None:
    """Call a function of the library; what it refuses becomes a `NativeError` with its message.

    `IndexError` for a routing to an expert there is none of, `MemoryError`; and what a callback raised, as it is.
    """
    code = getattr(library(), name)(*arguments)
    if code:
        message = library().mh_error().decode(errors="replace")
        error, caught.error = caught.error, None
        if code == _FETCH_FAILED and error is not None:
            raise error
        kinds = {_BAD_ROUTING: IndexError, _NO_MEMORY: MemoryError}
        raise kinds.get(code, NativeError)(f"{name}: {message}")


class NativeError(ManyhandsError):
    """The kernels refused what they were given."""
