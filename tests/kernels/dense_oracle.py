"""An independent oracle for expert backends: float64, one pair at a time, plain autograd. And random cases for it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.kernels import ExpertWeights, run_experts


@dataclass
class Case:
    """Everything a backend takes, in one dtype, with gradients asked for."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    kept: Tensor
    experts: ExpertWeights

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weights": self.weights, "up": self.experts.up, "down": self.experts.down}
        biases = {"up_bias": self.experts.up_bias, "down_bias": self.experts.down_bias}
        return named | {name: bias for name, bias in biases.items() if bias is not None}

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same numbers as fresh leaves; the combination weights stay float32 or wider, as in the product."""
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(t: Tensor | None, to: torch.dtype = dtype) -> Tensor | None:
            return None if t is None else t.detach().to(to).clone().requires_grad_()

        e = self.experts
        experts = ExpertWeights(leaf(e.up), leaf(e.down), leaf(e.up_bias), leaf(e.down_bias), e.activation)
        return Case(leaf(self.x), self.ids, leaf(self.weights, wide), self.kept, experts)


def make_case(
    T: int, D: int, F: int, E: int, K: int, *, activation: str = "swiglu", bias: bool = False, drop: float = 0.0,
    ids: Tensor | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """Random float32 tokens and experts; `ids` fixes the routing, `drop` the share of pairs that are not kept."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * F if activation in GATED else F
    if ids is None:
        ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.zeros(0, K).long()
    return Case(
        torch.randn(T, D, generator=g),
        ids,
        torch.rand(T, K, generator=g) + 0.1,
        torch.rand(T, K, generator=g) >= drop,
        ExpertWeights(
            torch.randn(E, rows, D, generator=g) / math.sqrt(D),
            torch.randn(E, D, F, generator=g) / math.sqrt(F),
            torch.randn(E, rows, generator=g) if bias else None,
            torch.randn(E, D, generator=g) if bias else None,
            activation,
        ),
    )


def _act(h: Tensor, name: str) -> Tensor:
    """The activations from their definitions."""
    if name in ("swiglu", "geglu"):
        gate, up = h[: h.shape[0] // 2], h[h.shape[0] // 2 :]
        return _act(gate, "gelu" if name == "geglu" else "silu") * up
    if name == "swiglu_oai":
        gate, up = h[: h.shape[0] // 2].clamp(max=7.0), h[h.shape[0] // 2 :].clamp(-7.0, 7.0)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    if name == "geglu_tanh":
        gate, up = h[: h.shape[0] // 2], h[h.shape[0] // 2 :]
        return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "silu":
        return h / (1 + torch.exp(-h))
    if name == "gelu":
        return h * 0.5 * (1 + torch.special.erf(h / math.sqrt(2)))
    return torch.where(h > 0, h, torch.zeros_like(h))


def oracle(case: Case) -> Tensor:
    """y_t = Σ_k kept·weight·Expert(x_t), token by token."""
    up, down, up_bias, down_bias, activation = case.experts
    rows = []
    for t in range(case.x.shape[0]):
        y = 0.0 * case.x[t]
        for k in range(case.ids.shape[1]):
            if case.kept[t, k]:
                e = int(case.ids[t, k])
                h = up[e] @ case.x[t] + (0 if up_bias is None else up_bias[e])
                out = down[e] @ _act(h, activation) + (0 if down_bias is None else down_bias[e])
                y = y + case.weights[t, k] * out
        rows.append(y)
    return torch.stack(rows) if rows else case.x.clone()


def forward_and_gradients(case: Case, backend: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and the gradient of Σ y·r for a fixed random r, by leaf; `backend` may be `oracle`."""
    if backend == "oracle":
        y = oracle(case)
    else:
        y = run_experts(backend, case.x, case.ids, case.weights, case.kept, case.experts)
    r = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).to(y.dtype)
    (y * r).sum().backward()
    return y.detach(), {name: leaf.grad for name, leaf in case.leaves().items()}


def assert_matches_oracle(case: Case, backend: str, dtype: torch.dtype = torch.float32, tol: float = 1e-5) -> None:
    """Forward and every gradient against the oracle; a gradient the oracle lacks must be zero, not absent."""
    y, grads = forward_and_gradients(case.cast(dtype), backend)
    reference = case.cast(dtype).cast(torch.float64)
    expected, expected_grads = forward_and_gradients(reference, "oracle")
    compare("y", y, expected, tol)
    for name, grad in grads.items():
        assert grad is not None, f"{name} has no gradient"
        want = expected_grads[name]
        compare(name, grad, torch.zeros_like(grad, dtype=torch.float64) if want is None else want, tol)


def compare(name: str, got: Tensor, want: Tensor, tol: float) -> None:
    """Largest error relative to the tensor's largest entry."""
    assert got.shape == want.shape, f"{name}: {got.shape} is not {want.shape}"
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if got.numel():
        error = (got.double() - want).abs().max().item()
        scale = max(want.abs().max().item(), 1.0)
        assert error <= tol * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"
