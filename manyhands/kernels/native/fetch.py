"""Experts that are brought into memory while a native call goes on: a `Source` as the library's callbacks.

T tokens, K experts per token, D model width.
"""

from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, Array, addressof, c_int64, c_void_p, cast
from typing import Any

import torch
from torch import Tensor

from manyhands.kernels.native import boundary, library, views
from manyhands.kernels.native.structs import STEP_KINDS, CFetch, CStep
from manyhands.quant import FetchedExperts, Source

_BEGIN = CFUNCTYPE(c_int64, c_void_p, c_int64, POINTER(c_int64), c_int64)
_WAIT = CFUNCTYPE(c_int64, c_void_p, c_int64, c_int64, POINTER(c_void_p))


class Fetch:
    """A source's structure for one layer; good while this object lives."""

    def __init__(self, source: Source, layer: int) -> None:
        def begin(_: Any, layer: int, experts: Any, count: int) -> int:
            return _guarded(lambda: source.begin(layer, experts[:count]))

        def wait(_: Any, layer: int, expert: int, record: Any) -> int:
            def place() -> None:
                record[0] = source.wait(layer, expert)

            return _guarded(place)

        self._callbacks = _BEGIN(begin), _WAIT(wait)
        self.struct = CFetch(*(cast(callback, c_void_p).value for callback in self._callbacks), None, layer)


def _guarded(f: Callable[[], None]) -> int:
    """Nothing may be raised through C++: what is, is kept for `library.call`, of which this thread is in one."""
    try:
        f()
    except BaseException as error:
        library.caught.error = error
        return 1
    return 0


def forward(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: FetchedExperts, layer: int = 0,
    level: int = -1, threads: int = 0,
) -> Tensor:  # fmt: skip
    """y_t = Σ_k kept·weight·Expert(x_t): [T, D] float32 or bfloat16 -> the same. No gradient.

    The bits are those that `packed_experts` gives where all records are in memory. What the source raises is raised.
    """
    boundary.check_activation(experts.layout.activation)
    boundary.check_routed(x_TD, ids_TK, weights_TK, kept_TK, experts.layout.matrices[0].inputs)
    boundary.check_table(experts.table)
    x = views.unit_stride(x_TD.detach())
    y = torch.empty(x.shape, dtype=x.dtype)
    fetch, routing = Fetch(experts.source, layer), views.routing(ids_TK, weights_TK, kept_TK)
    parts = (fetch.struct, routing[0], views.table_experts(experts.table, experts.layout), views.rows(x), views.rows(y))
    struct, who, packed, source, to = map(addressof, parts)
    steps = (CStep * 2)(
        CStep(STEP_KINDS.index("fetch"), _places(struct, who), (experts.table.shape[0], 0), 0.0),
        CStep(STEP_KINDS.index("experts"), _places(packed, None, who, source, to, struct), (0, 0), 0.0),
    )
    library.call("mh_steps", steps, len(steps), views.run(level, threads))
    return y


def _places(*places: int | None) -> Array[c_void_p]:
    return (c_void_p * (CStep.a.size // 8))(*places)
