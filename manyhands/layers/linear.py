"""A plain linear layer, and what every part of a model has: fresh weights on request."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.kernels.moment import held
from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CLinear
from manyhands.kernels.policy import FEW_ROWS, ROUND_ROWS, slow_bf16


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype: float32 master weights serve a bfloat16 forward.

    Fresh weights are N(0, 0.02²), biases 0: not torch's, which depend on the width.
    """

    def reset_parameters(self, std: float = INITIALIZER_RANGE, generator: torch.Generator | None = None) -> None:
        """Fresh weights: N(0, std²), std 0.02 as in GPT-2 (Radford et al. 2019), and bias 0."""
        with torch.no_grad():
            self.weight.normal_(0.0, std, generator=generator)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not torch.is_grad_enabled() and x.dtype == self.weight.dtype and step.direct(x):
            if x.numel() <= FEW_ROWS * x.shape[-1] and (native := self.for_native(x.shape[-1])):
                return step.linears(x, [native[0]])[0]
            if x.dtype == torch.bfloat16 and slow_bf16():
                return self._in_float32(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def for_native(self, width: int) -> tuple[CLinear, Tensor | None] | None:
        """The layer as the native kernels take it for x [..., width], where they do, and its bias.

        It points into the weight and into the bias, which may be a copy and must live as long: kept by nobody.
        """
        if not held(self, "weight", "bias"):
            return None
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not views.plain(weight, 2) or weight.shape[1] != width or width % 16:
            return None
        if bias is not None:
            if not views.plain(bias, 1) or bias.shape[0] != weight.shape[0]:
                return None
            bias = bias.detach().float()
        return views.plain_linear(weight, bias), bias

    def _in_float32(self, x: Tensor) -> Tensor:
        """The same products, summed in float32 and rounded once."""
        wide, y = x.float(), x.new_empty(*x.shape[:-1], self.out_features)
        for first in range(0, self.out_features, ROUND_ROWS):
            rows = slice(first, first + ROUND_ROWS)
            bias = None if self.bias is None else self.bias[rows].float()
            y[..., rows] = nn.functional.linear(wide, self.weight[rows].float(), bias)
        return y


def reset_parts(module: nn.Module) -> None:
    """`reset_parameters` of everything that `module` is made of."""
    for part in module.children():
        part.reset_parameters()  # type: ignore[operator]  # every part of ours has it
