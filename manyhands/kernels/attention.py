"""Attention of the last queries to all keys, where nothing has a gradient: natively, where the kernels do it as well.

B batch, S queries, L keys, H heads, G key/value heads.
"""

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
