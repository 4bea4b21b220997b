"""Linear layers with one input: plain weights or records."""

from collections.abc import Mapping
from ctypes import addressof, c_void_p

from torch import nn

from manyhands.kernels import packed_linear
from manyhands.kernels.linear import for_native
from manyhands.kernels.moment import held
from manyhands.kernels.native import views
from manyhands.kernels.native.library import CLinear
from manyhands.kernels.policy import FEW_ROWS
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.runtime.builder import LINEARS, Builder, Unfit


def emit(b: Builder, source: str, width: int, layers: Mapping[str, tuple[nn.Module | None, int]]) -> None:
    """Layers and their widths by the name of the buffer they write."""
    structs, outputs = [], []
    for name, (layer, outs) in layers.items():
        struct = linear_of(b, layer, width)
        if struct.weight.outputs != outs:
            raise Unfit("a linear layer of another width")
        structs.append(struct)
        outputs.append(b.tensor(name, outs).data_ptr())
    b.held.extend(structs)
    pointers, to = (c_void_p * len(structs))(*map(addressof, structs)), (c_void_p * len(structs))(*outputs)
    b.call(LINEARS, pointers, b.buffer(source, width), to, n=(len(structs), 0))


def linear_of(b: Builder, layer: nn.Module | None, width: int) -> CLinear:
    """A record, or plain weights, for inputs of this width."""
    if type(layer) is RecordLinear and layer.stays and packed_linear.runs_native(layer.implementation):
        record = packed_linear.for_native(layer.record, layer.layout, width)
        if record is not None:
            return record
    own = type(layer) is Linear and held(layer, "weight", "bias")
    if not isinstance(layer, Linear) or not own or for_native(layer.weight, layer.bias, width) is None:
        raise Unfit(f"a linear layer that is {type(layer).__name__}, or lies as the kernels do not read it")
    b.most = min(b.most, FEW_ROWS)
    struct = views.plain_linear(layer.weight, None)
    struct.bias = b.float32(layer.bias, struct.weight.outputs)
    return struct
