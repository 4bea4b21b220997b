"""The order of every sum, written out in NumPy: each level's products with integer weights equal it, bit for bit.

T rows, N outputs, K inputs (padded to a multiple of 64), G groups of inputs.
"""

import numpy as np
import pytest
import torch

from manyhands.kernels import native
from manyhands.quant import pack_linear
from manyhands.quant.rounding import quantize

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = native.levels() if native.available() else []
GROUP = 64
"""Inputs that share a scale beside int8 weights."""
F = np.float32


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c in float32, rounded once: in float64 the sum is rounded to odd, so that a second rounding is harmless."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    left = (product - (total - back)) + (c - back)
    even = (total.view(np.int64) & 1) == 0
    return np.where((left != 0) & even, np.nextafter(total, np.where(left > 0, np.inf, -np.inf)), total).astype(F)


def rounded(x_TK: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers [T, G, group] and scales [T, G] of rows."""
    groups = x_TK.reshape(len(x_TK), -1, group)
    largest = np.abs(groups).max(-1)
    inverse = np.where(largest > F(1e-30), F(127) / np.maximum(largest, F(1e-30)), F(0))
    return np.rint(groups * inverse[..., None]).astype(np.int64), largest / F(127)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, format: str, group: int) -> np.ndarray:
    """x [T, K] times the record of W [N, K], plus the bias."""
    (matrix,) = pack_linear(weight, None, format, group or 32).layout.matrices
    pad = (0, matrix.depth - x.shape[1])
    q_w, s_w = (t.numpy() for t in quantize(torch.nn.functional.pad(weight, pad), matrix))
    group = group or GROUP
    q_x, s_x = rounded(torch.nn.functional.pad(x, pad).numpy(), group)
    dots = np.einsum("tgk,ngk->tgn", q_x, q_w.reshape(len(q_w), -1, group).astype(np.int64)).astype(F)
    total = np.zeros((len(x), len(q_w)), F)
    for g in range(dots.shape[1]):
        scale = np.broadcast_to(s_x[:, g, None], total.shape)
        if format == "int8":
            total = fma(dots[:, g], scale, total)
        else:
            total = fma(dots[:, g] * scale, np.broadcast_to(s_w[:, g], total.shape), total)
    total = total * s_w[:, 0] if format == "int8" else total
    return total + bias.numpy()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("format", "group"), [("int8", 0), ("int4", 32), ("int4", 64), ("q8_0", 32), ("q4_0", 32)])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 61])
def test_products_of_integers_are_summed_as_written(level: str, format: str, group: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    K, N = (131, 21) if rows % 2 else (192, 48)
    x = torch.randn(rows, K, generator=generator) * torch.rand(K, generator=generator).exp2().pow(4)
    weight, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    expected = product(x, weight, bias, format, group)
    packed = pack_linear(weight, bias, format, group or 32)
    for threads in (1, 2):
        y = native.linear(x, packed, level, threads)
        np.testing.assert_array_equal(y.numpy(), expected)
