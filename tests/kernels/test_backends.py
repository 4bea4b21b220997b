"""Every backend against the pair-by-pair float64 oracle: forward and all gradients over many random shapes."""

import random

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.kernels import backend_names, check_name, choose, run_experts

from .dense_oracle import assert_matches_oracle, forward_and_gradients, make_case

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "swiglu_oai", "geglu_tanh")
SHAPES = 200


@pytest.mark.parametrize("backend", sorted(backend_names()))
def test_random_shapes(backend: str) -> None:
    rng = random.Random(0)
    for seed in range(SHAPES):
        E = rng.randint(1, 9)
        case = make_case(
            T=rng.choice((0, 1, 2, 3, 5, 8, 13)),
            D=4 * rng.randint(1, 4),
            F=4 * rng.randint(1, 4),
            E=E,
            K=rng.randint(1, E),
            activation=rng.choice(ACTIVATIONS),
            bias=rng.random() < 0.5,
            drop=rng.choice((0.0, 0.0, 0.3, 1.0)),
            seed=seed,
        )
        try:
            assert_matches_oracle(case, backend)
        except AssertionError as error:
            raise AssertionError(f"shape {seed}: {error}") from None


@pytest.mark.parametrize("backend", sorted(backend_names()))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(backend: str, activation: str, bias: bool) -> None:
    assert_matches_oracle(make_case(11, 8, 12, 5, 2, activation=activation, bias=bias, drop=0.2), backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_eager_in_float64_is_exact(activation: str, bias: bool) -> None:
    case = make_case(9, 6, 5, 4, 2, activation=activation, bias=bias, drop=0.2)
    assert_matches_oracle(case, "eager", torch.float64, tol=1e-13)


@pytest.mark.parametrize("backend", sorted(backend_names()))
@pytest.mark.parametrize(
    "activation", ["swiglu", "geglu", "gelu", "swiglu_oai", "geglu_tanh"]
)  # relu's kink amplifies any rounding
def test_bfloat16(backend: str, activation: str) -> None:
    """Inputs are rounded first, so what is left is the arithmetic: a few bf16 roundings (2⁻⁸ each)."""
    case = make_case(24, 16, 16, 4, 2, activation=activation, bias=True)
    assert_matches_oracle(case, backend, torch.bfloat16, tol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", sorted(backend_names()))
def test_two_runs_are_bit_equal(backend: str, dtype: torch.dtype) -> None:
    case = make_case(64, 16, 16, 6, 3, bias=True, drop=0.1)
    y1, grads1 = forward_and_gradients(case.cast(dtype), backend)
    y2, grads2 = forward_and_gradients(case.cast(dtype), backend)
    assert torch.equal(y1, y2)
    assert all(torch.equal(grads1[name], grads2[name]) for name in grads1)


@pytest.mark.parametrize("backend", sorted(backend_names()))
def test_dtypes_of_results(backend: str) -> None:
    """Output in x's dtype, each gradient in its own leaf's: float32 masters get float32 gradients from bf16 work."""
    case = make_case(8, 8, 8, 4, 2).cast(torch.float32)
    x = case.x.detach().to(torch.bfloat16).requires_grad_()
    y = run_experts(backend, x, case.ids, case.weights, case.kept, case.experts)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert case.experts.up.grad.dtype == case.experts.down.grad.dtype == case.weights.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", sorted(backend_names()))
def test_inputs_without_gradient_are_allowed(backend: str) -> None:
    case = make_case(6, 8, 8, 3, 2, bias=True)
    with torch.no_grad():
        expected = run_experts(backend, case.x, case.ids, case.weights, case.kept, case.experts)
    only_x = case.x.clone().requires_grad_()
    y = run_experts(backend, only_x, case.ids, case.weights, case.kept, case.experts)
    y.sum().backward()
    assert torch.equal(y, expected) and only_x.grad is not None


def test_auto_takes_grouped_mm_where_its_rules_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhands.kernels.policy.level_here", lambda: None)
    fits, odd = make_case(2, 8, 8, 3, 1), make_case(2, 6, 8, 3, 1)
    assert choose(fits.x, fits.experts) == "grouped_mm"
    assert choose(odd.x, odd.experts) == "eager"
    assert choose(fits.x.double(), fits.experts) == "eager"
    assert choose(fits.x.bfloat16(), fits.experts) == "grouped_mm"
    assert_matches_oracle(odd, "auto")


def test_auto_takes_the_native_kernels_at_a_measured_level(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, 8, 8, 3, 1)
    trained = case.experts._replace(up=case.experts.up.clone().requires_grad_())
    for level, chosen in (("avx2", "native"), ("portable", "grouped_mm"), (None, "grouped_mm")):
        monkeypatch.setattr("manyhands.kernels.policy.level_here", lambda level=level: level)
        assert choose(case.x, case.experts) == choose(case.x.bfloat16(), case.experts) == chosen
        assert choose(case.x, trained) == chosen
        assert choose(case.x.to("meta"), case.experts) != "native" and choose(case.x.double(), case.experts) == "eager"


def test_bfloat16_needs_twice_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhands.kernels.policy.level_here", lambda: None)
    case = make_case(2, 12, 8, 3, 1)  # 12 · 2 bytes is not a multiple of 16
    assert choose(case.x, case.experts) == "grouped_mm"
    assert choose(case.x.bfloat16(), case.experts) == "eager"


@pytest.mark.parametrize("case", [make_case(2, 6, 8, 3, 1), make_case(2, 8, 2, 3, 1, activation="relu")])
def test_grouped_mm_by_name_refuses_what_it_cannot_do(case) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16 bytes.*use 'eager' or 'auto'"):
        run_experts("grouped_mm", case.x, case.ids, case.weights, case.kept, case.experts)


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'grouped_mm'"):
        check_name("groupedmm")
    assert check_name("auto") == "auto"
