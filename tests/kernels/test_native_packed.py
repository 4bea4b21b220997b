"""Packed experts and linear layers in every format, level by level, against float64 on the exact dequantised weights.

Float formats are as exact as float32; but levels that multiply bf16 round more than four rows of an expert to it beside
bf16 weights, and so does the reference. Rows beside integer weights are rounded to 8 bits by group: there the reference
rounds in the same way. test_native_integers.py holds them to their bits.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, native
from manyhands.kernels.native import NativeError
from manyhands.kernels.native.library import VERIFIED, default_level
from manyhands.quant import PackedExperts, pack_experts, pack_linear

from .dense_oracle import _act, make_case

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = [level for level in native.levels() if level in VERIFIED] if native.available() else []
FORMATS = [("float32", 32), ("bf16", 32), ("int8", 32), ("int4", 32), ("int4", 64), ("q8_0", 32), ("q4_0", 32)]
SHAPES = [(3, 70, 40, 4, 2), (100, 70, 40, 4, 2), (20, 70, 40, 4, 2), (1, 200, 100, 3, 3), (6, 64, 64, 1, 1)]
ROW_GROUP = 64
"""Inputs that share a scale beside int8 weights."""


def in_bf16(level: str, format: str, rows: int) -> bool:
    """Whether so many rows are rounded to bf16."""
    return level in ("avx512_bf16", "amx") and format == "bf16" and rows > 4


def rounded(x: torch.Tensor, format: str, group: int, to_bf16: bool = False) -> torch.Tensor:
    """x as the weights see it: beside integers, 8 bits per group of the padded row."""
    if to_bf16:
        return x.bfloat16().to(x.dtype)
    if format in ("float32", "bf16"):
        return x
    g = ROW_GROUP if format == "int8" else group
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % g)).unflatten(-1, (-1, g))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, padded / scale, 0.0).round()
    return (q * scale).flatten(-2)[..., : x.shape[-1]]


def reference(case, packed: PackedExperts, format: str, group: int, level: str) -> torch.Tensor:
    """Float64, pair by pair."""
    up, down, up_bias, down_bias = (None if t is None else t.double() for t in packed.dequantize())
    y = torch.zeros(case.x.shape, dtype=torch.float64)
    for t, k in torch.nonzero(case.kept).tolist():
        e = int(case.ids[t, k])
        x, short = case.x[t].double(), in_bf16(level, format, int((case.ids == e)[case.kept].sum()))
        h = up[e] @ rounded(x, format, group, short) + (0 if up_bias is None else up_bias[e])
        a = _act(h, case.experts.activation)
        out = down[e] @ rounded(a, format, group, short) + (0 if down_bias is None else down_bias[e])
        y[t] += float(case.weights[t, k]) * out
    return y


def in_turn(of: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every format with each `of`; the `others` take turns, so that each meets every format and every `of`."""
    return [(*f, o, *others[(i + j) % len(others)]) for i, f in enumerate(FORMATS) for j, o in enumerate(of)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("format", "group", "shape", "activation", "bias"),
    in_turn(SHAPES, [("swiglu", False), ("swiglu_oai", True), ("gelu", True)]),
)
def test_experts(level: str, format: str, group: int, shape: tuple[int, ...], activation: str, bias: bool) -> None:
    case = make_case(*shape, activation=activation, bias=bias, drop=0.1)
    packed = pack_experts(case.experts, format, group)
    y = native.packed_experts(case.x, case.ids, case.weights, case.kept, packed, level=level, threads=2)
    expected = reference(case, packed, format, group, level)
    exact = format in ("float32", "bf16") and not in_bf16(level, format, shape[0])
    # One value on the border between two integers, or two of bf16, may fall on the other side.
    assert float((y - expected).abs().max()) <= (1e-5 if exact else 4e-3) * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("format", "group", "count", "N", "K", "bias"),
    in_turn([0, 1, 2, 4, 5, 16, 17, 300], [(40, 70, True), (64, 128, False), (1, 1, True)]),
)
def test_linear(level: str, format: str, group: int, count: int, N: int, K: int, bias: bool) -> None:
    g = torch.Generator().manual_seed(count)
    w, b, x = torch.randn(N, K, generator=g), torch.randn(N, generator=g), torch.randn(count, K, generator=g)
    packed = pack_linear(w, b if bias else None, format, group)
    got = native.linear(x, packed, level=level, threads=2)
    weight, stored = packed.dequantize()
    x = rounded(x.double(), format, group, in_bf16(level, format, count))
    expected = x @ weight.double().T + (0 if stored is None else stored.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_linear_in_bfloat16_and_any_leading_shape(level: str) -> None:
    w, x = torch.randn(40, 70), torch.randn(2, 3, 70).bfloat16()
    packed = pack_linear(w, None, "bf16")
    got = native.linear(x, packed, level=level)
    assert got.shape == (2, 3, 40) and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), x.float() @ packed.dequantize()[0].T, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("T", [2, 80])
def test_gradients_go_through_frozen_experts(format: str, group: int, T: int) -> None:
    """To x and to the router's weights: the gradients of the dequantised experts at the forward's own hidden values."""
    case = make_case(T, 40, 24, 3, 2, bias=True)
    packed = pack_experts(case.experts, format, group)
    plain = ExpertWeights(*packed.dequantize(), "swiglu")
    x, w = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    r = torch.randn(T, 40, generator=torch.Generator().manual_seed(1))
    (native.packed_experts(x, case.ids, w, case.kept, packed) * r).sum().backward()
    x2, w2 = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    (native.Native()(x2, case.ids, w2, case.kept, plain) * r).sum().backward()
    coarse = format not in ("float32", "bf16") or in_bf16(
        default_level(), format, 5
    )  # the way back rounds any number of rows
    tolerance = 5e-2 if coarse else 1e-4
    torch.testing.assert_close(x.grad, x2.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(w.grad, w2.grad, rtol=tolerance, atol=tolerance * 4)


def test_rounding_keeps_nan_and_ties_to_even() -> None:
    values = torch.tensor([1.00390625, 1.01171875, float("nan"), float("inf"), -0.0, 3.4e38, 1e-40])
    w = values.repeat(1, 1)
    packed = pack_linear(w, None, "bf16").dequantize()[0]
    torch.testing.assert_close(packed, w.bfloat16().float(), equal_nan=True, rtol=0, atol=0)
    eye = torch.eye(7).bfloat16()
    got = native.linear(eye, pack_linear(values.nan_to_num(7.0, 9.0)[None], None, "float32"))
    assert torch.equal(got[:, 0], values.nan_to_num(7.0, 9.0).bfloat16())


def test_damaged_structures_are_refused() -> None:
    case = make_case(2, 16, 16, 2, 1)
    packed = pack_experts(case.experts, "int8")
    short = PackedExperts(packed.records[:, :1024], packed.layout)
    askew = torch.zeros(packed.records.numel() + 64, dtype=torch.uint8)[1:][: packed.records.numel()]
    for records in (short.records.contiguous(), askew.view_as(packed.records)):
        with pytest.raises((ConfigError, NativeError), match=r"beyond a record|not aligned|records (of|is)"):
            native.packed_experts(case.x, case.ids, case.weights, case.kept, PackedExperts(records, packed.layout))
