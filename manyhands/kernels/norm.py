"""The root-mean-square norm where nothing has a gradient: natively where the kernels take it, else by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., width] -> the same: x / rms(x) · weight, for x in the weight's dtype."""
    if step.direct(x) and (norm := for_native(weight, eps)) is not None and norm.width == x.shape[-1]:
        return step.rms_norm(x, norm)
    return F.rms_norm(x, weight.shape, weight, eps)  # as autograd's in a third of the time


def for_native(weight: Tensor, eps: float) -> CNorm | None:
    """A weight as the native kernels take it, where they do. It points into the weight, which must live as long."""
    return step.norm_of(weight, eps) if views.plain(weight, 1) else None
