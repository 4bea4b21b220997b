"""Norms."""

from torch import nn

from manyhands.kernels.moment import held
from manyhands.kernels.native.library import CNorm
from manyhands.kernels.norm import for_native
from manyhands.layers.norm import RMSNorm
from manyhands.runtime.builder import NORM, Builder, Unfit


def emit(b: Builder, norm: nn.Module, source: str, to: str) -> None:
    """From buffer `source` into `to`, both of the model's width."""
    struct = norm_of(norm)
    if struct.width != b.D:
        raise Unfit("a norm of another width")
    b.call(NORM, struct, b.buffer(source, b.D), b.buffer(to, b.D))


def norm_of(norm: nn.Module) -> CNorm:
    """An RMS norm whose weight lies as the kernels read it."""
    if type(norm) is not RMSNorm or not held(norm, "weight") or (struct := for_native(norm.weight, norm.eps)) is None:
        raise Unfit(f"{type(norm).__name__} has no claim")
    return struct
