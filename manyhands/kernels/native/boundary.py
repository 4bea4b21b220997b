"""Checks of what the kernels are given against what they will read, before a pointer is taken.

T tokens, K experts per token, E experts, D model width, F expert width, H hidden values per pair.
"""

import torch
from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.errors import ConfigError
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.native.structs import ACTIVATION_CODES
from manyhands.quant import Layout

FLOATS = (torch.float32, torch.bfloat16)
ANY_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BYTES, BOOLS, IDS = (torch.uint8,), (torch.bool,), (torch.int64,)


def check(name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """`ConfigError` unless `t` is a dense tensor on the CPU of this shape (-1: any length) and one of these dtypes."""
    fits = t.dim() == len(shape) and all(want in (-1, n) for want, n in zip(shape, t.shape, strict=True))
    if not fits or t.dtype not in dtypes or t.device.type != "cpu" or t.layout != torch.strided:
        wanted = ", ".join("any" if n < 0 else str(n) for n in shape)
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ConfigError(
            f"native kernels: {name} is {list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device.type}, not "
            f"[{wanted}] {kinds} on cpu"
        )


def check_routed(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, D: int) -> None:
    """Tokens and where they go. The experts' numbers are checked in C++, which reads each of them anyway."""
    T, K = x_TD.shape[0] if x_TD.dim() else -1, ids_TK.shape[-1] if ids_TK.dim() else -1
    check("x", x_TD, (-1, D), FLOATS)
    check("expert ids", ids_TK, (T, K), IDS)
    check("weights", weights_TK, (T, K), ANY_FLOAT)
    check("kept", kept_TK, (T, K), BOOLS)


def check_activation(name: str | None) -> None:
    """`ConfigError` for an activation without kernels."""
    if name not in ACTIVATION_CODES:
        raise ConfigError(f"native kernels: hidden_act = {name!r}: allowed are {', '.join(ACTIVATION_CODES)}")


def check_stacked(experts: ExpertWeights) -> None:
    """Stacked weights and biases."""
    up, down, up_bias, down_bias, activation = experts
    check_activation(activation)
    check("down_proj", down, (-1, -1, -1), ANY_FLOAT)
    E, D, F = down.shape
    rows = 2 * F if activation in GATED else F
    check("gate_up_proj" if activation in GATED else "up_proj", up, (E, rows, D), ANY_FLOAT)
    if up_bias is not None:
        check("the bias of the first product", up_bias, (E, rows), ANY_FLOAT)
    if down_bias is not None:
        check("the bias of the second product", down_bias, (E, D), ANY_FLOAT)


def check_records(records: Tensor, layout: Layout) -> None:
    """Packed experts [E, record_bytes], or one packed layer [record_bytes]."""
    shape = (-1, layout.record_bytes) if layout.kind == "experts" else (layout.record_bytes,)
    if layout.kind == "experts":
        check_activation(layout.activation)
    check("records", records, shape, BYTES)
    if not records.is_contiguous():
        raise ConfigError(f"native kernels: records with strides {list(records.stride())} are not contiguous")


def check_table(table: Tensor) -> None:
    """Addresses of experts' records [E], which the kernels read where they lie."""
    check("the table of records", table, (-1,), IDS)
    if not table.is_contiguous():
        raise ConfigError(f"native kernels: a table of records with strides {list(table.stride())} is not contiguous")


def check_backward(dy_TD: Tensor, x_TD: Tensor, hidden: Tensor, pairs: int, width: int, wanted: int, most: int) -> None:
    """What comes back: dy like x, and hidden [pairs, H] as the forward pass left it."""
    check("dy", dy_TD, tuple(x_TD.shape), FLOATS)
    check("hidden", hidden, (pairs, width), (torch.float32,))
    if not hidden.is_contiguous():
        raise ConfigError("native kernels: hidden is not contiguous")
    if wanted != most:
        raise ConfigError(f"native kernels: {wanted} flags for {most} gradients")
