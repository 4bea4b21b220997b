"""The shared library: found beside this file, its interface (native/manyhands.h) declared, its errors raised."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

from manyhands.errors import ConfigError, ManyhandsError

ABI = 3
LEVELS = ("portable", "avx2", "avx512", "amx")
VERIFIED = ("portable", "avx2", "avx512")
"""Levels that may run by default. portable and avx2 ran the whole suite. avx512 ran native/test/driver.cpp under an
emulator of the machine (`scripts/emulate_levels.sh`), right, and was never timed: no such CPU was at hand. amx ran
there too, but rounds rows to bf16 beside every format except float32, which the suite's float32 tolerances do not
allow: it is taken only by name."""
FORMAT_CODES = {"float32": 0, "bf16": 1, "int8": 2, "int4": 3}
PLAIN_FLOAT32, PLAIN_BF16, PLAIN_ROUNDED = 4, 5, 6
ACTIVATION_CODES = {"swiglu": 0, "swiglu_oai": 1, "geglu": 2, "geglu_tanh": 3, "gelu": 4, "relu": 5}
NAME = "libmanyhands.so"
_BAD_ROUTING = 4


class CMatrix(Structure):
    """`mh_matrix`."""

    _fields_ = [
        (name, c_int64) for name in ("outputs", "inputs", "parts", "format", "group", "weight", "scales", "bias")
    ]


class CExperts(Structure):
    """`mh_experts`."""

    _fields_ = [
        ("records", c_void_p),
        ("bytes", c_int64),
        ("num_experts", c_int64),
        ("record_bytes", c_int64),
        ("activation", c_int64),
        ("up", CMatrix),
        ("down", CMatrix),
    ]


class CStacked(Structure):
    """`mh_stacked`."""

    _fields_ = [
        *((name, c_void_p) for name in ("up", "down", "up_bias", "down_bias")),
        *((name, c_int64) for name in ("dtype", "num_experts", "hidden_size", "expert_size", "activation")),
    ]


class CLinear(Structure):
    """`mh_linear`."""

    _fields_ = [("record", c_void_p), ("bytes", c_int64), ("weight", CMatrix), ("bias", c_void_p)]


class CRows(Structure):
    """`mh_rows`."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int64),
        ("count", c_int64),
        ("width", c_int64),
        ("stride", c_int64),
    ]


class CRouting(Structure):
    """`mh_routing`."""

    _fields_ = [
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("kept", c_void_p),
        ("tokens", c_int64),
        ("per_token", c_int64),
    ]


class CGradients(Structure):
    """`mh_gradients`."""

    _fields_ = [(name, c_void_p) for name in ("weights", "up", "down", "up_bias", "down_bias")]


class CRun(Structure):
    """`mh_run`."""

    _fields_ = [("level", c_int64), ("threads", c_int64)]


class CNorm(Structure):
    """`mh_norm`."""

    _fields_ = [("weight", c_void_p), ("dtype", c_int64), ("width", c_int64), ("eps", c_double)]


class CCache(Structure):
    """`mh_cache`."""

    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        *(
            (name, c_int64)
            for name in (
                *("k_size", "v_size", "dtype", "groups", "k_width", "v_width"),
                *("k_batch", "v_batch", "k_group", "v_group", "k_row", "v_row"),
            )
        ),
    ]


class CRotation(Structure):
    """`mh_rotation`."""

    _fields_ = [
        ("cos", c_void_p),
        ("sin", c_void_p),
        *((name, c_int64) for name in ("width", "positions", "interleave")),
        ("q_norm", CNorm),
        ("k_norm", CNorm),
        ("norms", c_int64),
    ]


class CAttention(Structure):
    """`mh_attention`."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "queries", "heads", "length")),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_query", c_int64),
        ("sinks", c_void_p),
        ("scale", c_double),
        ("cap", c_double),
    ]


class CRouter(Structure):
    """`mh_router`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "logit_bias", "choice_bias")),
        *(
            (name, c_int64)
            for name in (
                *("experts", "width", "per_token", "sigmoid"),
                *("groups", "topk_group", "best_of_group", "renormalise"),
            )
        ),
        ("scaling", c_double),
    ]


class CStep(Structure):
    """`mh_step`."""

    _fields_ = [("kind", c_int64), ("a", c_void_p * 6), ("n", c_int64 * 2), ("factor", c_double)]


_CALLS: dict[str, list[object]] = {
    "mh_forward": [
        POINTER(CExperts),
        POINTER(CStacked),
        POINTER(CRouting),
        POINTER(CRows),
        POINTER(CRows),
        c_void_p,
        c_int64,
        POINTER(CRun),
    ],
    "mh_backward": [
        POINTER(CExperts),
        POINTER(CStacked),
        POINTER(CRouting),
        POINTER(CRows),
        POINTER(CRows),
        c_void_p,
        c_int64,
        POINTER(CRows),
        POINTER(CGradients),
        POINTER(CRun),
    ],
    "mh_linear_forward": [POINTER(CLinear), POINTER(CRows), POINTER(CRows), POINTER(CRun)],
    "mh_steps": [POINTER(CStep), c_int64, POINTER(CRun)],
    "mh_linears": [c_void_p, c_int64, POINTER(CRows), c_void_p, POINTER(CRun)],
    "mh_rms_norm": [POINTER(CNorm), POINTER(CRows), POINTER(CRows), POINTER(CRun)],
    "mh_rope_and_cache": [
        *(POINTER(CRows), POINTER(CRows), POINTER(CRows), c_int64, c_int64),
        *(POINTER(CRotation), POINTER(CCache), c_void_p, POINTER(CRun)),
    ],
    "mh_attend": [POINTER(CAttention), c_void_p, POINTER(CCache), c_void_p, POINTER(CRun)],
    "mh_route": [POINTER(CRouter), POINTER(CRows), c_void_p, c_void_p, c_void_p, c_void_p, POINTER(CRun)],
}


@cache
def _here() -> ctypes.CDLL | str:
    """The library beside this file, or why there is none."""
    path = Path(__file__).with_name(NAME)
    if not path.is_file():
        return "it was not built: install again with a C++ compiler (g++ 12 or clang) present"
    try:
        library = ctypes.CDLL(str(path))
        library.mh_abi.restype = library.mh_levels.restype = c_int64
        library.mh_error.restype = c_char_p
        if library.mh_abi() != ABI:
            return "it was built from other sources: install again"
        for name, arguments in _CALLS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError) as error:
        return f"it does not load: {error}"
    return library


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
    """Call a function of the library; what it refuses becomes a `ConfigError` with its message."""
    code = getattr(library(), name)(*arguments)
    if code:
        message = library().mh_error().decode(errors="replace")
        raise (IndexError if code == _BAD_ROUTING else MemoryError if code == 3 else NativeError)(f"{name}: {message}")


class NativeError(ManyhandsError):
    """The kernels refused what they were given."""
