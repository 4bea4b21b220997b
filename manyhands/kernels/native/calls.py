"""One forward and one backward call of the library on tensors.

T tokens, K experts per token, E experts, D model width, N = T·K pairs, H = hidden values per pair.
"""

from ctypes import byref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.native import boundary, library, views
from manyhands.kernels.native.structs import CExperts, CGradients, CRows, CStacked
from manyhands.quant import Layout


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts as a call takes them: packed or stacked, and their sizes."""

    packed: CExperts | None
    stacked: CStacked | None
    alive: Any
    num_experts: int
    up_rows: int
    """Outputs of the first matrix: 2F or F."""
    D: int
    F: int

    @classmethod
    def from_records(cls, records: Tensor, layout: Layout) -> "Experts":
        """[E, record_bytes] uint8."""
        boundary.check_records(records, layout)
        up = layout.matrices[0]
        packed, table = views.experts(records, layout)
        return cls(packed, None, (records, table), records.shape[0], up.parts * up.outputs, up.inputs, up.outputs)

    @classmethod
    def from_weights(cls, weights: ExpertWeights, dtype: torch.dtype) -> "Experts":
        """Stacked weights, to be multiplied in `dtype`."""
        boundary.check_stacked(weights)
        E, D, F = weights.down.shape
        stacked, alive = views.stacked(weights, dtype)
        return cls(None, stacked, alive, E, (2 if weights.activation in GATED else 1) * F, D, F)

    @property
    def hidden_width(self) -> int:
        """H: gate and up, each padded to whole panels."""
        return self.up_rows // self.F * (-(-self.F // 16) * 16)

    def pointers(self) -> tuple[Any, Any]:
        """The first two arguments of a call."""
        return (None if self.packed is None else byref(self.packed)), (
            None if self.stacked is None else byref(self.stacked)
        )


def forward(
    x_TD: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, experts: Experts, *, save: bool, level: int, threads: int
) -> tuple[Tensor, Tensor]:
    """y [T, D] in x's dtype, and hidden [N, H] or [0, H]."""
    boundary.check_routed(x_TD, ids, weights, kept, experts.D)
    x = views.unit_stride(x_TD)
    y = torch.empty(x.shape, dtype=x.dtype)
    hidden = torch.empty(ids.numel() if save else 0, experts.hidden_width)
    routing, _alive = views.routing(ids, weights, kept)
    library.call(
        "mh_forward",
        *experts.pointers(),
        byref(routing),
        byref(views.rows(x)),
        byref(views.rows(y)),
        hidden.data_ptr() if hidden.numel() else None,
        hidden.numel(),
        views.run(level, threads),
    )
    return y, hidden


def backward(
    dy_TD: Tensor, x_TD: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, experts: Experts, *,
    hidden: Tensor, wanted: list[bool], level: int, threads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dx in x's dtype; the gradients of weights, up, down, up_bias, down_bias in float32; empty where not wanted."""
    boundary.check_routed(x_TD, ids, weights, kept, experts.D)
    boundary.check_backward(dy_TD, x_TD, hidden, ids.numel(), experts.hidden_width, len(wanted), 6)
    x, dy = views.unit_stride(x_TD), views.unit_stride(dy_TD)
    E, rows, D, F = experts.num_experts, experts.up_rows, experts.D, experts.F
    shapes = (ids.shape, (E, rows, D), (E, D, F), (E, rows), (E, D))
    dx = torch.empty(x.shape if wanted[0] else (0,), dtype=x.dtype)
    others = [torch.empty(shape if want else (0,)) for shape, want in zip(shapes, wanted[1:], strict=True)]
    routing, _alive = views.routing(ids, weights, kept)
    dx_rows = views.rows(dx) if wanted[0] else CRows()
    library.call(
        "mh_backward",
        *experts.pointers(),
        byref(routing),
        byref(views.rows(x)),
        byref(views.rows(dy)),
        hidden.data_ptr() if hidden.numel() else None,
        hidden.numel(),
        byref(dx_rows) if wanted[0] else None,
        byref(CGradients(*(g.data_ptr() if g.numel() else None for g in others))),
        views.run(level, threads),
    )
    return dx, *others


def linear(x_NK: Tensor, record: Tensor, layout: Layout, level: int, threads: int) -> Tensor:
    """[N, K] -> [N, outputs] in x's dtype."""
    boundary.check_records(record, layout)
    boundary.check("x", x_NK, (-1, layout.matrices[0].inputs), boundary.FLOATS)
    x = views.unit_stride(x_NK)
    y = torch.empty(x.shape[0], layout.matrices[0].outputs, dtype=x.dtype)
    weights = byref(views.linear(record, layout))
    library.call("mh_linear_forward", weights, byref(views.rows(x)), byref(views.rows(y)), views.run(level, threads))
    return y
