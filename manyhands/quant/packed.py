"""The experts of one layer, packed: one record each, in one tensor.

E experts, D model width, F expert width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manyhands.config.packing import Format
from manyhands.defaults import GROUP_SIZE
from manyhands.quant.panels import decode, encode, from_panels, to_panels
from manyhands.quant.record import PAGE, Layout, Matrix, expert_layout


class Stacked(Protocol):
    """Stacked weights as in `kernels.ExpertWeights`: up [E, 2F or F, D], down [E, D, F], biases, activation."""

    @property
    def up(self) -> Tensor: ...
    @property
    def down(self) -> Tensor: ...
    @property
    def up_bias(self) -> Tensor | None: ...
    @property
    def down_bias(self) -> Tensor | None: ...
    @property
    def activation(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """`records` [E, record_bytes] uint8, and where everything is in a record."""

    records: Tensor
    layout: Layout

    @property
    def num_experts(self) -> int:
        """E."""
        return self.records.shape[0]

    def section(self, expert: int, name: str) -> Tensor | None:
        """A view of one section's bytes, or None where the record has no such section."""
        place = self.layout.sections.get(name)
        return None if place is None else self.records[expert, place[0] : place[0] + place[1]]

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """up [E, 2F or F, D], down [E, D, F], up_bias, down_bias, all float32: exactly what the records stand for."""
        every = range(self.num_experts)
        ups, downs = (torch.stack([self.weights(e, name) for e in every]) for name in ("up", "down"))
        biases = [[b for e in every if (b := self.bias(e, name)) is not None] for name in ("up", "down")]
        up_bias, down_bias = (torch.stack(of_one) if self.layout.bias else None for of_one in biases)
        return ups, downs, up_bias, down_bias

    def weights(self, expert: int, name: str) -> Tensor:
        """Matrix `up` [2F or F, D] or `down` [D, F] of one expert, float32."""
        section = self.section(expert, name)
        assert section is not None
        return decode(section, self.section(expert, f"{name}_scales"), self._matrix(name))

    def bias(self, expert: int, name: str) -> Tensor | None:
        """Its bias [2F or F] or [D], float32, if it has one."""
        section = self.section(expert, f"{name}_bias")
        return None if section is None else unpack_bias(section, self._matrix(name))

    def _matrix(self, name: str) -> Matrix:
        return self.layout.matrices[("up", "down").index(name)]


def pack_bias(bias: Tensor, matrix: Matrix) -> Tensor:
    """[parts · N] -> the section's bytes."""
    column = Matrix(matrix.outputs, 1, matrix.parts, "float32", 0)
    return to_panels(bias.detach().cpu().float()[:, None], column)[:, 0].contiguous().view(torch.uint8)


def unpack_bias(section: Tensor, matrix: Matrix) -> Tensor:
    """The inverse of `pack_bias`: [parts · N] float32."""
    column = Matrix(matrix.outputs, 1, matrix.parts, "float32", 0)
    return from_panels(section.view(torch.float32)[:, None], column)[:, 0]


def empty_records(num_experts: int, record_bytes: int) -> Tensor:
    """Zeroed [E, record_bytes] uint8 that begins on a page, so that what is read from disk can be read into it."""
    room = torch.zeros(num_experts * record_bytes + PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE
    return room[start : start + num_experts * record_bytes].view(num_experts, record_bytes)


@torch.no_grad()
def pack_experts(
    experts: Stacked,
    format: Format,
    group_size: int = GROUP_SIZE,
    importance: tuple[Tensor, Tensor] | None = None,
) -> PackedExperts:
    """Round the weights to `format` and lay them out, one record per expert. The slow, exact way, in torch.

    `importance` = (up [E, D], down [E, F]) weights the rounding error of each input (int8, int4).
    """
    E, D, F = experts.down.shape
    gated = experts.up.shape[1] == 2 * F
    bias = experts.up_bias is not None
    layout = expert_layout(D, F, experts.activation, format, group_size, gated=gated, bias=bias)
    packed = PackedExperts(empty_records(E, layout.record_bytes), layout)
    for e in range(E):
        for i, name in enumerate(("up", "down")):
            matrix = layout.matrices[i]
            weights = (experts.up, experts.down)[i][e]
            write_matrix(packed, e, name, weights, matrix, None if importance is None else importance[i][e])
            if bias:
                given = (experts.up_bias, experts.down_bias)[i]
                section = packed.section(e, f"{name}_bias")
                assert given is not None and section is not None
                section.copy_(pack_bias(given[e], matrix))
    return packed


def write_matrix(
    packed: PackedExperts, expert: int, name: str, weights: Tensor, matrix: Matrix, importance_K: Tensor | None
) -> None:
    """Encode one matrix into its sections."""
    section, scale_section = packed.section(expert, name), packed.section(expert, f"{name}_scales")
    assert section is not None
    values, scales = encode(weights, matrix, importance_K)
    section.copy_(values)
    if scales is not None:
        assert scale_section is not None
        scale_section.copy_(scales)
