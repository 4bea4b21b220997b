"""The dense feed-forward network: also what a shared expert is."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyhands.config.activation import GATED
from manyhands.kernels.experts import activate
from manyhands.layers.linear import Linear, reset_parts


class FeedForward(nn.Module):
    """A dense feed-forward network of width F: also what a shared expert is."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        gated = activation in GATED
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False) if gated else None
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here, as `Linear` gives them."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        up = self.up_proj(x)
        h = up if self.gate_proj is None else torch.cat((self.gate_proj(x), up), dim=-1)
        return self.down_proj(activate(h, self.activation))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed
