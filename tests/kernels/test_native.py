"""The native backend, at every level this CPU can run, against the float64 oracle: forward and every gradient.

test_backends.py and test_extremes.py run on it too, at its best level; here are the shapes that its blocks, tiles and
padding make special.
"""

import multiprocessing
import os

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.kernels import BACKENDS, Backend, native, run_experts
from manyhands.kernels.native.backend import supports_native
from manyhands.kernels.native.library import VERIFIED

from .dense_oracle import Case, assert_matches_oracle, forward_and_gradients, make_case

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = [level for level in native.levels() if level in VERIFIED] if native.available() else []
ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "swiglu_oai", "geglu_tanh")
SHAPES = {  # T, D, F, E, K
    "odd sizes": (11, 37, 53, 5, 2),
    "whole panels": (24, 64, 64, 4, 2),
    "few rows each": (7, 65, 17, 9, 3),
    "one token": (1, 48, 33, 4, 3),
    "no token": (0, 8, 8, 3, 1),
    "several blocks of one expert": (600, 20, 24, 1, 1),
    "more inputs than a chunk": (9, 300, 270, 2, 1),
    "one of everything": (1, 1, 1, 1, 1),
}


def forced(level: str, threads: int) -> Backend:
    return Backend("forced", supports_native, native.Native(level, threads))


@pytest.fixture(params=LEVELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(BACKENDS, "forced", forced(request.param, 1))
    return "forced"


def tolerance(dtype: torch.dtype, backend: str) -> float:
    """Levels that multiply bf16 round their rows, the others only their results."""
    return 1e-5 if dtype == torch.float32 else 2e-2


def in_turn(*activations: str) -> pytest.MarkDecorator:
    """Every shape with every activation; biases are there in every other pair, so that each meets them and does not."""
    pairs = [(shape, a, (s + n) % 2 == 1) for s, shape in enumerate(SHAPES) for n, a in enumerate(activations)]
    return pytest.mark.parametrize(("shape", "activation", "bias"), pairs)


@in_turn(*ACTIVATIONS)
def test_matches_the_oracle(backend: str, activation: str, bias: bool, shape: str) -> None:
    assert_matches_oracle(make_case(*SHAPES[shape], activation=activation, bias=bias, drop=0.2), backend)


@in_turn("swiglu", "geglu", "gelu", "swiglu_oai", "geglu_tanh")
def test_matches_the_oracle_in_bfloat16(backend: str, activation: str, bias: bool, shape: str) -> None:
    assert_matches_oracle(
        make_case(*SHAPES[shape], activation=activation, bias=bias, drop=0.2), backend, torch.bfloat16, tol=2e-2
    )


def test_one_expert_takes_all_and_the_others_nothing(backend: str) -> None:
    case = make_case(70, 24, 20, 5, 1, bias=True, ids=torch.full((70, 1), 3))
    assert_matches_oracle(case, backend)
    _, grads = forward_and_gradients(case.cast(torch.float32), backend)
    for name in ("up", "down", "up_bias", "down_bias"):
        assert torch.count_nonzero(grads[name][[0, 1, 2, 4]]) == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 255, 256, 257])
def test_every_number_of_rows(backend: str, rows: int) -> None:
    """The vector path ends at 4 rows, tiles have 2 to 14, blocks 256."""
    assert_matches_oracle(make_case(rows, 32, 48, 1, 1, ids=torch.zeros(rows, 1, dtype=torch.long)), backend)


