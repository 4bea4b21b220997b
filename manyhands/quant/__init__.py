"""Number formats for experts and linear layers: what a packed record is. Start with `record.py`.

Nothing here needs a compiler: packing, unpacking and the exact dequantisation are plain torch.
"""

from manyhands.config.packing import FORMATS, VERSION
from manyhands.quant.fetched import FetchedExperts, Source
from manyhands.quant.linear import PackedLinear, pack_linear
from manyhands.quant.packed import PackedExperts, pack_experts
from manyhands.quant.record import Layout, Matrix, expert_layout, linear_layout

__all__ = [
    "FORMATS",
    "VERSION",
    "FetchedExperts",
    "Layout",
    "Matrix",
    "PackedExperts",
    "PackedLinear",
    "Source",
    "expert_layout",
    "linear_layout",
    "pack_experts",
    "pack_linear",
]
