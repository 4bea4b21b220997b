"""Stored formats against slow decoders written from their definitions, against transformers, and bad inputs."""

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from manyhands.checkpoint.quantized import Header, Logical, logical_tensors
from manyhands.checkpoint.quantized import decode as decode_module
from manyhands.errors import CheckpointError

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def int4(**weights: Any) -> dict[str, Any]:
    """`quantization_config` of Kimi K2.5, with these fields of `weights` changed."""
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS | weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }


def headers(tensors: dict[str, Tensor]) -> dict[str, Header]:
    return {name: Header(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def decoded(tensors: dict[str, Tensor], config: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    logical = logical_tensors(headers(tensors), config, "config.json")[name]
    return run(logical, tensors, torch.full(logical.header.shape, 7.0, dtype=dtype))


def run(logical: Logical, tensors: dict[str, Tensor], out: Tensor) -> Tensor:
    assert logical.decode is not None
    assert tuple(out.shape) == logical.header.shape
    logical.decode([tensors[part] for part in logical.parts], out)
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, signs of zero included; NaN equals NaN."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    bits = a.contiguous().view(integer) == b.contiguous().view(integer)
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits | (a.isnan() & b.isnan())).all())


# The definitions, one number at a time, in Python's float64; products of them are exact until `f32` rounds.


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    return sign * (mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))


def e4m3(code: int) -> float:
    return math.nan if code & 127 == 127 else small_float(code, 4, 3, 7)


def e5m2(code: int) -> float:
    if code & 127 >= 0b11111_00:
        return math.nan if code & 3 else math.copysign(math.inf, 64 - (code >> 1))
    return small_float(code, 5, 2, 15)


def e2m1(code: int) -> float:
    return small_float(code, 2, 1, 1)


def e8m0(code: int) -> float:
    return math.nan if code == 255 else 2.0 ** (code - 127)


