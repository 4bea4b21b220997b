"""The oracle: one expert after another, in plain PyTorch. Slow, short and obviously right."""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.experts import Bank, ExpertWeights, activate


def dense(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: Bank) -> Tensor:
    """The same, every expert for every token: nothing depends on the numbers in `ids_TK`, so that it can be transformed
    (`torch.func`: vmap, grad, jvp)."""
    lie = experts.in_memory()
    weights = lie if isinstance(lie, ExpertWeights) else experts.stacked(range(experts.num_experts))
    up, down, up_bias, down_bias, activation = weights.cast(x_TD.dtype)
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=accumulate)
    for e in range(up.shape[0]):
        h = F.linear(x_TD, up[e], None if up_bias is None else up_bias[e])
        h = F.linear(activate(h, activation), down[e], None if down_bias is None else down_bias[e])
        weight_T = (weights_TK * ((ids_TK == e) & kept_TK)).sum(-1)
        y_TD = y_TD + weight_T[:, None] * h.to(accumulate)
    return y_TD.to(x_TD.dtype)


def eager(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: Bank) -> Tensor:
    """y_t = Σ_k weights_tk · Expert_{ids_tk}(x_t) over the kept pairs; a loop over the experts.

    Of stacked weights an expert without tokens takes part with an empty batch, so its gradient is zero, not absent.
    Other weights are asked for one expert at a time, and only those that some token chose. A token picks an expert at
    most once, so `index_add` has no repeated rows and the sum has a fixed order.
    """
    lie = experts.in_memory()
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=accumulate)
    if isinstance(lie, ExpertWeights):
        turns, weights = list(range(experts.num_experts)), lie.cast(x_TD.dtype)
    else:
        turns, weights = torch.bincount(ids_TK[kept_TK]).nonzero().flatten().tolist(), None
    for e in turns:
        t, k = torch.where((ids_TK == e) & kept_TK)
        own = experts.stacked([e]).cast(x_TD.dtype) if weights is None else weights
        up, down, up_bias, down_bias, activation = own
        i = 0 if weights is None else e
        h = F.linear(x_TD[t], up[i], None if up_bias is None else up_bias[i])
        h = F.linear(activate(h, activation), down[i], None if down_bias is None else down_bias[i])
        y_TD = y_TD.index_add(0, t, weights_TK[t, k, None] * h.to(accumulate))
    return y_TD.to(x_TD.dtype)
