"""The packed record: what its bytes stand for, value by value, and what a layout refuses."""

import pytest
import torch

from manyhands.config.packing import TRAITS
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights
from manyhands.quant import (
    FORMATS,
    PackedLinear,
    expert_layout,
    linear_layout,
    pack_experts,
    pack_linear,
)
from manyhands.quant.record import PAGE
from manyhands.quant.rounding import quantize

ODD = [(1, 1), (16, 64), (17, 65), (40, 130), (3, 200)]


def bytes_of(packed: PackedLinear, name: str) -> bytes:
    section = packed.section(name)
    assert section is not None
    return section.numpy().tobytes()


@pytest.mark.parametrize("shape", ODD)
def test_float_formats_hold_the_weights_exactly(shape: tuple[int, int]) -> None:
    w, b = torch.randn(shape).bfloat16().float(), torch.randn(shape[0])
    for format in ("float32", "bf16"):
        got, bias = pack_linear(w, b, format).dequantize()
        assert torch.equal(got, w) and torch.equal(bias, b)


@pytest.mark.parametrize("format", ["float32", "bf16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("D", "F", "gated"), [(20, 37, True), (64, 64, True), (16, 130, False)])
def test_weights_of_every_float_dtype_are_rounded_once(
    format: str, source: torch.dtype, D: int, F: int, gated: bool
) -> None:
    shapes = ((3, 2 * F if gated else F, D), (3, D, F), (3, 2 * F if gated else F), (3, D))
    stacked = ExpertWeights(*(torch.randn(shape).to(source) for shape in shapes), "swiglu" if gated else "relu")
    stored = torch.bfloat16 if format == "bf16" else torch.float32
    *weights, up_bias, down_bias = pack_experts(stacked, format).dequantize()
    for got, want in zip(weights, stacked[:2], strict=True):
        assert torch.equal(got, want.to(stored).float())
    assert torch.equal(up_bias, stacked.up_bias.float()) and torch.equal(down_bias, stacked.down_bias.float())


@pytest.mark.parametrize("format", ["int8", "int4", "q8_0", "q4_0"])
@pytest.mark.parametrize("shape", ODD)
def test_integers_that_fit_are_exact(format: str, shape: tuple[int, int]) -> None:
    """Whole multiples of a power of two, with the extreme value in each group, need no rounding."""
    low, high = (-127, 127) if TRAITS[format].bits == 8 else (-8, 7)
    w = torch.randint(low, high + 1, shape).float() * 0.25
    w[:, ::32] = low * 0.25
    for group in TRAITS[format].groups or (32,):
        assert torch.equal(pack_linear(w, None, format, group).dequantize()[0], w)


def test_the_place_of_every_value() -> None:
    """The layout as the module's docstring has it, written out byte by byte."""
    N, K = 20, 70
    w = torch.randint(-8, 8, (N, K)).float()
    w[:, ::32] = -8
    f32 = torch.frombuffer(bytearray(bytes_of(pack_linear(w, None, "float32"), "weight")), dtype=torch.float32)
    bf16 = torch.frombuffer(bytearray(bytes_of(pack_linear(w, None, "bf16"), "weight")), dtype=torch.bfloat16)
    i8 = torch.frombuffer(bytearray(bytes_of(pack_linear(w * 15.875, None, "int8"), "weight")), dtype=torch.int8)
    i4 = bytes_of(pack_linear(w, None, "int4", 32), "weight")
    depth = 128
    for n in range(32):
        for k in range(depth):
            want = float(w[n, k]) if n < N and k < K else 0.0
            base = (n // 16) * 16 * depth
            assert f32[base + k * 16 + n % 16] == want
            assert bf16[base + (k // 2) * 32 + (n % 16) * 2 + k % 2] == want
            q8 = int(i8[base + (k // 4) * 64 + (n % 16) * 4 + k % 4])
            assert (q8 == 0) if want == 0 else abs(q8 / 15.875 - want) < 0.1
            byte = i4[base // 2 + (k // 8) * 64 + (n % 16) * 4 + k % 4]
            assert (byte >> (4 if k % 8 >= 4 else 0) & 15) - 8 == want


def test_gate_and_up_panels_alternate() -> None:
    D, F = 64, 32
    up = torch.arange(2 * F * D).view(1, 2 * F, D).float()
    packed = pack_experts(ExpertWeights(up, torch.zeros(1, D, F), None, None, "swiglu"), "float32")
    panels = packed.section(0, "up").view(torch.float32).view(4, D, 16)
    for panel, first in enumerate((0, F, 16, F + 16)):
        assert torch.equal(panels[panel].t(), up[0, first : first + 16])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("gated", "bias"), [(True, True), (False, False)])
def test_experts_round_trip(format: str, gated: bool, bias: bool) -> None:
    E, D, F = 3, 20, 37
    experts = ExpertWeights(
        torch.randn(E, 2 * F if gated else F, D),
        torch.randn(E, D, F),
        torch.randn(E, 2 * F if gated else F) if bias else None,
        torch.randn(E, D) if bias else None,
        "swiglu" if gated else "relu",
    )
    packed = pack_experts(experts, format)
    assert packed.records.shape == (E, packed.layout.record_bytes)
    assert packed.layout.record_bytes % PAGE == 0 and packed.records.data_ptr() % PAGE == 0
    up, down, up_bias, down_bias = packed.dequantize()
    tolerance = {"float32": 0.0, "bf16": 2e-3, "int8": 1.2e-2, "int4": 0.16, "q8_0": 8e-3, "q4_0": 0.16}[format]
    for got, want in ((up, experts.up), (down, experts.down)):
        assert got.shape == want.shape
        assert float((got - want).norm() / want.norm()) <= tolerance
    if bias:
        assert torch.equal(up_bias, experts.up_bias) and torch.equal(down_bias, experts.down_bias)


def test_sections_are_aligned_and_do_not_overlap() -> None:
    for format in FORMATS:
        layout = expert_layout(50, 70, "geglu", format, 32, gated=True, bias=True)
        end = 0
        for offset, size in layout.sections.values():
            assert offset % 64 == 0 and offset >= end
            end = offset + size
        assert end <= layout.record_bytes


def test_bytes_per_weight() -> None:
    """What decoding reads: 2, 1 and a little over half a byte per weight."""
    for format, group, bytes_per_weight in (
        ("bf16", 0, 2),
        ("int8", 0, 1),
        ("int4", 32, 0.5625),
        ("int4", 64, 0.53125),
        ("q8_0", 32, 1.0625),
        ("q4_0", 32, 0.5625),
    ):
        layout = expert_layout(2048, 1024, "swiglu", format, group or 32, gated=True, bias=False)
        weights = 3 * 2048 * 1024
        assert abs(layout.record_bytes / weights - bytes_per_weight) < 0.004


def test_the_search_beats_plain_rounding() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    found = pack_linear(w, None, "int4", 32).dequantize()[0]
    scale = w.view(64, -1, 32).abs().amax(-1, keepdim=True) / 7
    plain = ((w.view(64, -1, 32) / scale).round() * scale).view(64, -1)
    assert (found - w).square().sum() < 0.85 * (plain - w).square().sum()


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[::4] = 100.0
    weighted = (pack_linear(w, None, "int4", 32, importance).dequantize()[0] - w).square()
    plain = (pack_linear(w, None, "int4", 32).dequantize()[0] - w).square()
    assert weighted[:, ::4].sum() < plain[:, ::4].sum() and (weighted * importance).sum() < (plain * importance).sum()


def test_zeros_stay_zero() -> None:
    for format in FORMATS:
        assert torch.equal(pack_linear(torch.zeros(5, 9), None, format).dequantize()[0], torch.zeros(5, 9))


@pytest.mark.parametrize("format", ["int8", "int4", "q8_0", "q4_0"])
def test_what_is_not_finite_is_refused(format: str) -> None:
    with pytest.raises(ConfigError, match="not finite"):
        pack_linear(torch.tensor([[1.0, float("nan")]]), None, format)


def test_what_a_half_cannot_scale_is_refused() -> None:
    largest = 127 * 65504.0
    assert torch.equal(pack_linear(torch.tensor([[largest]]), None, "q8_0").dequantize()[0], torch.tensor([[largest]]))
    for format in ("q8_0", "q4_0"):
        with pytest.raises(ConfigError, match=f"{format} cannot hold weights as large as"):
            pack_linear(torch.tensor([[1.0, 1.001 * largest]]), None, format)


@pytest.mark.parametrize(("format", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q8_0", "MXFP4")])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_gguf_has_rounded_is_not_rounded_again(format: str, kind: str, calibrated: bool) -> None:
    """Blocks of 32 as GGUF's own quantisers make them, of small weights and of blocks that are all zero."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(24, 96, generator=g) * torch.logspace(-4, 1, 24)[:, None]
    w[5, 32:64] = 0
    w = _blocks_of(w.view(24, 3, 32), kind).view(24, 96)
    importance = torch.rand(96, generator=g) if calibrated else None
    assert torch.equal(pack_linear(w, None, format, 32, importance).dequantize()[0], w)


def _blocks_of(w: torch.Tensor, kind: str) -> torch.Tensor:
    """To the nearest that the blocks of a GGUF type can hold: https://github.com/ggml-org/ggml/blob/master/docs."""
    if kind == "MXFP4":
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        scale = w.abs().amax(-1, keepdim=True).clamp(min=2.0**-20).log2().floor().sub(2).exp2()
        nearest = (w.abs()[..., None] / scale[..., None] - values).abs().argmin(-1)
        return values[nearest] * scale * w.sign()
    low = -127 if kind == "Q8_0" else -8
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    scale = largest.abs() / 127 if kind == "Q8_0" else largest / low
    q = torch.where(scale == 0, 0.0, w / scale.where(scale != 0, torch.ones(()))).round().clamp(low, -low - (low == -8))
    return q * scale.half().float()


def test_what_a_layout_refuses() -> None:
    with pytest.raises(ConfigError, match="float32, bf16, int8, int4, q8_0, q4_0"):
        linear_layout(8, 8, "int5", bias=False)
    with pytest.raises(ConfigError, match="32 or 64"):
        linear_layout(8, 8, "int4", 48, bias=False)
    with pytest.raises(ConfigError, match="q8_0 takes 32"):
        linear_layout(8, 8, "q8_0", 64, bias=False)
    with pytest.raises(ConfigError, match="sizes are between"):
        linear_layout(0, 8, "int4", bias=False)


def test_int4_is_rounded_with_the_scales_that_are_stored() -> None:
    """A scale is bfloat16 before the integers are chosen: afterwards they would belong to another one."""
    (matrix,) = linear_layout(16, 64, "int4", bias=False).matrices
    w = torch.randn(16, matrix.depth, generator=torch.Generator().manual_seed(0))
    _, scales = quantize(w, matrix)
    assert torch.equal(scales, scales.bfloat16().float())
