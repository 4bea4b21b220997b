"""Experts that hold packed records instead of parameters. They compute; they are not trained."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.kernels import ExpertWeights
from manyhands.moe.bank import ExpertBank
from manyhands.quant import Layout, PackedExperts


class RecordExperts(ExpertBank):
    """E experts, one record each.

    `eager` and `grouped_mm` are exact; `native` rounds few rows to 8 bits beside int8 and int4 weights.
    """

    records: Tensor
    """[E, record_bytes] uint8."""

    def __init__(self, layout: Layout, num_experts: int, implementation: str = "auto") -> None:
        super().__init__(implementation)
        assert layout.activation is not None
        self.layout = layout
        self.activation = layout.activation
        self.register_buffer("records", torch.empty(num_experts, layout.record_bytes, dtype=torch.uint8))

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.records.shape[0])

    @property
    def num_packed(self) -> int:
        """Weights and biases in the records."""
        return self.num_experts * self.layout.num_weights

    def extra_repr(self) -> str:
        """With F and the format."""
        F, format = self.layout.matrices[1].inputs, self.layout.format
        return f"{super().extra_repr()}, moe_intermediate_size={F}, format={format}"

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.layout.matrices[0].inputs

    @property
    def packed(self) -> PackedExperts:
        """The records and their layout."""
        return PackedExperts(self.records, self.layout)

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """The float32 weights of these experts, unpacked for each call: exactly what their records stand for."""
        chosen = self.records[list(ids)] if len(ids) > 1 else self.records[ids[0] : ids[0] + 1]
        return ExpertWeights(*PackedExperts(chosen, self.layout).dequantize(), self.activation)

    def in_memory(self) -> PackedExperts:
        """The records themselves."""
        return self.packed
