"""A linear layer that holds a packed record instead of parameters. It computes; it is not trained."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.kernels.moment import held, in_autocast, unheard
from manyhands.kernels.native import available, linear, missing, step, views
from manyhands.kernels.native.library import CLinear
from manyhands.quant import Layout, PackedLinear

BYTES = (torch.uint8,)
IMPLEMENTATIONS = ("auto", "eager", "grouped_mm", "native")
"""Named as the experts' are, so that a model has one setting; without the native kernels all unpack the record."""


class RecordLinear(nn.Module):
    """y = x·Wᵀ + b with W and b in one record."""

    record: Tensor
    """[record_bytes] uint8; a buffer, so that `.to(bfloat16)` leaves it alone."""

    def __init__(self, layout: Layout, implementation: str = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.implementation = check_name(implementation)
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
        if self.native and fits(x, self.record) and not (x.requires_grad and torch.is_grad_enabled()):
            return linear(x, self.packed)  # which has no gradient
        if self.implementation == "native":
            raise no_native(x)
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


def check_name(name: str) -> str:
    """`name`, if it is one of `IMPLEMENTATIONS`; raises `ConfigError`."""
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts_implementation = {name!r} cannot read packed weights; " + suggest(name, list(IMPLEMENTATIONS))
        )
    return name


def fits(x: Tensor, records: Tensor) -> bool:
    """Whether the native kernels take this."""
    return x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu" and records.device.type == "cpu"


def no_native(x: Tensor) -> ConfigError:
    return ConfigError(
        f"experts_implementation = 'native' takes float32 and bfloat16 on the CPU ({x.dtype} on {x.device.type} here)"
        f"{', and ' + why if (why := missing()) else ''}: use 'auto'"
    )
