"""Packed experts and packed linear layers, of any format, applied by the kernels."""

from typing import Any, cast

import torch
from torch import Tensor

from manyhands.kernels.moment import ordinary
from manyhands.kernels.native import ops
from manyhands.kernels.native.library import level_code
from manyhands.quant import PackedExperts, PackedLinear


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


def linear(x: Tensor, weights: PackedLinear, level: str | None = None, threads: int = 0) -> Tensor:
    """[..., K] -> [..., N]: x·Wᵀ (+ b), rows rounded as above. No gradient: the weights are constants."""
    op: Any = ops.packed_linear if ordinary() else torch.ops.manyhands.packed_linear
    y = op(x.reshape(-1, x.shape[-1]), weights.record, ops.sizes_of(weights.layout), level_code(level), threads)
    return cast(Tensor, y).view(*x.shape[:-1], y.shape[-1])
