"""A product with a packed record: natively, as an operator, or with the weights unpacked.

`implementation` is named as the experts' is, so that a model has one setting; all but `auto` and `native` unpack.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.kernels.frozen import frozen_product, keeps_for_backward
from manyhands.kernels.native import available, linear, missing, step, views
from manyhands.kernels.native.library import CLinear
from manyhands.quant import Layout, PackedLinear

BYTES = (torch.uint8,)
IMPLEMENTATIONS = ("auto", "eager", "grouped_mm", "native")


def packed_product(x: Tensor, record: Tensor, layout: Layout, implementation: str, stays: bool) -> Tensor:
    """x·Wᵀ + b, [..., in] -> [..., out] in x's dtype, for a record [record_bytes] uint8.

    `stays`: the record is not made anew for each look at it, so that it can be pointed into.
    """
    native = runs_native(implementation)
    if native and stays and step.direct(x) and (struct := for_native(record, layout, x.shape[-1])) is not None:
        return step.linears(x, [struct])[0]
    packed = PackedLinear(record, layout)
    if native and fits(x, record) and not (x.requires_grad and torch.is_grad_enabled()):
        return linear(x, packed)  # which has no gradient
    if implementation == "native":
        raise no_native(x)
    if keeps_for_backward(x):  # the record, not the weights
        return frozen_product(x, packed.dequantize, layout.matrices[0].outputs)
    weight, bias = packed.dequantize()
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def packed_products(x: Tensor, records: Sequence[tuple[Tensor, Layout]]) -> list[Tensor] | None:
    """The products with several records that stay, in one native call; None where that cannot be made."""
    if not step.direct(x):
        return None
    structs = [for_native(record, layout, x.shape[-1]) for record, layout in records]
    fitting = [struct for struct in structs if struct is not None]
    return step.linears(x, fitting) if len(fitting) == len(structs) else None


def for_native(record: Tensor, layout: Layout, width: int) -> CLinear | None:
    """A record as the native kernels take it for x [..., width], where they do. It points into the record."""
    if not views.plain(record, 1, BYTES) or record.numel() != layout.record_bytes:
        return None
    found = views.linear(record, layout)
    return found if found.weight.inputs == width else None


def runs_native(implementation: str) -> bool:
    """Whether the native kernels are asked for, and there."""
    return implementation in ("auto", "native") and available()


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
    """What is said where `native` was asked for and is not to be had."""
    return ConfigError(
        f"experts_implementation = 'native' takes float32 and bfloat16 on the CPU ({x.dtype} on {x.device.type} here)"
        f"{', and ' + why if (why := missing()) else ''}: use 'auto'"
    )
