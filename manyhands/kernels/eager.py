"""The oracle: one expert after another, in plain PyTorch. Slow, short and obviously right."""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.experts import ExpertWeights, activate


def dense(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """The same, every expert for every token: nothing depends on the numbers in `ids_TK`, so that it can be transformed
    (`torch.func`: vmap, grad, jvp)."""
    up, down, up_bias, down_bias, activation = experts.cast(x_TD.dtype)
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=accumulate)
    for e in range(up.shape[0]):
        h = F.linear(x_TD, up[e], None if up_bias is None else up_bias[e])
        h = F.linear(activate(h, activation), down[e], None if down_bias is None else down_bias[e])
        weight_T = (weights_TK * ((ids_TK == e) & kept_TK)).sum(-1)
        y_TD = y_TD + weight_T[:, None] * h.to(accumulate)
    return y_TD.to(x_TD.dtype)


def eager(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """y_t = Σ_k weights_tk · Expert_{ids_tk}(x_t) over the kept pairs; a loop over the experts.

    An expert without tokens takes part with an empty batch, so its gradient is zero, not absent. A token picks
    an expert at most once, so `index_add` has no repeated rows and the sum has a fixed order.
    """
    up, down, up_bias, down_bias, activation = experts.cast(x_TD.dtype)
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=accumulate)
    for e in range(up.shape[0]):
        t, k = torch.where((ids_TK == e) & kept_TK)
        h = F.linear(x_TD[t], up[e], None if up_bias is None else up_bias[e])
        h = F.linear(activate(h, activation), down[e], None if down_bias is None else down_bias[e])
        y_TD = y_TD.index_add(0, t, weights_TK[t, k, None] * h.to(accumulate))
    return y_TD.to(x_TD.dtype)