def test_extreme_gates(backend: str) -> None:
    """Saturated activations stay finite, forward and backward."""
    for activation in ACTIVATIONS:
        case = make_case(6, 16, 16, 2, 1, activation=activation, bias=True)
        case.x = case.x * torch.tensor([0.0, 1e-20, 1.0, 10.0, 30.0, 100.0])[:, None]
        assert_matches_oracle(case, backend, tol=3e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(backend: str, bad: float) -> None:
    case = make_case(12, 16, 16, 2, 1).cast(torch.float32)
    clean, _ = forward_and_gradients(case.cast(torch.float32), backend)
    case.x.data[5, 3] = bad
    with torch.no_grad():
        y = run_experts(backend, case.x, case.ids, case.weights, case.kept, case.experts)
    assert not y[5].isfinite().any()
    rest = [i for i in range(12) if i != 5]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_no_bit(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(300, 70, 90, 6, 3, bias=True, drop=0.1)
    results = []
    for threads in (1, 2, 2, 5):
        monkeypatch.setitem(BACKENDS, "forced", forced(level, threads))
        results.append(forward_and_gradients(case.cast(dtype), "forced"))
    for y, grads in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in grads)


def test_levels_agree() -> None:
    case = make_case(40, 70, 90, 6, 3, bias=True).cast(torch.float32)
    with torch.no_grad():
        args = (case.x, case.ids, case.weights, case.kept, case.experts)
        results = [native.Native(level, 1)(*args) for level in LEVELS]
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=1e-5, atol=1e-5)


def run_once(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return native.Native()(case.x, case.ids, case.weights, case.kept, case.experts)


def test_strided_and_expanded_tokens() -> None:
    case = make_case(8, 16, 16, 3, 2)
    wide = torch.randn(8, 40)
    wide[:, 8:24] = case.x
    expected = run_once(case)
    case.x = wide[:, 8:24]
    assert torch.equal(run_once(case), expected)
    case.x = wide[:1, 8:24].expand(8, 16)
    assert run_once(case).isfinite().all()


def test_an_expanded_output_gradient() -> None:
    case = make_case(8, 16, 16, 3, 2).cast(torch.float32)
    run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts).sum().backward()
    other = make_case(8, 16, 16, 3, 2).cast(torch.float32)
    run_experts("eager", other.x, other.ids, other.weights, other.kept, other.experts).sum().backward()
    torch.testing.assert_close(case.x.grad, other.x.grad, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted_is_computed() -> None:
    case = make_case(8, 16, 16, 3, 2, bias=True)
    case.weights.requires_grad_()
    y = run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts)
    y.sum().backward()
    assert case.weights.grad is not None and case.experts.up.grad is None


def test_float64_is_refused_by_name() -> None:
    case = make_case(2, 8, 8, 3, 1)
    with pytest.raises(ConfigError, match=r"float32 and bfloat16 on the CPU.*use 'eager' or 'auto'"):
        run_experts("native", case.x.double(), case.ids, case.weights, case.kept, case.experts)


def test_an_expert_that_is_not_there_is_an_error_not_a_crash() -> None:
    case = make_case(4, 8, 8, 3, 1, ids=torch.tensor([[0], [1], [3], [2]]))
    with pytest.raises(IndexError, match="expert 3 of 3"):
        run_once(case)


def test_levels_by_name() -> None:
    assert LEVELS[0] == "portable"
    with pytest.raises(ConfigError, match="portable, avx2, avx512, avx512_bf16, amx"):
        native.Native("sse9")(*[torch.zeros(1, 1)] * 4, make_case(1, 8, 8, 1, 1).experts)
    case = make_case(2, 8, 8, 1, 1)
    for level in {"portable", "avx2", "avx512", "avx512_bf16", "amx"} - set(native.levels()):
        with pytest.raises(native.NativeError, match="cannot run level"):
            native.Native(level)(case.x, case.ids, case.weights, case.kept, case.experts)


def _in_a_child(case, results) -> None:  # type: ignore[no-untyped-def]
    y = run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts)
    results.put(y.tolist())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking a process that has threads: that is the point
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    case, threads = make_case(200, 16, 16, 4, 2), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        y = run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=_in_a_child, args=(case, results))
        child.start()
        found = results.get(timeout=30)
        child.join(timeout=30)
    finally:
        torch.set_num_threads(threads)
    assert child.exitcode == 0 and torch.equal(torch.tensor(found), y)
