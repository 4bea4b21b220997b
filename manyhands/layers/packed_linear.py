"""A linear layer that holds a packed record instead of parameters. It computes; it is not trained."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyhands.kernels.moment import held, in_autocast, unheard
from manyhands.kernels.packed_linear import check_name, packed_product, packed_products, runs_native
from manyhands.quant import Layout, PackedLinear


class RecordLinear(nn.Module):
    """y = x·Wᵀ + b with W and b in one record."""

    record: Tensor
    """[record_bytes] uint8; a buffer, so that `.to(bfloat16)` leaves it alone."""

    def __init__(self, layout: Layout, implementation: str = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.implementation = check_name(implementation)
        self.register_buffer("record", torch.empty(layout.record_bytes, dtype=torch.uint8))

    @property
    def packed(self) -> PackedLinear:
        """The record and its layout."""
        return PackedLinear(self.record, self.layout)

    @property
    def num_packed(self) -> int:
        """Weights and biases in the record."""
        return self.layout.num_weights

    def extra_repr(self) -> str:
        """Sizes and format, in the names of `nn.Linear`."""
        (m,) = self.layout.matrices
        return (
            f"in_features={m.inputs}, out_features={m.parts * m.outputs}, bias={self.layout.bias}, "
            f"format={self.layout.format}"
        )

    @property
    def stays(self) -> bool:
        """Whether the record is the layer's own, and not made anew for each look at it."""
        return held(self, "record")

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return packed_product(in_autocast(x), self.record, self.layout, self.implementation, self.stays)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Each layer's output for the same x [..., in]; packed layers share one call where they can."""
    packed = [
        (layer.record, layer.layout)
        for layer in layers
        if type(layer) is RecordLinear and unheard(layer) and layer.stays and runs_native(layer.implementation)
    ]
    if len(packed) == len(layers) and (ys := packed_products(x, packed)) is not None:
        return ys
    return [layer(x) for layer in layers]
