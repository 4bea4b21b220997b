"""Attention of the last queries to all keys, where nothing has a gradient: natively, where the kernels do it as well.

B batch, S queries, L keys, H heads, G key/value heads.
"""

import torch
from torch import Tensor

from manyhands.kernels.native import step, views
from manyhands.kernels.policy import native_attention_is_best


def attend_natively(
    q_BHSd: Tensor,
    k_BGLd: Tensor,
    v_BGLv: Tensor,
    start_B: Tensor | None,
    window: int | None,
    scale: float,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor | None:
    """What the heads say [B, H, S, v] in q's dtype, for the last S of L positions; None where PyTorch does it.

    A query looks only back, no further than the `window`, and not at the first `start_B` [B or 1] positions, which are
    padding (None: there is padding elsewhere, which no kernel can leave out); queries that are padding get zeros. A
    sink [H] takes part in the softmax and has no value; `cap` is the soft cap of the logits. A query's numbers are the
    same alone and among others, bit for bit.
    """
    B, H, S, _ = q_BHSd.shape
    if start_B is None or not step.direct(q_BHSd) or k_BGLd.dtype != v_BGLv.dtype:
        return None
    if not native_attention_is_best(q_BHSd, k_BGLd.shape[2], sinks is not None or cap is not None):
        return None
    for t in (k_BGLd, v_BGLv):
        if t.dtype not in views.DTYPES or type(t) is not Tensor or t.shape[3] % 16 or t.stride(3) != 1:
            return None
    if sinks is not None and sinks.shape != (H,):
        return None
    sequences = step.rectangle(B, S, k_BGLd.shape[2] - S, start_B.expand(B).contiguous())
    q = q_BHSd.transpose(1, 2).float().reshape(B * S, H, -1)
    y = step.attend(q, step.cache_of(k_BGLd, v_BGLv), sequences, scale, window, sinks, cap)
    return y.view(B, S, H, -1).transpose(1, 2).to(q_BHSd.dtype)


def absorb(q_BHSn: Tensor, weight_HmR: Tensor) -> Tensor:
    """What a query asks a latent: q [B, H, S, n] · W_k, the first n rows of each head's weight -> [B, H, S, R]."""
    y = _products(q_BHSn, weight_HmR, q_BHSn.shape[3], False)
    return torch.matmul(q_BHSn, weight_HmR[:, : q_BHSn.shape[3]].to(q_BHSn.dtype)) if y is None else y


def expand(y_BHSR: Tensor, weight_HmR: Tensor, nope: int) -> Tensor:
    """What a head says of the latent it saw: y [B, H, S, R] · W_vᵀ, the rows of each head's weight after `nope`."""
    y = _products(y_BHSR, weight_HmR, nope, True)
    return torch.matmul(y_BHSR, weight_HmR[:, nope:].transpose(1, 2).to(y_BHSR.dtype)) if y is None else y


def _products(x_BHSn: Tensor, weight_HmR: Tensor, nope: int, values: bool) -> Tensor | None:
    """Natively, so that a row has the bits that it has alone; None where the kernels do not."""
    B, H, S, _ = x_BHSn.shape
    sizes = (nope, weight_HmR.shape[1] - nope, weight_HmR.shape[2])
    if not step.direct(x_BHSn) or not views.plain(weight_HmR, 3) or any(n < 16 or n % 16 for n in sizes):
        return None
    latent = step.latent_of(weight_HmR.detach().flatten(0, 1), H, nope)
    y = step.latent_products(latent, values, x_BHSn.transpose(1, 2).float().reshape(B * S, -1))
    return y.view(B, S, H, -1).transpose(1, 2).to(x_BHSn.dtype)
