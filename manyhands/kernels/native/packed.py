"""Packed experts and packed linear layers, of any format, applied by the kernels."""

from ctypes import byref
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from manyhands.kernels.moment import ordinary
from manyhands.kernels.native import boundary, library, ops, views
from manyhands.kernels.native.library import CLinear, level_code
from manyhands.kernels.native.structs import CMatrix
from manyhands.quant import Layout, PackedExperts, PackedLinear
from manyhands.quant.record import PANEL


def packed_experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor,
    experts: PackedExperts,
    level: str | None = None,
    threads: int = 0,
) -> Tensor:
    """y_t = Σ_k kept·weight·Expert(x_t): [T, D] float32 or bfloat16 -> the same. Gradients go to x and the weights.

    With integer weights rows are rounded to 8 bits in groups of 32 or 64 inputs, for any number of rows: a token's y is
    the same, bit for bit, whatever the batch, the number of threads and the level (native/integers.inl).
    """
    save = torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad)
    direct = not save and ordinary()
    op: Any = ops.packed_experts if direct else torch.ops.manyhands.packed_experts
    layout = experts.layout
    tensors = (x_TD, ids_TK, weights_TK, kept_TK, experts.records)
    y, _ = op(*tensors, ops.sizes_of(layout), layout.activation, save, level_code(level), threads)
    return cast(Tensor, y)


def matrix_product(x_NK: Tensor, experts: PackedExperts, expert: int, name: str) -> Tensor:
    """[N, K] -> [N, outputs]: one matrix of an expert, `up` (gate before up) or `down`, and its bias; rounded as above.

    What stands between an expert's matrices is then the caller's. No gradient; x as `step.direct` takes it.
    """
    boundary.check_records(experts.records, experts.layout)
    index = ("up", "down").index(name)
    shape = experts.layout.matrices[index]
    boundary.check("x", x_NK, (-1, shape.inputs), boundary.FLOATS)
    x, record = views.unit_stride(x_NK), experts.records[expert]
    y = torch.empty(x.shape[0], shape.panels * PANEL, dtype=x.dtype)
    weights = CLinear(record.data_ptr(), record.numel(), _all_panels(experts.layout, index))
    library.call("mh_linear_forward", byref(weights), views.at(x), views.at(y), views.run(-1, 0))
    by_panel = y.view(x.shape[0], -1, shape.parts, PANEL).transpose(1, 2)
    return by_panel.reshape(x.shape[0], shape.parts, -1)[..., : shape.outputs].reshape(x.shape[0], -1)


@lru_cache(maxsize=256)
def _all_panels(layout: Layout, index: int) -> CMatrix:
    """A matrix of an expert as a linear layer's: panels of gate and of up in turn are so many outputs, with padding."""
    m, shape = views.matrix(layout, index), layout.matrices[index]
    return CMatrix(shape.panels * PANEL, shape.inputs, 1, m.format, m.group, m.weight, m.scales, m.bias)


def linear(x: Tensor, weights: PackedLinear, level: str | None = None, threads: int = 0) -> Tensor:
    """[..., K] -> [..., N]: x·Wᵀ (+ b), rows rounded as above. No gradient: the weights are constants."""
    op: Any = ops.packed_linear if ordinary() else torch.ops.manyhands.packed_linear
    y = op(x.reshape(-1, x.shape[-1]), weights.record, ops.sizes_of(weights.layout), level_code(level), threads)
    return cast(Tensor, y).view(*x.shape[:-1], y.shape[-1])
