"""Experts that hold packed records instead of parameters. They compute; they are not trained.

E experts, D model width, F expert width, T tokens, K experts per token.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.kernels import ExpertWeights, run_experts
from manyhands.kernels.experts import activate
from manyhands.kernels.native import available, packed_experts
from manyhands.layers.packed_linear import check_name, fits, no_native
from manyhands.moe.routing import Routing
from manyhands.quant import Layout, PackedExperts


class RecordExperts(nn.Module):
    """E experts, one record each. The same calls as `Experts`."""

    records: Tensor
    """[E, record_bytes] uint8."""

    def __init__(self, layout: Layout, num_experts: int, implementation: str = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.implementation = check_name(implementation)
        self.register_buffer("records", torch.empty(num_experts, layout.record_bytes, dtype=torch.uint8))

    @property
    def native(self) -> bool:
        """Whether the native kernels run these experts, where they take the tokens."""
        return self.implementation in ("auto", "native") and available() and self.records.device.type == "cpu"

    @property
    def packed(self) -> PackedExperts:
        """The records and their layout."""
        return PackedExperts(self.records, self.layout)

    def forward(self, x_TD: Tensor, routing: Routing, implementation: str | None = None) -> Tensor:
        """[T, D] -> [T, D]: each token's kept experts, weighted and summed."""
        return self._run(x_TD, routing.expert_ids, routing.weights, routing.kept, implementation)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def outputs(self, x_TD: Tensor, routing: Routing, implementation: str | None = None) -> Tensor:
        """[T, K, D]: the chosen experts' outputs, unweighted; zeros where the pair is not kept."""
        T, K = routing.expert_ids.shape
        ids, kept = routing.expert_ids.reshape(-1, 1), routing.kept.reshape(-1, 1)
        ones = torch.ones_like(ids, dtype=torch.float32)
        return self._run(x_TD.repeat_interleave(K, dim=0), ids, ones, kept, implementation).view(T, K, x_TD.shape[-1])

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, implementation: str | None) -> Tensor:
        name = self.implementation if implementation is None else check_name(implementation)
        if name in ("auto", "native") and available() and fits(x, self.records):
            return packed_experts(x, ids, weights, kept, self.packed)
        if name == "native":
            raise no_native(x)
        return BY_NAME[name](x, ids, weights, kept, self.packed)


def one_by_one(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, packed: PackedExperts) -> Tensor:
    """`kernels.eager` over the chosen experts, each unpacked when its turn comes: the oracle for packed kernels."""
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=accumulate)
    for e in torch.bincount(ids_TK[kept_TK]).nonzero().flatten().tolist():
        t, k = torch.where((ids_TK == e) & kept_TK)
        up, down, up_bias, down_bias, activation = unpack(packed, [e]).cast(x_TD.dtype)
        h = F.linear(x_TD[t], up[0], None if up_bias is None else up_bias[0])
        h = F.linear(activate(h, activation), down[0], None if down_bias is None else down_bias[0])
        y_TD = y_TD.index_add(0, t, weights_TK[t, k, None] * h.to(accumulate))
    return y_TD.to(x_TD.dtype)


def together(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, packed: PackedExperts) -> Tensor:
    """`kernels.grouped_mm` over the chosen experts, all unpacked at once."""
    if not bool(kept_TK.any()):
        return torch.zeros_like(x_TD)
    ids_TK = ids_TK.where(kept_TK, ids_TK[kept_TK][0])  # an expert that is there anyway, not -1
    chosen, new_ids = ids_TK.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    weights = unpack(packed, chosen.tolist()).cast(x_TD.dtype)
    return run_experts("grouped_mm", x_TD, new_ids, weights_TK, kept_TK, weights)


BY_NAME = {"auto": one_by_one, "eager": one_by_one, "grouped_mm": together}
"""Without the native kernels. `eager` and `grouped_mm` are exact; `native` rounds few rows to 8 bits beside int8 and
int4 weights."""


def unpack(packed: PackedExperts, experts: list[int]) -> ExpertWeights:
    """The float32 weights of some experts, stacked in that order: exactly what their records stand for."""
    assert packed.layout.activation is not None
    chosen = packed.records[experts] if len(experts) > 1 else packed.records[experts[0] : experts[0] + 1]
    return ExpertWeights(*PackedExperts(chosen, packed.layout).dequantize(), packed.layout.activation)
