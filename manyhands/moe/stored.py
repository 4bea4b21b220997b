"""Experts whose packed records lie on disk; a store brings them into memory when tokens want them.

E experts, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.kernels import ExpertWeights
from manyhands.moe.bank import ExpertBank
from manyhands.quant import FetchedExperts, PackedExperts
from manyhands.store.store import Store


class StoredExperts(ExpertBank):
    """E experts of one layer of a store.

    `native` computes from the store's slots. `stacked`, and with it every other way, reads and unpacks the records it
    is asked for: exact and slow, and what the store keeps in memory stays as it is.
    """

    def __init__(self, store: Store, layer: int, implementation: str = "auto") -> None:
        """`layer` is the number of the layer in the model."""
        super().__init__(implementation)
        self.store, self.layer = store, layer
        self.layout = store.fetched(layer).layout
        assert self.layout.activation is not None
        self.activation = self.layout.activation

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.fetched_experts().table.shape[0])

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

    def fetched_experts(self) -> FetchedExperts:
        """The layer's table in the store."""
        return self.store.fetched(self.layer)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, implementation: str | None) -> Tensor:
        """Of as many tokens at a time as have room for their experts in the store, where these are read there."""
        named = self.implementation if implementation is None else implementation
        most = self.store.most_rows(self.layer, ids.shape[1])
        with self.store.alone():
            if len(x) <= most or named not in ("auto", "native"):
                return super()._run(x, ids, weights, kept, implementation)
            parts = [slice(first, first + most) for first in range(0, len(x), most)]
            run = super()._run
            return torch.cat([run(x[p], ids[p], weights[p], kept[p], implementation) for p in parts])

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """The float32 weights of these experts: exactly what their records stand for. Raises `DiskError`."""
        records = torch.stack([self.store.record(self.layer, expert) for expert in ids])
        return ExpertWeights(*PackedExperts(records, self.layout).dequantize(), self.activation)
