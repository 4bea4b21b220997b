"""Float weights to float records by the kernels' own packing: the same bytes as `quant.pack_experts`, sooner."""

from ctypes import byref

from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.native import boundary, library, views
from manyhands.quant import PackedExperts, expert_layout
from manyhands.quant.packed import empty_records
from manyhands.quant.record import Format


def pack_floats(experts: ExpertWeights, format: Format, threads: int = 0) -> PackedExperts:
    """`quant.pack_experts` for `float32` and `bf16`."""
    boundary.check_stacked(experts)
    E, D, F = experts.down.shape
    gated, bias = experts.activation in GATED, experts.up_bias is not None
    layout = expert_layout(D, F, experts.activation, format, gated=gated, bias=bias)
    packed = PackedExperts(empty_records(E, layout.record_bytes), layout)
    records = packed.records
    for i, (weights, biases) in enumerate(((experts.up, experts.up_bias), (experts.down, experts.down_bias))):
        flat = _readable(weights).view(-1, weights.shape[-1])
        bias_rows = None if biases is None else _readable(biases)
        library.call(
            "mh_pack",
            records.data_ptr(),
            records.numel(),
            byref(views.matrix(layout, i)),
            byref(views.rows(flat)),
            None if bias_rows is None else byref(views.rows(bias_rows)),
            views.run(-1, threads),
        )
    return packed


def _readable(t: Tensor) -> Tensor:
    t = t.detach()
    return (t if t.dtype in views.DTYPES else t.float()).contiguous()
