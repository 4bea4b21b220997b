"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467) and layer normalisation (Ba et al. 2016,
arXiv 1607.06450)."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.kernels.moment import transformed
from manyhands.kernels.norm import rms_norm
from manyhands.kernels.twice import gradients_through


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension; statistics in float32, output in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1: what is normalised stays as it is."""
        with torch.no_grad():
            self.weight.fill_(1.0)

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if transformed():
            return _rms_norm(x, self.weight, self.eps)
        if not torch.is_grad_enabled() and x.dtype == self.weight.dtype:
            return rms_norm(x, self.weight, self.eps)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + eps) · weight + bias over the last dimension; computed in float32, in x's dtype out."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1 and bias 0: what is normalised stays as it is."""
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(x32.dtype), self.bias.to(x32.dtype)
        return F.layer_norm(x32, weight.shape, weight, bias, self.eps).to(x.dtype)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


Norm = RMSNorm | LayerNorm


def norm_of(kind: str, width: int, eps: float) -> Norm:
    """The norm that `ModelConfig.norm` names."""
    return LayerNorm(width, eps) if kind == "layer_norm" else RMSNorm(width, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (x32.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x32 * scale * weight.to(x32.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Written out, because autograd's own chain reads and writes the activations eleven times on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        y: Tensor = (x32 * scale).mul_(weight.to(x32.dtype)).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad[:2]
            return *gradients_through(partial(_rms_norm, eps=ctx.eps), [x, weight], wanted, dy), None  # type: ignore[return-value]
        dy32 = dy.to(scale.dtype)
        normed: Tensor = x.to(scale.dtype) * scale
        dweight: Tensor = (dy32 * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        dnormed = dy32 * weight.to(scale.dtype)
        mean = torch.linalg.vecdot(dnormed, normed).div_(x.shape[-1]).unsqueeze(-1)
        dx: Tensor = dnormed.addcmul_(normed, mean, value=-1.0).mul_(scale).to(x.dtype)
        return dx, dweight, None
