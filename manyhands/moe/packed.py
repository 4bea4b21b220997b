"""Experts and linear layers that hold packed records instead of parameters. They compute; they are not trained.

E experts, D model width, F expert width, T tokens, K experts per token.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, run_experts
from manyhands.kernels.experts import activate
from manyhands.kernels.moment import held, in_autocast, unheard
from manyhands.kernels.native import available, linear, missing, packed_experts, step, views
from manyhands.kernels.native.library import CLinear
from manyhands.moe.routing import Routing
from manyhands.quant import Layout, PackedExperts, PackedLinear

BYTES = (torch.uint8,)


class RecordLinear(nn.Module):
    """y = x·Wᵀ + b with W and b in one record."""

    record: Tensor
    """[record_bytes] uint8; a buffer, so that `.to(bfloat16)` leaves it alone."""

    def __init__(self, layout: Layout, implementation: str = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.implementation = _check_name(implementation)
        self.register_buffer("record", torch.empty(layout.record_bytes, dtype=torch.uint8))

    @property
    def native(self) -> bool:
        """Whether the native kernels run this layer, where they take the rows."""
        return self.implementation in ("auto", "native") and available()

    @property
    def packed(self) -> PackedLinear:
        """The record and its layout."""
        return PackedLinear(self.record, self.layout)

    def for_native(self, width: int) -> CLinear | None:
        """The record as the native kernels take it, where they do for x [..., width]. It is not to be kept."""
        record, layout = self.record, self.layout
        if (
            not self.native
            or not held(self, "record")
            or not views.plain(record, 1, BYTES)
            or record.numel() != layout.record_bytes
        ):
            return None
        found = views.linear(record, layout)
        return found if found.weight.inputs == width else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        x = in_autocast(x)
        if step.direct(x) and (native := self.for_native(x.shape[-1])) is not None:
            return step.linears(x, [native])[0]
        if self.native and _fits(x, self.record) and not (x.requires_grad and torch.is_grad_enabled()):
            return linear(x, self.packed)  # which has no gradient
        if self.implementation == "native":
            raise _no_native(x)
        weight, bias = self.packed.dequantize()
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Each layer's output for the same x [..., in]; packed layers share one call where they can."""
    if all(type(layer) is RecordLinear and unheard(layer) for layer in layers) and step.direct(x):
        native = [layer.for_native(x.shape[-1]) for layer in layers]  # type: ignore[operator]
        if None not in native:
            return step.linears(x, native)
    return [layer(x) for layer in layers]


class RecordExperts(nn.Module):
    """E experts, one record each. The same calls as `Experts`."""

    records: Tensor
    """[E, record_bytes] uint8."""

    def __init__(self, layout: Layout, num_experts: int, implementation: str = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.implementation = _check_name(implementation)
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
        name = self.implementation if implementation is None else _check_name(implementation)
        if name in ("auto", "native") and available() and _fits(x, self.records):
            return packed_experts(x, ids, weights, kept, self.packed)
        if name == "native":
            raise _no_native(x)
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


def _check_name(name: str) -> str:
    allowed = [*BY_NAME, "native"]
    if name not in allowed:
        raise ConfigError(f"experts_implementation = {name!r} cannot read packed weights; " + suggest(name, allowed))
    return name


def _fits(x: Tensor, records: Tensor) -> bool:
    """Whether the native kernels take this."""
    return x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu" and records.device.type == "cpu"


def _no_native(x: Tensor) -> ConfigError:
    return ConfigError(
        f"experts_implementation = 'native' takes float32 and bfloat16 on the CPU ({x.dtype} on {x.device.type} here)"
        f"{', and ' + why if (why := missing()) else ''}: use 'auto'"
    )
