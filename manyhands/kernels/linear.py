"""A product with plain weights where nothing has a gradient: natively, in float32, or as PyTorch does it.

Few rows cost more in PyTorch's calls than in the work; a CPU without AVX-512 is slow in bfloat16 (`policy`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.moment import is_exact
from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CLinear
from manyhands.kernels.policy import FEW_ROWS, ROUND_ROWS, slow_bf16


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x·Wᵀ + b, [..., in] -> [..., out], for x in the weight's dtype; None where PyTorch's own way is as good.

    Inside `exactly()` natively for any number of rows: each has the bits that it has alone.
    """
    if not step.direct(x):
        return None
    few = x.numel() <= FEW_ROWS * x.shape[-1]
    if (few or is_exact()) and (native := for_native(weight, bias, x.shape[-1])):
        return step.linears(x, [native[0]])[0]
    return in_float32(x, weight, bias) if x.dtype == torch.bfloat16 and slow_bf16() else None


def for_native(weight: Tensor, bias: Tensor | None, width: int) -> tuple[CLinear, Tensor | None] | None:
    """Weights as the native kernels take them for x [..., width], where they do, and the bias.

    It points into the weight and into the bias, which may be a copy; both must live as long.
    """
    if not views.plain(weight, 2) or weight.shape[1] != width or width % 16:
        return None
    if bias is not None:
        if not views.plain(bias, 1) or bias.shape[0] != weight.shape[0]:
            return None
        bias = bias.detach().float()
    return views.plain_linear(weight, bias), bias


def in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same products, summed in float32 and rounded once."""
    wide, y = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
    for first in range(0, weight.shape[0], ROUND_ROWS):
        rows = slice(first, first + ROUND_ROWS)
        y[..., rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
    return y
