"""A plain linear layer in the same formats: attention, shared experts, the head.

N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config.packing import Format
from manyhands.defaults import GROUP_SIZE
from manyhands.quant.packed import empty_records, pack_bias, unpack_bias
from manyhands.quant.panels import decode, encode
from manyhands.quant.record import Layout, linear_layout


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """`record` [record_bytes] uint8: W [N, K] and perhaps b [N]."""

    record: Tensor
    layout: Layout

    def section(self, name: str) -> Tensor | None:
        """A view of one section's bytes, or None where the record has no such section."""
        place = self.layout.sections.get(name)
        return None if place is None else self.record[place[0] : place[0] + place[1]]

    def dequantize(self) -> tuple[Tensor, Tensor | None]:
        """W [N, K] and b [N], float32: exactly what the record stands for."""
        (matrix,) = self.layout.matrices
        weight, bias = self.section("weight"), self.section("bias")
        assert weight is not None
        return decode(weight, self.section("scales"), matrix), None if bias is None else unpack_bias(bias, matrix)


@torch.no_grad()
def pack_linear(
    weight_NK: Tensor,
    bias_N: Tensor | None,
    format: Format,
    group_size: int = GROUP_SIZE,
    importance_K: Tensor | None = None,
) -> PackedLinear:
    """Round W to `format` and lay it out. `importance_K` weights the rounding error of each input (int8, int4)."""
    N, K = weight_NK.shape
    layout = linear_layout(N, K, format, group_size, bias=bias_N is not None)
    packed = PackedLinear(empty_records(1, layout.record_bytes)[0], layout)
    (matrix,) = layout.matrices
    values, scales = encode(weight_NK, matrix, importance_K)
    for name, content in (("weight", values), ("scales", scales)):
        if content is not None:
            section = packed.section(name)
            assert section is not None
            section.copy_(content)
    if bias_N is not None:
        section = packed.section("bias")
        assert section is not None
        section.copy_(pack_bias(bias_N, matrix))
    return packed
