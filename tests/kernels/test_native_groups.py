"""One expert whose rows span two groups of the backward pass: its weights' gradient is the sum of both."""

import pytest
import torch

from manyhands.kernels import ExpertWeights, native, run_experts

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")


def test_the_gradient_of_weights_over_two_groups() -> None:
    T, D, F = 1200, 512, 704
    g = torch.Generator().manual_seed(0)
    x, dy = torch.randn(T, D, generator=g), torch.randn(T, D, generator=g)
    up, down = torch.randn(1, 2 * F, D, generator=g) * D**-0.5, torch.randn(1, D, F, generator=g) * F**-0.5
    ids, kept = torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1, dtype=torch.bool)
    found = []
    for name, dtype in (("native", torch.float32), ("eager", torch.float64)):
        weights = [w.to(dtype).requires_grad_() for w in (up, down)]
        experts = ExpertWeights(*weights, None, None, "swiglu")
        y = run_experts(name, x.to(dtype), ids, torch.ones(T, 1, dtype=dtype), kept, experts)
        found.append(torch.autograd.grad(y, weights, dy.to(dtype)))
    for ours, exact in zip(*found, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5  # 1,200 products of float32: √T · 2^-24
