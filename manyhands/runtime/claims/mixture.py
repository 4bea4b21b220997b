"""A mixture: router, experts, shared experts.

E experts, K experts per token.
"""

import torch
from torch import nn

from manyhands.config.activation import GATED
from manyhands.kernels import ExpertWeights
from manyhands.kernels.native import views
from manyhands.kernels.native.fetch import Fetch
from manyhands.kernels.native.library import ACTIVATION_CODES, CExperts, CRouting, CStacked
from manyhands.moe import ExpertBank, MoELayer
from manyhands.quant import FetchedExperts, PackedExperts
from manyhands.runtime.builder import EXPERTS, FETCH, ROUTE, Builder, Unfit
from manyhands.runtime.claims import feed_forward, linear, route
from manyhands.runtime.covered import MIXTURE
from manyhands.runtime.reroute import Biases, Reroute


def emit(b: Builder, mlp: nn.Module, layer: int) -> None:
    """From `normed` into `y`, and the layer's routing into `b.routings`."""
    if type(mlp) is not MoELayer or not MIXTURE.covers(b.config.moe):
        raise Unfit(f"{type(mlp).__name__} has no claim, or its config none")
    biases = Biases.of(mlp.router) if b.editable else None
    router = route.router_of(mlp.router, b.D, None if biases is None else (biases.logit_E, biases.choice_E))
    E, K = mlp.router.config.num_experts, mlp.router.config.num_experts_per_tok
    packed, stacked, fetch = _experts(b, mlp.experts, E, layer)
    ids, weights, scores, logits = b.routing(layer, E, K)
    kept = torch.ones(b.capacity, K, dtype=torch.bool)
    b.held.append(kept)
    normed, y = b.buffer("normed", b.D), b.buffer("y", b.D)
    places = (logits.data_ptr(), scores.data_ptr(), ids.data_ptr(), weights.data_ptr())
    b.call(ROUTE, router, normed, *places)
    if biases is not None:
        b.biases[layer] = biases
        b.module(Reroute(layer, mlp.router.config, ids, weights, scores, kept))
    routing = CRouting(ids.data_ptr(), weights.data_ptr(), kept.data_ptr(), *ids.shape)
    if fetch is not None:
        b.held.append(fetch)
        b.call(FETCH, fetch.struct, routing, n=(E, 0))
    if mlp.shared_experts is not None:  # while records are read
        feed_forward.emit(b, mlp.shared_experts, "shared")
    b.call(EXPERTS, packed, stacked, routing, normed, y, None if fetch is None else fetch.struct)
    if mlp.shared_experts is not None:
        gate = None
        if mlp.shared_expert_gate is not None:
            linear.emit(b, "normed", b.D, {"shared_gate": (mlp.shared_expert_gate, 1)})
            gate = b.buffer("shared_gate", 1)
        b.add(1.0, gate, to="y", source="shared")
    b.fetches = b.fetches or fetch is not None


def _experts(
    b: Builder, experts: nn.Module, E: int, layer: int
) -> tuple[CExperts | None, CStacked | None, Fetch | None]:
    """Records, or stacked weights; and who brings the records that are not in memory."""
    D = b.D
    lie = experts.for_native() if isinstance(experts, ExpertBank) else None
    if isinstance(lie, PackedExperts):
        records, layout = lie.records, lie.layout
        if not views.plain(records, 2, (torch.uint8,)) or records.shape != (E, layout.record_bytes):
            raise Unfit("records of another shape")
        packed, table = views.experts(records, layout)
        b.held.append(table)
        return packed, None, None
    if isinstance(lie, FetchedExperts):
        if not views.plain(lie.table, 1, (torch.int64,)) or lie.table.shape[0] != E:
            raise Unfit("a table of records of another shape")
        b.held.append(lie)
        return views.table_experts(lie.table, lie.layout), None, Fetch(lie.source, layer)
    if isinstance(lie, ExpertWeights):
        up, down, up_bias, down_bias, activation = lie
        plain = views.plain(up, 3) and views.plain(down, 3) and up.dtype == down.dtype
        if not plain or activation not in ACTIVATION_CODES:
            raise Unfit("experts that do not lie as the kernels read them")
        F = down.shape[2]
        rows = 2 * F if activation in GATED else F
        if up.shape != (E, rows, D) or down.shape != (E, D, F):
            raise Unfit("experts of other shapes")
        stacked, _ = views.stacked(lie._replace(up_bias=None, down_bias=None), up.dtype)
        stacked.up_bias = b.float32(None if up_bias is None else up_bias.view(-1), E * rows)
        stacked.down_bias = b.float32(None if down_bias is None else down_bias.view(-1), E * D)
        return None, stacked, None
    raise Unfit(f"{type(experts).__name__} with this backend has no claim")
