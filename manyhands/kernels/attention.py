"""Attention of a few queries to cached keys and values, where nothing has a gradient: natively, where the kernels do.

B batch, S queries, L keys, H heads, G key/value heads.
"""

from torch import Tensor

from manyhands.kernels.native import step, views
from manyhands.kernels.policy import FEW_QUERIES


def attend_few(
    q_BHSd: Tensor,
    k_BGLd: Tensor,
    v_BGLv: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor | None:
    """What the heads say [B, H, S, v] in q's dtype, for the last S of L positions; None where PyTorch does it.

    A query looks only back, and where `mask` [B or 1, 1, S, L] bool is true; a sink [H] takes part in the softmax and
    has no value; `cap` is the soft cap of the logits.
    """
    if q_BHSd.shape[2] > FEW_QUERIES or not step.direct(q_BHSd) or k_BGLd.dtype != v_BGLv.dtype:
        return None
    for t in (k_BGLd, v_BGLv):
        if t.dtype not in views.DTYPES or type(t) is not Tensor or t.shape[3] % 16 or t.stride(3) != 1:
            return None
    if sinks is not None and sinks.shape != q_BHSd.shape[1:2]:
        return None
    held, L = step.cache_of(k_BGLd, v_BGLv), k_BGLd.shape[2]
    y_BSHv = step.attend(q_BHSd.transpose(1, 2).float(), held, L, scale, mask, sinks, cap)
    return y_BSHv.transpose(1, 2).to(q_BHSd.dtype)
