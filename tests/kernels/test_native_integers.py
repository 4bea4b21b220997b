"""Products of int8 and int4 records are one arithmetic (native/integers.inl), bit for bit.

Held against it written out in numpy, at every level; and a row's bits are the same whatever the number of rows, its
place among them, the other rows, the threads and the level.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from manyhands.kernels import native
from manyhands.quant import PackedExperts, PackedLinear, pack_experts, pack_linear

from .dense_oracle import Case, make_case

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = native.levels() if native.available() else []
FORMATS = [("int8", 32), ("int4", 32), ("int4", 64), ("q8_0", 32), ("q4_0", 32)]
ROW_GROUP = 64
"""Inputs that share an activation's scale beside int8 weights (kQuantGroup in native/kernels.h)."""


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of float32, rounded once: in float64 the product is exact, and the sum is rounded to odd."""
    product, z = np.float64(x) * y, np.float64(z)
    total = product + z
    back = total - product
    left = (product - (total - back)) + (z - back)
    even = (total.view(np.int64) & 1) == 0
    away = np.where((left > 0) == (total > 0), 1, -1)
    return np.where((left != 0) & even, (total.view(np.int64) + away).view(np.float64), total).astype(np.float32)


def quantised(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """[T, K] float32 -> integers [T, groups, group] and float32 scales [T, groups]; K a multiple of 64."""
    pieces = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(x.shape[0], -1, group)
    largest = np.abs(pieces).max(-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 1e-30)
    return np.rint(pieces * inverse[..., None]).astype(np.int64), largest / np.float32(127)


def stored(packed: PackedLinear, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers [N, groups, group] and scales: float32 [N] (int8) or float32 [N, groups]."""
    (matrix,) = packed.layout.matrices
    lines = packed.section("weight").numpy()
    if matrix.format == "int8":
        w = lines.view(np.int8).reshape(matrix.panels, -1, 16, 4).astype(np.int64)
        scales = packed.section("scales").view(torch.float32).numpy().reshape(-1)
    else:
        if matrix.format == "q8_0":
            w = lines.view(np.int8).reshape(matrix.panels, -1, 16, 4).astype(np.int64)
        else:
            b = lines.reshape(matrix.panels, -1, 1, 16, 4)
            w = np.concatenate([b & 15, b >> 4], 2).reshape(matrix.panels, -1, 16, 4).astype(np.int64) - 8
        dtype = torch.bfloat16 if matrix.format == "int4" else torch.float16
        scales = packed.section("scales").view(dtype).float().numpy()
        scales = scales.reshape(matrix.panels, -1, 16).transpose(0, 2, 1).reshape(matrix.panels * 16, -1)
    w = w.transpose(0, 2, 1, 3).reshape(matrix.panels * 16, -1)
    return np.pad(w, ((0, 0), (0, -w.shape[1] % group))).reshape(w.shape[0], -1, group), scales


def reference(x: Tensor, packed: PackedLinear) -> Tensor:
    """[T, K] -> [T, N], the arithmetic as it is defined."""
    (matrix,) = packed.layout.matrices
    group = matrix.group_size or ROW_GROUP
    q, x_scale = quantised(np.pad(x.numpy(), ((0, 0), (0, matrix.depth - x.shape[1]))), group)
    w, w_scale = stored(packed, group)
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for g in range(q.shape[1]):
        d, s = (q[:, g] @ w[:, g].T).astype(np.float32), x_scale[:, g, None]
        total = fma(d, s, total) if matrix.format == "int8" else fma(d * s, w_scale[None, :, g], total)
    total = total * w_scale if matrix.format == "int8" else total
    bias = packed.dequantize()[1]
    return torch.from_numpy(total[:, : matrix.outputs]) + (0 if bias is None else bias)


def case_of(N: int, K: int, count: int, format: str, group: int, bias: bool = True) -> tuple[Tensor, PackedLinear]:
    g = torch.Generator().manual_seed(N + K)
    x = torch.randn(count, K, generator=g) * torch.exp(2 * torch.randn(count, 1, generator=g))
    w, b = torch.randn(N, K, generator=g), torch.randn(N, generator=g)
    return x, pack_linear(w, b if bias else None, format, group)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (40, 70), (32, 640), (17, 321), (17, 2100)])
