"""Jordan and Jacobs 1994: the likelihood of the tree, and what expectation maximisation promises."""

import math

import numpy as np
import pytest
import torch

from manyhands.config import HierarchicalExpertsConfig
from manyhands.errors import ConfigError, DataError
from manyhands.models.expectation_maximisation import GATE_RIDGE, gate_objective, newton
from manyhands.models.hierarchical_experts import HierarchicalExperts


def bumpy(N: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two inputs, one output that is linear in four regions, and a little noise."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (N, 2))
    return x, np.abs(x[:, 0]) - np.abs(x[:, 1]) + 0.02 * rng.normal(size=N)


def make(*branching: int, inputs: int = 2) -> HierarchicalExperts:
    return HierarchicalExperts(HierarchicalExpertsConfig(num_inputs=inputs, num_outputs=1, branching=branching))


def test_the_likelihood_is_that_of_the_tree() -> None:
    """A leaf's probability is the product along its path; the density is the Gaussian's; by plain loops."""
    model = make(2, 3)
    model.reset_parameters(3)
    with torch.no_grad():
        model.log_variance.copy_(torch.linspace(-1, 1, 6))
    model.requires_grad_(False)
    x, y = bumpy(5)
    for n in range(5):
        row, total, mean = [*x[n], 1.0], 0.0, 0.0

        def dot(weights: torch.Tensor, row: list[float] = row) -> float:
            return sum(w * v for w, v in zip(weights.tolist(), row, strict=True))

        for i in range(2):
            first = [math.exp(dot(model.gates[0][0, k])) for k in range(2)]
            for j in range(3):
                second = [math.exp(dot(model.gates[1][i, k])) for k in range(3)]
                p, leaf = first[i] / sum(first) * second[j] / sum(second), 3 * i + j
                out, variance = dot(model.experts[leaf, 0]), math.exp(float(model.log_variance[leaf]))
                mean += p * out
                total += p * math.exp(-((y[n] - out) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        assert float(model.log_likelihood(x[n : n + 1], y[n : n + 1])) == pytest.approx(math.log(total), rel=1e-12)
        assert float(model.predict(x[n : n + 1])) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("branching", [(2, 2), (4,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_no_epoch_lowers_the_objective(branching: tuple[int, ...], seed: int) -> None:
    x, y = bumpy()
    history = make(*branching).fit(x, y, epochs=25, seed=seed)
    fall = min(after - before for before, after in zip(history.objective, history.objective[1:], strict=False))
    assert fall > -1e-9, "float64, sums of 300 logarithms"
    assert history.error[-1] < 0.2 * history.error[0], "which began near the linear regression"


def test_an_expert_with_a_single_example_stays_finite() -> None:
    x, y = bumpy(6)
    history = make(2, 2, 2).fit(x, y, epochs=60)
    assert all(map(math.isfinite, history.objective))
    constant = make(2).fit(x, np.ones(6), epochs=3)
    assert all(map(math.isfinite, constant.objective)) and constant.error[-1] < 1e-6


def test_where_it_ends_the_gradient_is_zero() -> None:
    """A fixed point of EM is a stationary point of what it maximises: differentiate that with autograd."""
    x, y = bumpy()
    model = make(2, 2)
    model.fit(x, y, epochs=200, seed=2)
    ridge = 1e-3 * (model.experts.square().sum((1, 2)) / model.log_variance.exp()).sum()
    ridge = ridge + GATE_RIDGE * sum(gate.square().sum() for gate in model.gates)
    objective = (model.log_likelihood(x, y).sum() - 0.5 * ridge) / len(y)
    for gradient in torch.autograd.grad(objective, list(model.parameters())):
        assert gradient.abs().max() < 1e-4
    assert max(float(p.detach().abs().max()) for p in model.parameters()) > 1.0, "which is not because all is small"


def test_newton_climbs_from_far_away_too() -> None:
    """From weights of a hundred the whole step would overshoot: it is shortened."""
    g = torch.Generator().manual_seed(0)
    x, share = (torch.randn(50, 3, generator=g, dtype=torch.float64) for _ in range(2))
    share = share.softmax(-1)
    for scale in (0.0, 1.0, 100.0):
        gate = scale * torch.randn(3, 3, generator=g, dtype=torch.float64)
        before = gate_objective(gate, share, x)
        assert gate_objective(newton(gate, share, x), share, x) > before


def test_the_seed_decides_and_fresh_is_optional() -> None:
    x, y = bumpy()
    one, two = make(2, 2), make(2, 2)
    first, second = one.fit(x, y, epochs=4, seed=5), two.fit(x, y, epochs=2, seed=5)
    assert first.objective[:3] == second.objective
    rest = two.fit(x, y, epochs=2, fresh=False, valid=(x, y))
    assert rest.objective == pytest.approx(first.objective[2:])
    assert rest.valid_error == pytest.approx(rest.error)
    assert make(2, 2).fit(x, y, epochs=4, seed=6).objective != first.objective


def test_what_cannot_be_is_said_in_a_line() -> None:
    x, y = bumpy(10)
    with pytest.raises(ConfigError, match="epochs = -1"):
        make(2).fit(x, y, epochs=-1)
    with pytest.raises(DataError, match="x has 10 rows and y has 9"):
        make(2).fit(x, y[:9])
    with pytest.raises(ConfigError, match="branching"):
        make()
    with pytest.raises(ConfigError, match="more than 4096"):
        make(64, 64, 2)
