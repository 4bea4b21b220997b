"""A plain linear layer, and what every part of a model has: fresh weights on request."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.kernels.linear import product


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
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not torch.is_grad_enabled() and x.dtype == weight.dtype and (y := product(x, weight, bias)) is not None:
            return y
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


def reset_parts(module: nn.Module) -> None:
    """`reset_parameters` of everything that `module` is made of."""
    for part in module.children():
        part.reset_parameters()  # type: ignore[operator]  # every part of ours has it