def test_a_linear_layer_is_the_arithmetic_written_out(level: str, format: str, group: int, N: int, K: int) -> None:
    x, packed = case_of(N, K, 37, format, group)
    x[3], x[5, : K // 2], x[7] = 0, 0, x[7] * 1e-34
    assert torch.equal(native.linear(x, packed, level=level, threads=2), reference(x, packed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_extreme_integers_do_not_saturate(level: str, format: str, group: int) -> None:
    """Every product of a group as large as it can be, in either direction."""
    x, packed = case_of(16, 256, 6, format, group, bias=False)
    packed.section("weight").view(torch.int8)[::2] = 127 if format == "int8" else -1  # 15 and 15: the largest nibbles
    packed.section("weight").view(torch.int8)[1::2] = -127 if format == "int8" else 0
    x[0], x[1], x[2] = 1, -1, torch.tensor([1.0, -1.0]).repeat(128)
    assert torch.equal(native.linear(x, packed, level=level), reference(x, packed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_a_row_depends_on_that_row_alone(level: str, format: str, group: int) -> None:
    """For any number of rows, at any place among others, on any number of threads."""
    x, packed = case_of(40, 200, 200, format, group)
    expected = native.linear(x, packed, level="portable", threads=1)
    for count in [*range(1, 36), 48, 49, 64, 100, 191, 192, 193, 200]:
        for first in (0, 200 - count):
            got = native.linear(x[first : first + count], packed, level=level, threads=1 + count % 3)
            assert torch.equal(got, expected[first : first + count]), (count, first)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(level: str, format: str, group: int, bad: float) -> None:
    x, packed = case_of(40, 200, 30, format, group)
    clean = native.linear(x, packed, level=level)
    x[11, 150] = bad
    got = native.linear(x, packed, level=level)
    assert got[11].isnan().all()
    got[11] = clean[11]
    assert torch.equal(got, clean)


def expert_case(T: int, format: str, group: int, activation: str = "swiglu") -> tuple[Case, PackedExperts]:
    """Expert 0 takes every token, expert 4 none, the others some."""
    ids = torch.stack([torch.zeros(T, dtype=torch.int64), 1 + torch.arange(T) ** 2 % 3], 1)
    case = make_case(T, 70, 40, 5, 2, activation=activation, bias=True, drop=0.1, ids=ids)
    return case, pack_experts(case.experts, format, group)


def run(case: Case, packed: PackedExperts, rows: slice, level: str, threads: int = 2) -> Tensor:
    given = (case.x[rows], case.ids[rows], case.weights[rows], case.kept[rows])
    return native.packed_experts(*given, packed, level=level, threads=threads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "geglu_tanh", "gelu", "relu"])
def test_a_token_s_experts_depend_on_that_token_alone(level: str, format: str, group: int, activation: str) -> None:
    case, packed = expert_case(200, format, group, activation)
    expected = run(case, packed, slice(None), "portable", 1)
    for count in (1, 2, 3, 5, 8, 11, 12, 13, 16, 17, 25, 33, 64, 199, 200):
        for rows in (slice(0, count), slice(200 - count, 200)):
            got = run(case, packed, rows, level, 1 + count % 3)
            assert torch.equal(got, expected[rows]), (count, rows)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_chunks_of_a_batch_and_bad_neighbours_of_experts(level: str, format: str, group: int) -> None:
    case, packed = expert_case(60, format, group)
    whole = run(case, packed, slice(None), level)
    for size in (1, 7, 30):
        assert torch.equal(torch.cat([run(case, packed, slice(i, i + size), level) for i in range(0, 60, size)]), whole)
    case.x[20, 3], case.x[41, 69] = float("nan"), float("inf")
    case.kept[[20, 41]] = True
    bad = run(case, packed, slice(None), level)
    assert bad[[20, 41]].isnan().all()
    good = [t for t in range(60) if t not in (20, 41)]
    assert torch.equal(bad[good], whole[good])
