"""The library's interface (native/manyhands.h) as ctypes: structures, functions, codes; and whether a library has it.

What is written here twice with C++ is compared when a library is loaded: it says how it was compiled
(native/layout.cpp), and `difference` finds what is not the same.
"""

import ctypes
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from itertools import zip_longest
from typing import Any

from manyhands.config.packing import FORMATS, TRAITS, Format

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
FORMAT_CODES = {name: code for code, name in enumerate(FORMATS)}
PLAIN = {"plain float32": 32, "plain bf16": 16, "plain float32 taken as bf16": 32}
"""Weights that are not packed, with the bits of each: their codes follow those of the packed formats."""
PLAIN_FLOAT32, PLAIN_BF16, PLAIN_ROUNDED = range(len(FORMATS), len(FORMATS) + len(PLAIN))
ACTIVATION_CODES = {"swiglu": 0, "swiglu_oai": 1, "geglu": 2, "geglu_tanh": 3, "gelu": 4, "relu": 5}
STEP_KINDS = (
    "norm",
    "linears",
    "rope_and_cache",
    "attend",
    "route",
    "experts",
    "add",
    "activate",
    "latent_products",
    "latent_rope_and_cache",
    "fetch",
)
"""What a call of `mh_steps` may be made of, by code."""


class CMatrix(Structure):
    """`mh_matrix`."""

    _fields_ = [
        (name, c_int64) for name in ("outputs", "inputs", "parts", "format", "group", "weight", "scales", "bias")
    ]


class CExperts(Structure):
    """`mh_experts`."""

    _fields_ = [
        ("table", c_void_p),
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

    _fields_ = [("level", c_int64), ("threads", c_int64), ("exact", c_int64)]


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
                *("k_size", "v_size", "dtype", "groups", "k_width", "v_width", "block"),
                *("k_block", "v_block", "k_group", "v_group", "k_row", "v_row"),
            )
        ),
    ]


class CSequences(Structure):
    """`mh_sequences`."""

    _fields_ = [
        ("count", c_int64),
        *((name, c_void_p) for name in ("begin", "first", "table", "blocks")),
        ("entries", c_int64),
        ("start", c_void_p),
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
        *((name, c_int64) for name in ("heads", "window")),
        ("sinks", c_void_p),
        ("scale", c_double),
        ("cap", c_double),
    ]


class CLatent(Structure):
    """`mh_latent`."""

    _fields_ = [
        ("weight", c_void_p),
        *((name, c_int64) for name in ("size", "dtype", "heads", "nope", "value", "width")),
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

    _fields_ = [("kind", c_int64), ("a", c_void_p * 8), ("n", c_int64 * 2), ("factor", c_double)]


class CFetch(Structure):
    """`mh_fetch`."""

    _fields_ = [("begin", c_void_p), ("wait", c_void_p), ("context", c_void_p), ("layer", c_int64)]


STRUCTURES: tuple[type[Structure], ...] = (
    *(CMatrix, CExperts, CStacked, CLinear, CRows, CRouting, CGradients, CRun),
    *(CNorm, CCache, CSequences, CRotation, CAttention, CLatent, CRouter, CStep, CFetch),
)
_Experts, _Stacked, _Routing, _Rows, _Run = map(POINTER, (CExperts, CStacked, CRouting, CRows, CRun))

CALLS: dict[str, list[Any]] = {
    "mh_forward": [_Experts, _Stacked, _Routing, _Rows, _Rows, c_void_p, c_int64, _Run],
    "mh_backward": [
        *(_Experts, _Stacked, _Routing, _Rows, _Rows, c_void_p, c_int64, _Rows),
        *(POINTER(CGradients), _Run),
    ],
    "mh_linear_forward": [POINTER(CLinear), _Rows, _Rows, _Run],
    "mh_steps": [POINTER(CStep), c_int64, _Run],
    "mh_linears": [c_void_p, c_int64, _Rows, c_void_p, _Run],
    "mh_rms_norm": [POINTER(CNorm), _Rows, _Rows, _Run],
    "mh_rope_and_cache": [
        *(_Rows, _Rows, _Rows, POINTER(CSequences)),
        *(POINTER(CRotation), POINTER(CCache), c_void_p, _Run),
    ],
    "mh_attend": [POINTER(CAttention), POINTER(CSequences), c_void_p, POINTER(CCache), c_void_p, _Run],
    "mh_latent_products": [POINTER(CLatent), c_int64, _Rows, _Rows, _Run],
    "mh_latent_rope_and_cache": [
        *(POINTER(CLatent), _Rows, _Rows, POINTER(CSequences)),
        *(POINTER(CRotation), POINTER(CCache), _Rows, _Run),
    ],
    "mh_route": [POINTER(CRouter), _Rows, c_void_p, c_void_p, c_void_p, c_void_p, _Run],
}
"""Functions with their arguments; each gives an error code."""

_TYPES = {c_int: "int32", c_int64: "int64", c_double: "double", c_void_p: "pointer"}


def _text(kind: Any) -> str:
    """A type as `native/layout.cpp` writes it."""
    if kind in _TYPES:
        return _TYPES[kind]
    if issubclass(kind, Structure):
        return f"mh_{kind.__name__[1:].lower()}"
    if issubclass(kind, ctypes.Array):
        return f"{_text(kind._type_)}[{kind._length_}]"
    return f"{_text(kind._type_)}*"


def _format(name: Format) -> str:
    t = TRAITS[name]
    half = " half" if t.scale == "fp16" else ""
    scale = f" scale {t.scale_bytes}{half} by {'group' if t.grouped else 'output'}" if t.scale else ""
    return f"{name} {t.bits} bits{scale}"


def layout() -> str:
    """The interface in text, as `mh_layout` gives the library's."""
    lines = []
    for struct in STRUCTURES:
        declared: Any = struct._fields_
        fields = [f"{name} {_text(kind)} at {getattr(struct, name).offset}" for name, kind in declared]
        lines.append((_text(struct), [f"{ctypes.sizeof(struct)} bytes", *fields]))
    lines += [(name, ["gives int32", *map(_text, arguments)]) for name, arguments in CALLS.items()]
    lines.append(("formats", [*map(_format, FORMATS), *(f"{name} {bits} bits" for name, bits in PLAIN.items())]))
    lines += [("activations", list(ACTIVATION_CODES)), ("levels", list(LEVELS)), ("steps", list(STEP_KINDS))]
    return "".join(f"{name}: {', '.join(parts)}\n" for name, parts in lines)


def difference(theirs: str) -> str | None:
    """The first thing in which a library's layout is not ours, in one clause; None where they are the same."""
    ours = layout()
    if theirs == ours:
        return None
    lines = zip_longest(ours.splitlines(), theirs.splitlines(), fillvalue="")
    mine, other = next((a, b) for a, b in lines if a != b)
    name = (mine or other).partition(": ")[0]
    parts = (line.partition(": ")[2].split(", ") for line in (mine, other))
    pairs = zip_longest(*parts, fillvalue="nothing")
    return next(f"{name}: {b or 'nothing'} in the library, {a or 'nothing'} here" for a, b in pairs if a != b)