def f32(value: float) -> float:
    if abs(value) >= (2 - 2**-24) * 2.0**127:
        return math.copysign(math.inf, value)
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def nibbles(data: bytes) -> list[int]:
    """Low half first."""
    return [half for byte in data for half in (byte & 15, byte >> 4)]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def slow_fp8(weight: Tensor, scale: list[list[float]], block: tuple[int, int]) -> Tensor:
    n, k = weight.shape
    read = e4m3 if weight.dtype == torch.float8_e4m3fn else e5m2
    data = raw(weight)
    rows = [[f32(read(data[i * k + j]) * scale[i // block[0]][j // block[1]]) for j in range(k)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float32)


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_words(*shape: int, seed: int = 0) -> Tensor:
    return random_bytes(*shape[:-1], shape[-1] * 4, seed=seed).view(torch.int32)


def random_scale(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.01).to(dtype)


# fp8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("flush", [False, True])
def test_every_fp8_code(dtype: torch.dtype, flush: bool) -> None:
    weight = torch.arange(256, dtype=torch.uint8).reshape(2, 128).view(dtype)
    config = FP8 | {"fmt": "e4m3" if dtype == torch.float8_e4m3fn else "e5m2"}
    expected = slow_fp8(weight, [[1.0]], (128, 128))
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor does not flush subnormals")
    try:
        out = decoded({"w": weight, "w_scale_inv": torch.ones(1, 1)}, config, "w")
    finally:
        torch.set_flush_denormal(False)
    assert same(out, expected)
    assert same(out, weight.to(torch.float32))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
    st.sampled_from([1, 8, 1 << 20]),
)
def test_fp8_blocks(
    n: int, k: int, height: int, width: int, dtype: torch.dtype, scale_dtype: torch.dtype, seed: int, chunk: int
) -> None:
    weight = random_bytes(n, k, seed=seed).view(dtype)
    scale = random_scale(-(-n // height), -(-k // width), dtype=scale_dtype, seed=seed)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "a.bias": torch.zeros(n)}
    config = {"quant_method": "fp8", "weight_block_size": [height, width]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "_CHUNK", chunk)
        out = decoded(tensors, config, "a.weight")
        rounded = decoded(tensors, config, "a.weight", torch.bfloat16)
    assert same(out, slow_fp8(weight, scale.double().tolist(), (height, width)))
    assert same(rounded, out.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (3, 256, 128)])
def test_fp8_as_transformers(shape: tuple[int, ...]) -> None:
    weight = random_bytes(*shape).view(torch.float8_e4m3fn)
    scale = random_scale(*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    for dtype in (torch.float32, torch.bfloat16):
        out = decoded({"gate_up_proj": weight, "gate_up_proj_scale_inv": scale}, FP8, "gate_up_proj", dtype)
        assert same(out, Fp8Dequantize(None)._dequantize_one(weight, scale, dtype))


def test_fp8_ragged_over_chunks() -> None:
    weight = random_bytes(300, 1500).view(torch.float8_e4m3fn)
    scale = random_scale(3, 12)
    expanded = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :1500]
    out = decoded({"w": weight, "w_scale_inv": scale}, FP8, "w")
    assert same(out, weight.to(torch.float32) * expanded)


def test_fp8_scales_of_every_chunk() -> None:
    """DeepSeek-V3's width: a chunk is 146 rows, so the second begins inside a block of 128, the third in another."""
    n, k = 300, 7168
    assert decode_module._CHUNK // k == 146
    weight = torch.ones(n, k).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 1.0 + 3 * 56).view(3, 56)  # no two alike
    out = decoded({"w": weight, "w_scale_inv": scale}, FP8, "w")
    row, column = torch.arange(n) // 128, torch.arange(k) // 128
    assert same(out, (row[:, None] * 56 + column[None] + 1).float())


def test_fp8_one_scale() -> None:
    config = FP8 | {"weight_block_size": None}
    weight = random_bytes(5, 6).view(torch.float8_e4m3fn)
    for shape in ((), (1,), (1, 1)):
        scale = torch.full(shape, 0.37)
        assert same(decoded({"w": weight, "w_scale_inv": scale}, config, "w"), weight.to(torch.float32) * 0.37)
    stacked = random_bytes(3, 4, 6).view(torch.float8_e4m3fn)
    for halves in (1, 2):
        scale = random_scale(3, halves, 1)
        expected = stacked.to(torch.float32) * scale.repeat_interleave(4 // halves, 1)
        assert same(decoded({"w": stacked, "w_scale_inv": scale}, config, "w"), expected)
        assert same(expected, Fp8Dequantize(None)._dequantize_one(stacked, scale, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_with_scales_that_are_powers_of_two(dtype: torch.dtype) -> None:
    config = FP8 | {"scale_fmt": "ue8m0", "weight_block_size": [1, 32]}
    codes = torch.tensor([[0, 1, 119], [127, 128, 254], [255, 3, 130]], dtype=torch.uint8)
    values = [[e8m0(code) for code in row] for row in codes.tolist()]
    scale = torch.tensor(values) if dtype == torch.float32 else codes.view(dtype)
    weight = random_bytes(3, 70).view(torch.float8_e4m3fn)
    out = decoded({"w": weight, "w_scale_inv": scale}, config, "w")
    assert same(out, slow_fp8(weight, values, (1, 32)))


def test_what_fp8_leaves_alone() -> None:
    stored = {
        "a.weight": Header("F8_E4M3", (2, 2)),
        "a.weight_scale_inv": Header("F32", (1, 1)),
        "a.activation_scale": Header("F32", ()),
        "lm_head.weight": Header("BF16", (4, 2)),
        "gate.e_score_correction_bias": Header("F32", (4,)),
    }
    logical = logical_tensors(stored, FP8 | {"activation_scheme": "static"}, "config.json")
    assert set(logical) == {"a.weight", "lm_head.weight", "gate.e_score_correction_bias"}
    assert logical["lm_head.weight"] == Logical(Header("BF16", (4, 2)), ("lm_head.weight",), None)
    assert logical["a.weight"].header == Header("BF16", (2, 2))
    assert logical["a.weight"].parts == ("a.weight", "a.weight_scale_inv")
    assert "a.activation_scale" in logical_tensors(stored, FP8, "config.json")
    default = {"a.weight": Header("F8_E4M3", (129, 256)), "a.weight_scale_inv": Header("F32", (2, 2))}
    assert set(logical_tensors(default, {"quant_method": "fp8"}, "config.json")) == {"a.weight"}
    plain = logical_tensors(stored, None, "config.json")
    assert set(plain) == set(stored)
    assert all(tensor.decode is None and tensor.header == stored[name] for name, tensor in plain.items())


# compressed-tensors


def slow_int(packed: Tensor, scale: Tensor, bits: int, group: int, zero: Tensor | None = None) -> Tensor:
    """As `pack_to_int32`: value i of a row is at bit i·bits, plus 2^(bits-1); zero points likewise, down a column."""
    n, k = packed.shape[0], packed.shape[1] * 32 // bits

    def at(words: list[int], i: int) -> int:
        return (words[i * bits // 32] & 0xFFFFFFFF) >> i * bits % 32 & (1 << bits) - 1

    rows = []
    for i in range(n):
        row = []
        for j in range(k):
            offset = 1 << bits - 1 if zero is None else at(zero[:, j // group].tolist(), i)
            row.append(f32((at(packed[i].tolist(), j) - offset) * float(scale[i, j // group])))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 19),
    st.integers(1, 3),
    st.sampled_from([(4, 8), (4, 32), (4, -1), (8, 32), (8, 4), (8, -1)]),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    st.integers(0, 99),
    st.sampled_from([1, 300, 1 << 20]),
)
def test_packed_integers(
    n: int, groups: int, scheme: tuple[int, int], symmetric: bool, dtype: torch.dtype, seed: int, chunk: int
) -> None:
    bits, size = scheme
    k = groups * (size if size > 0 else 40)
    group = size if size > 0 else k
    tensors = {
        "m.weight_packed": random_words(n, k * bits // 32, seed=seed),
        "m.weight_scale": random_scale(n, k // group, dtype=dtype, seed=seed),
        "m.weight_shape": torch.tensor([n, k]),
    }
    zero = None
    if not symmetric:
        zero = tensors["m.weight_zero_point"] = random_words(-(-n * bits // 32), k // group, seed=seed + 1)
    strategy = "group" if size > 0 else "channel"
    config = int4(num_bits=bits, group_size=size, strategy=strategy, symmetric=symmetric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "_CHUNK", chunk)
        out = decoded(tensors, config, "m.weight")
    expected = slow_int(tensors["m.weight_packed"], tensors["m.weight_scale"], bits, group, zero)
    assert same(out, expected)


def test_packed_by_hand() -> None:
    """0x76543210 holds 0, 1, …, 7 from its lowest bits up; stored with offset 8."""
    tensors = {
        "weight_packed": torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32),  # and 8, 9, …, 15
        "weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 16]),
    }
    out = decoded(tensors, int4(group_size=16), "weight")
    assert out.tolist() == [[(value - 8) * 0.5 for value in range(16)]]


def test_packed_experts_in_one_tensor() -> None:
    packed, scale = random_words(3, 9, 8), random_scale(3, 9, 2, dtype=torch.bfloat16)
    zero = random_words(3, 2, 2, seed=5)
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([3, 9, 64])}
    out = decoded(tensors, int4(), "weight", torch.bfloat16)
    asymmetric = decoded(tensors | {"weight_zero_point": zero}, int4(symmetric=False), "weight", torch.bfloat16)
    for e in range(3):
        assert same(out[e], slow_int(packed[e], scale[e], 4, 32).to(torch.bfloat16))
        assert same(asymmetric[e], slow_int(packed[e], scale[e], 4, 32, zero[e]).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [[4, 60], [5, 64], [64, 4], [4, 64, 1]])
def test_stored_shape_must_agree(shape: list[int]) -> None:
    tensors = {
        "m.weight_packed": random_words(4, 8),
        "m.weight_scale": random_scale(4, 2),
        "m.weight_shape": torch.tensor([4, 64]),
    }
    logical = logical_tensors(headers(tensors), int4(), "config.json")["m.weight"]
    with pytest.raises(CheckpointError, match=r"'m\.weight_shape' says"):
        run(logical, tensors | {"m.weight_shape": torch.tensor(shape)}, torch.empty(4, 64))


# mxfp4


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(0, 99), st.sampled_from([1, 90, 1 << 20]))
def test_mxfp4(experts: int, n: int, groups: int, seed: int, chunk: int) -> None:
    blocks, scales = random_bytes(experts, n, groups, 16, seed=seed), random_bytes(experts, n, groups, seed=seed + 1)
    tensors = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "_CHUNK", chunk)
        out = decoded(tensors, MXFP4, "mlp.experts.down_proj")
    expected = torch.empty(experts, groups * 32, n)
    for e, i, g in [(e, i, g) for e in range(experts) for i in range(n) for g in range(groups)]:
        scale = e8m0(int(scales[e, i, g]))
        expected[e, g * 32 : g * 32 + 32, i] = torch.tensor(
            [f32(e2m1(c) * scale) for c in nibbles(raw(blocks[e, i, g]))]
        )
    assert same(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_as_transformers(dtype: torch.dtype) -> None:
    """Every byte with every scale but NaN's, for which `ldexp` makes 2¹²⁸; OCP MX makes the whole group NaN."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(2, 255, 16).contiguous()
    tensors = {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}
    out = decoded(tensors, MXFP4, "gate_up_proj", dtype)
    assert same(out, convert_moe_packed_tensors(blocks, scales, dtype=dtype))
    assert float(out[0, :, 0].abs().max()) == 6 * 2.0**-127
    scales[0, 0, 3] = 255
    out = decoded(tensors, MXFP4, "gate_up_proj", dtype)
    assert out[0, 96:128, 0].isnan().all()
    assert int(out.isnan().sum()) == 32


def test_mxfp4_of_every_other_row() -> None:
    """gpt-oss interleaves gate and up; each can be decoded on its own, into its half of a stacked tensor."""
    tensors = {"gate_up_proj_blocks": random_bytes(2, 10, 3, 16), "gate_up_proj_scales": random_bytes(2, 10, 3)}
    logical = logical_tensors(headers(tensors), MXFP4, "config.json")["gate_up_proj"]
    expected = run(logical, tensors, torch.empty(2, 96, 10))
    stacked = torch.empty(2, 10, 96)
    assert logical.decode is not None
    for half in (0, 1):
        parts = [tensors[part][:, half::2] for part in logical.parts]
        logical.decode(parts, stacked[:, 5 * half : 5 * half + 5].transpose(1, 2))
    assert same(stacked, torch.cat([expected[..., 0::2], expected[..., 1::2]], -1).transpose(1, 2))


# where it goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_out_may_be_any_view(dtype: torch.dtype) -> None:
    fp8 = {"w": random_bytes(140, 150, seed=3).view(torch.float8_e4m3fn), "w_scale_inv": random_scale(2, 2)}
    packed = {
        "weight_packed": random_words(7, 8),
        "weight_scale": random_scale(7, 2),
        "weight_shape": torch.tensor([7, 64]),
    }
    mxfp4 = {"x_blocks": random_bytes(2, 6, 2, 16), "x_scales": torch.full((2, 6, 2), 125, dtype=torch.uint8)}
    cases: list[tuple[dict[str, Tensor], Any, str]] = [
        (fp8, FP8, "w"),
        (packed, int4(), "weight"),
        (mxfp4, MXFP4, "x"),
    ]
    for tensors, config, name in cases:
        logical = logical_tensors(headers(tensors), config, "config.json")[name]
        shape = logical.header.shape
        expected = run(logical, tensors, torch.empty(shape)).to(dtype)
        larger = torch.full([2 * size for size in shape], 3.0, dtype=dtype)
        view = larger[tuple(slice(1, size + 1) for size in shape)]
        assert same_any(run(logical, tensors, view), expected)
        assert int((larger == 3.0).sum()) >= larger.numel() - view.numel()
        transposed = torch.empty(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
        assert same_any(run(logical, tensors, transposed), expected)
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        assert same_any(run(logical, tensors, parameter).detach(), expected)


def same_any(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(1234.0), b.nan_to_num(1234.0))


def test_decoding_does_not_hang_on_the_default_dtype() -> None:
    mxfp4 = {"x_blocks": random_bytes(1, 3, 2, 16), "x_scales": random_bytes(1, 3, 2)}
    fp8 = {"w": random_bytes(3, 5).view(torch.float8_e4m3fn), "w_scale_inv": random_scale(1, 1)}
    before = decoded(mxfp4, MXFP4, "x"), decoded(fp8, FP8, "w")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert same(decoded(mxfp4, MXFP4, "x"), before[0])
        assert same(decoded(fp8, FP8, "w"), before[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_empty_tensors() -> None:
    tensors = {"w": torch.empty(0, 8, dtype=torch.float8_e4m3fn), "w_scale_inv": torch.empty(0, 1)}
    assert decoded(tensors, FP8, "w").shape == (0, 8)
    experts = {
        "x_blocks": torch.empty(0, 4, 1, 16, dtype=torch.uint8),
        "x_scales": torch.empty(0, 4, 1, dtype=torch.uint8),
    }
    assert decoded(experts, MXFP4, "x").shape == (0, 32, 4)


# what is refused


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


FP8_PAIR = {"a.weight": Header("F8_E4M3", (130, 256)), "a.weight_scale_inv": Header("F32", (2, 2))}
PACKED = {
    "a.weight_packed": Header("I32", (16, 8)),
    "a.weight_scale": Header("BF16", (16, 2)),
    "a.weight_shape": Header("I64", (2,)),
}
BLOCKS = {"e.down_proj_blocks": Header("U8", (2, 4, 3, 16)), "e.down_proj_scales": Header("U8", (2, 4, 3))}


def less(stored: dict[str, Header], name: str) -> dict[str, Header]:
    return {other: header for other, header in stored.items() if other != name}


@pytest.mark.parametrize(
    ("stored", "config", "named"),
    [
        (FP8_PAIR | {"a.weight_scale_inv": Header("F32", (2, 3))}, FP8, "'a.weight_scale_inv'"),
        (FP8_PAIR | {"a.weight_scale_inv": Header("F32", (2, 2, 1))}, FP8, "'a.weight_scale_inv'"),
        (FP8_PAIR | {"a.weight_scale_inv": Header("F32", (1, 2))}, FP8, "'a.weight_scale_inv'"),
        (FP8_PAIR | {"a.weight_scale_inv": Header("F32", ())}, FP8, "'a.weight_scale_inv'"),
        (FP8_PAIR | {"a.weight_scale_inv": Header("I32", (2, 2))}, FP8, "'a.weight_scale_inv' is I32"),
        (FP8_PAIR | {"a.weight_scale_inv": Header("U8", (2, 2))}, FP8, "'a.weight_scale_inv' is U8"),
        (FP8_PAIR | {"a.weight": Header("BF16", (130, 256))}, FP8, "'a.weight' is BF16"),
        (FP8_PAIR | {"a.weight": Header("F8_E5M2", (130, 256))}, FP8, "'a.weight' is F8_E5M2"),
        (FP8_PAIR | {"a.weight": Header("F8_E4M3FNUZ", (130, 256))}, FP8, "'a.weight' is F8_E4M3FNUZ"),
        (FP8_PAIR | {"a.weight": Header("F8_E4M3", (256,))}, FP8, "'a.weight' has shape"),
        (FP8_PAIR | {"a.weight": Header("F8_E4M3", (1, 130, 256))}, FP8, "'a.weight_scale_inv' has shape"),
        (FP8_PAIR | {"a\nb_scale_inv": Header("F32", ())}, FP8, "'a\\\\nb_scale_inv' needs"),
        (less(FP8_PAIR, "a.weight_scale_inv"), FP8, "'a.weight' needs 'a.weight_scale_inv'"),
        (less(FP8_PAIR, "a.weight"), FP8, "'a.weight_scale_inv' needs 'a.weight'"),
        (FP8_PAIR, FP8 | {"weight_block_size": None}, "'a.weight_scale_inv' has shape"),
        (FP8_PAIR, FP8 | {"weight_block_size": [64, 128]}, "'a.weight_scale_inv' has shape"),
        (FP8_PAIR, FP8 | {"weight_block_size": [2**63 - 1, 1]}, "'a.weight_scale_inv' has shape"),
        (FP8_PAIR, FP8 | {"weight_block_size": [10**30, 1]}, "weight_block_size.0"),
        (FP8_PAIR, FP8 | {"weight_block_size": [128]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": [128, 0]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": [-128, 128]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": [True, 128]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": [math.nan, 128]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": [128.0, 128]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": 128}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": {"rows": 128}}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": nested(5000)}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"weight_block_size": [10**5000, "x"]}, "weight_block_size"),
        (FP8_PAIR, FP8 | {"fmt": "e3m4"}, "fmt = 'e3m4'"),
        (FP8_PAIR, FP8 | {"scale_fmt": "ue4m3"}, "scale_fmt = 'ue4m3'"),
        (FP8_PAIR, FP8 | {"expert_dtype": "fp4"}, "expert_dtype = 'fp4'"),
        (FP8_PAIR, FP8 | {"hadamard": True}, "'hadamard'"),
        (FP8_PAIR, FP8 | {"quant_method": "fp9"}, "quant_method = 'fp9'"),
        (FP8_PAIR, FP8 | {"quant_method": "f\np8" + "x" * 10000}, "quant_method = 'f\\\\np8"),
        (FP8_PAIR, FP8 | {"quant_method": nested(5000)}, "quant_method = list"),
        (FP8_PAIR, {}, "quant_method: this field is required"),
        (FP8_PAIR, {"load_in_4bit": True}, "unquantised checkpoint"),
        (FP8_PAIR, [FP8], "quantization_config: expected an object, found list"),
        (FP8_PAIR, "fp8", "quantization_config: expected an object, found str"),
        (PACKED | {"a.weight_packed": Header("I64", (16, 8))}, int4(), "'a.weight_packed' is I64"),
        (PACKED | {"a.weight_packed": Header("I32", (16,))}, int4(), "'a.weight_packed' has shape"),
        (PACKED | {"a.weight_packed": Header("I32", (16, 7))}, int4(), "'a.weight_packed' holds 56 columns"),
        (PACKED | {"a.weight_packed": Header("I32", (16, 0))}, int4(), "'a.weight_packed' holds 0 columns"),
        (PACKED | {"a.weight_scale": Header("BF16", (16, 1))}, int4(), "'a.weight_scale' has shape"),
        (PACKED | {"a.weight_scale": Header("F8_E4M3", (16, 2))}, int4(), "'a.weight_scale' is F8_E4M3"),
        (PACKED | {"a.weight_shape": Header("I64", (3,))}, int4(), "'a.weight_shape' has shape"),
        (less(PACKED, "a.weight_packed"), int4(), "needs 'a.weight_packed'"),
        (less(PACKED, "a.weight_scale"), int4(), "'a.weight_packed' needs 'a.weight_scale'"),
        (less(PACKED, "a.weight_shape"), int4(), "'a.weight_packed' needs 'a.weight_shape'"),
        (PACKED | {"a.weight": Header("BF16", (16, 64))}, int4(), "'a.weight' is stored twice"),
        (PACKED | {"a.weight_g_idx": Header("I32", (64,))}, int4(), "'a.weight_g_idx' is not supported"),
        (PACKED | {"a.weight_zero_point": Header("I32", (2, 2))}, int4(), "'a.weight_zero_point' is not supported"),
        (PACKED, int4(symmetric=False), "'a.weight_packed' needs 'a.weight_zero_point'"),
        (PACKED | {"a.weight_zero_point": Header("I8", (16, 2))}, int4(symmetric=False), "'a.weight_zero_point' is I8"),
        (PACKED, int4(symmetric=1), "weights.symmetric = 1"),
        (PACKED, int4(num_bits=3), "weights.num_bits = 3"),
        (PACKED, int4(type="float"), "weights.type = 'float'"),
        (PACKED, int4(strategy="block"), "weights.strategy = 'block'"),
        (PACKED, int4(strategy="channel"), "group_size = 32 contradicts"),
        (PACKED, int4(group_size=0), "group_size = 0"),
        (PACKED, int4(group_size=-2), "weights.group_size = -2"),
        (PACKED, int4(group_size=math.nan), "weights.group_size = nan"),
        (PACKED, int4(group_size=None), "group_size = None"),
        (PACKED, int4(group_size=2**62), "holds 64 columns"),
        (PACKED, int4(group_size=10**5000), "weights.group_size = an integer of 16610 bits"),
        (PACKED, int4(actorder="group"), "weights.actorder = 'group'"),
        (PACKED, int4(secret=1), "'weights.secret'"),
        (PACKED, int4() | {"format": "int-quantized"}, "format = 'int-quantized'"),
        (PACKED, int4() | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (PACKED, int4() | {"config_groups": {}}, "config_groups"),
        (PACKED, int4() | {"config_groups": [1]}, "config_groups"),
        (PACKED, int4() | {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.'W4A16': expected an object"),
        (PACKED, int4() | {"config_groups": {"g": {"targets": []}}}, "config_groups: no group has weights"),
        (
            PACKED,
            int4() | {"config_groups": {"g": {"weights": WEIGHTS}, "h": {"weights": WEIGHTS | {"group_size": 64}}}},
            "config_groups.'h'.weights",
        ),
        (less(BLOCKS, "e.down_proj_scales"), MXFP4, "'e.down_proj_blocks' needs 'e.down_proj_scales'"),
        (less(BLOCKS, "e.down_proj_blocks"), MXFP4, "'e.down_proj_scales' needs 'e.down_proj_blocks'"),
        (BLOCKS | {"e.down_proj_scales": Header("U8", (2, 4, 4))}, MXFP4, "'e.down_proj_scales' has shape"),
        (BLOCKS | {"e.down_proj_scales": Header("BF16", (2, 4, 3))}, MXFP4, "'e.down_proj_scales' is BF16"),
        (BLOCKS | {"e.down_proj_blocks": Header("U8", (2, 4, 3, 8))}, MXFP4, "'e.down_proj_blocks' has shape"),
        (BLOCKS | {"e.down_proj_blocks": Header("U8", (4, 3, 16))}, MXFP4, "'e.down_proj_blocks' has shape"),
        (BLOCKS | {"e.down_proj_blocks": Header("I8", (2, 4, 3, 16))}, MXFP4, "'e.down_proj_blocks' is I8"),
        (BLOCKS | {"e.down_proj": Header("BF16", (2, 96, 4))}, MXFP4, "'e.down_proj' is stored twice"),
        (BLOCKS, MXFP4 | {"group_size": 16}, "'group_size'"),
    ],
)
def test_bad_inputs(stored: dict[str, Header], config: Any, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        logical_tensors(stored, config, "/m/config.json")
    message = str(caught.value)
    assert message.startswith("/m/config.json: ")
    assert named.replace("\\\\", "\\") in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "nvfp4", 8, None, True])
def test_other_methods_say_what_to_use(method: Any) -> None:
    with pytest.raises(CheckpointError, match=r"quant_method.*known: fp8, compressed-tensors, mxfp4"):
        logical_tensors({}, {"quant_method": method, "bits": 4}, "config.json")


def test_deep_nesting_in_a_list_of_modules_is_harmless() -> None:
    assert logical_tensors({}, FP8 | {"modules_to_not_convert": nested(100_000)}, "config.json") == {}
    assert logical_tensors({}, int4() | {"ignore": nested(100_000)}, "config.json") == {}
