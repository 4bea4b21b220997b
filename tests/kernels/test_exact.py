"""`mh_run.exact`: a row's bits are those it has alone, whatever the number of rows, of threads, and its place."""

import pytest
import torch

from manyhands.kernels import ExpertWeights, native
from manyhands.kernels.moment import exactly, is_exact
from manyhands.kernels.native import NativeError, library, views
from manyhands.kernels.native.library import CRun
from manyhands.quant import pack_experts, pack_linear

from .dense_oracle import make_case

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = list(native.levels()) if native.available() else []
FLOATS = [("float32", 32), ("bf16", 32)]
COUNTS = (1, 2, 3, 5, 16, 17, 193, 400)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FLOATS)
def test_a_row_of_a_packed_layer(level: str, dtype: torch.dtype, format: tuple[str, int]) -> None:
    layer = pack_linear(draw(50, 70), draw(50, seed=1), *format)
    x = draw(COUNTS[-1], 70, seed=2).to(dtype)
    with exactly():
        alone = torch.cat([native.linear(row, layer, level, 1) for row in x[:, None]])
        for count in COUNTS:
            first = COUNTS[-1] - count
            assert torch.equal(native.linear(x[first:], layer, level, 2), alone[first:]), count
    exact = x.double() @ layer.dequantize()[0].double().T + layer.dequantize()[1].double()
    torch.testing.assert_close(alone.double(), exact, atol=1e-4, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["float32", "bf16", "plain float32", "plain bf16", "rounded"])
def test_a_row_of_an_expert(level: str, kind: str) -> None:
    T = 230
    case = make_case(T, 70, 40, 3, 2, activation="swiglu", bias=True, drop=0.1)
    case.ids[:200] = torch.tensor([0, 1])  # more than a block of rows
    x = case.x.bfloat16() if kind in ("plain bf16", "rounded") else case.x
    experts: ExpertWeights = case.experts.cast(torch.bfloat16) if kind == "plain bf16" else case.experts
    packed = pack_experts(case.experts, kind, 32) if kind in ("float32", "bf16") else None

    def run(rows: slice, threads: int) -> torch.Tensor:
        tensors = (x[rows], case.ids[rows], case.weights[rows], case.kept[rows])
        with torch.no_grad():
            if packed is not None:
                return native.packed_experts(*tensors, packed, level, threads)
            return native.Native(level, threads)(*tensors, experts)

    with exactly():
        alone = torch.cat([run(slice(t, t + 1), 1) for t in range(T)])
        for rows, threads in ((slice(0, T), 1), (slice(0, T), 3), (slice(190, 207), 2), (slice(5, 9), 1)):
            assert torch.equal(run(rows, threads), alone[rows]), rows
    many = run(slice(0, T), 2)  # bf16's units may round what the exact order does not
    torch.testing.assert_close(many, alone, atol=1e-1 if "bf16" in kind or kind == "rounded" else 1e-5, rtol=1e-1)


def test_the_moment_says_it_and_ends() -> None:
    assert not is_exact()
    with exactly(), exactly(False):
        assert is_exact()
    assert not is_exact()


def test_what_is_neither_0_nor_1_is_refused() -> None:
    layer = pack_linear(draw(16, 64), None, "float32", 32)
    x, y = draw(2, 64), torch.empty(2, 16)
    arguments = (views.linear(layer.record, layer.layout), views.rows(x), views.rows(y))
    with pytest.raises(NativeError, match="exact is 2, not 0 or 1"):
        library.call("mh_linear_forward", *arguments, CRun(0, 1, 2))
