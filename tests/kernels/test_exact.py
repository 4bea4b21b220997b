"""`mh_run.exact`: a row's bits are those it has alone, whatever the number of rows, of threads, and its place."""

import pytest
import torch

from manyhands.config import RouterConfig
from manyhands.kernels import ExpertWeights, native
from manyhands.kernels.moment import exactly, is_exact
from manyhands.kernels.native import NativeError, library, step, views
from manyhands.kernels.native.library import CRun
from manyhands.moe import Router
from manyhands.quant import pack_experts, pack_linear
from manyhands.runtime.claims.route import router_of

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


def plain(count: int, K: int, N: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(count, K, seed=2).to(dtype), draw(N, K).to(dtype), draw(N, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "N"), [(16, 1), (96, 50), (70, 33), (1, 16), (1003, 18)])
def test_a_row_of_a_plain_layer(dtype: torch.dtype, K: int, N: int) -> None:
    """Also the same at every level, which all fuse and sum alike."""
    x, weight, bias = plain(COUNTS[-1], K, N, dtype)
    layer, found = views.plain_linear(weight, bias), []
    for level in map(library.level_code, LEVELS):
        alone = torch.cat([step.linears(row, [layer], level, 1)[0] for row in x[:, None]])
        for count in COUNTS:
            first = COUNTS[-1] - count
            assert torch.equal(step.linears(x[first:], [layer], level, 2)[0], alone[first:]), count
        found.append(alone)
    exact = x.double() @ weight.double().T + bias.double()
    bound = (K + 3) * 2**-24 * (x.double().abs() @ weight.double().abs().T + bias.abs()) + exact.abs() * (
        2**-8 if dtype == torch.bfloat16 else 0
    )
    assert ((found[0].double() - exact).abs() <= bound).all()
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E", [7, 16, 40])
def test_a_token_s_routing(score: str, E: int) -> None:
    config = RouterConfig(num_experts=E, num_experts_per_tok=3, score=score, logit_bias=True)
    router = Router(config, 70).eval()
    for tensor in router.state_dict().values():
        tensor.copy_(draw(*tensor.shape, seed=3))
    x, struct, first = draw(COUNTS[-1], 70, seed=4), router_of(router, 70), None
    for level in map(library.level_code, LEVELS):
        alone = [
            torch.cat(parts) for parts in zip(*(step.route(struct, row, level, 1) for row in x[:, None]), strict=True)
        ]
        for count in COUNTS:
            at = COUNTS[-1] - count
            assert all(map(torch.equal, step.route(struct, x[at:], level, 2), (part[at:] for part in alone))), count
        first = first or alone
        assert all(map(torch.equal, alone, first))
    expected = router(x)
    torch.testing.assert_close(first[1], expected.scores, atol=1e-6, rtol=1e-5)
    assert torch.equal(first[2], expected.expert_ids)


@pytest.mark.parametrize("width", [70, 512])
def test_a_row_of_a_norm(width: int) -> None:
    x, weight = draw(COUNTS[-1], width), draw(width, seed=1)
    norm = step.norm_of(weight, 1e-5)
    for level in map(library.level_code, LEVELS):
        together = step.rms_norm(x, norm, level, 3)
        for at in (0, 7, 250):
            assert torch.equal(step.rms_norm(x[at : at + 1], norm, level, 1), together[at : at + 1])
