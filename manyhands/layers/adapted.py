"""LoRA beside a matrix that stays as it is: W' = W + s·B·A (Hu et al. 2021, arXiv 2106.09685).

`LowRank` holds A and B, `AdaptedLinear` puts them beside a linear layer, `manyhands.moe.adapted` beside experts.

E experts (no such dimension for a linear layer), r rank.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.kernels.frozen import frozen_product, keeps_for_backward
from manyhands.kernels.moment import in_autocast
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear

BASE = "base_layer"
"""What a wrapped layer is called in its wrapper, as in PEFT."""


def base_name(name: str) -> str:
    """The name a parameter or buffer had before anything was wrapped."""
    return ".".join(part for part in name.split(".") if part != BASE)


class LowRank(nn.Module):
    """A and B, float32 whatever the dtype of W; they are multiplied in the dtype of what comes in.

    Fresh: A uniform in ±1/√in, as `nn.Linear` is, B zero, so that nothing is changed yet.
    """

    lora_A: Tensor
    """[r, in], or [E, r, in]"""
    lora_B: Tensor
    """[out, r], or [E, out, r]"""

    def __init__(
        self,
        shape: tuple[int, ...],
        r: int,
        scale: float,
        device: torch.device | str | None = None,
    ) -> None:
        """`shape` is W's: [out, in], or [E, out, in]; `scale` is s."""
        super().__init__()
        *stack, out, inputs = shape
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(*stack, r, inputs, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(*stack, out, r, dtype=torch.float32, device=device))
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """r"""
        return int(self.lora_A.shape[-2])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh A and B."""
        with torch.no_grad():
            bound = 1.0 / math.sqrt(self.lora_A.shape[-1])
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()

    def delta(self) -> Tensor:
        """s·B·A, float32 at least: what a merge adds to W."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to W·x, beside one matrix: [..., in] -> [..., out] in x's dtype. Experts' are `low_rank`'s."""
        return F.linear(self.scale * F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class AdaptedLinear(LowRank):
    """A linear layer, plain or packed, with LoRA beside it: y = base(x) + s·B·(A·dropout(x))."""

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float = 0.0) -> None:
        """`base_layer` is a `Linear` or a `RecordLinear`; its parameters are frozen."""
        out, inputs, device = shape_of(base_layer)
        super().__init__((out, inputs), r, scale, device)
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        x = in_autocast(x)
        into = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self._base(x) + super().forward(into)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def _base(self, x: Tensor) -> Tensor:
        """Weights in another dtype than x would be converted, and kept so until the backward pass."""
        base = self.base_layer
        if type(base) is Linear and base.weight.dtype != x.dtype and keeps_for_backward(x):
            return frozen_product(x, lambda: (base.weight, base.bias), base.out_features)
        y: Tensor = base(x)
        return y


def shape_of(layer: nn.Module) -> tuple[int, int, torch.device]:
    """Outputs, inputs and device of a linear layer, plain or packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features, layer.weight.device
    assert isinstance(layer, RecordLinear)
    (matrix,) = layer.layout.matrices
    return matrix.outputs, matrix.inputs, layer.record.device
