"""Jacobs et al. 1991: three objectives, their gradients, and what they lead to."""

import numpy as np
import pytest
import torch

from manyhands.config import LocalExpertsConfig
from manyhands.errors import ConfigError, DataError, UserError
from manyhands.models.local_experts import OBJECTIVES, LocalExperts, competitive, cooperative, gated


def draw(seed: int = 0, N: int = 7, K: int = 3, O: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gate logits, outputs, targets), float64."""
    g = torch.Generator().manual_seed(seed)
    s, o, d = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((N, K), (N, K, O), (N, O)))
    return s.requires_grad_(), o.requires_grad_(), d


def test_the_worked_example() -> None:
    """d = 1, o = (1, 0), p = (½, ½): .2191, .5, .25; ∂s = (−.1225, .1225), ∂o₂ = −.3775 (which is −h₂(d − o₂))."""
    s = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    o = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64, requires_grad=True)
    d = torch.ones(1, 1, dtype=torch.float64)
    values = {name: float(of(s.log_softmax(-1), o, d, 1.0).detach()) for name, of in OBJECTIVES.items()}
    assert values == pytest.approx({"competitive": 0.2191, "gated": 0.5, "cooperative": 0.25}, abs=1e-4)
    competitive(s.log_softmax(-1), o, d).sum().backward()
    assert s.grad.tolist()[0] == pytest.approx([-0.1225, 0.1225], abs=1e-4)
    assert o.grad.flatten().tolist() == pytest.approx([0.0, -0.3775], abs=1e-4)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_gradients_are_those_of_the_paper(sigma: float) -> None:
    """∂E/∂o_i = −h_i (d − o_i)/σ², ∂E/∂s_i = p_i − h_i; gated: −2 p_i (d − o_i)."""
    s, o, d = draw()
    p = s.softmax(-1)
    likely = p * (-((d[:, None] - o) ** 2).sum(-1) / (2 * sigma**2)).exp()
    h = likely / likely.sum(-1, keepdim=True)
    by_s, by_o = torch.autograd.grad(competitive(s.log_softmax(-1), o, d, sigma).sum(), (s, o))
    torch.testing.assert_close(by_s, p - h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_o, -h[..., None] * (d[:, None] - o) / sigma**2, rtol=1e-10, atol=1e-12)
    (by_o,) = torch.autograd.grad(gated(s.log_softmax(-1), o, d).sum(), o)
    torch.testing.assert_close(by_o, -2 * p[..., None] * (d[:, None] - o), rtol=1e-10, atol=1e-12)


def test_inequalities_between_the_objectives() -> None:
    """By Jensen: competitive ≤ ½ gated, cooperative ≤ gated; with one expert all are the squared error, or half."""
    s, o, d = draw(N=200)
    log_p = s.log_softmax(-1)
    together, alone, apart = cooperative(log_p, o, d), gated(log_p, o, d), competitive(log_p, o, d)
    assert (apart <= 0.5 * alone + 1e-12).all() and (together <= alone + 1e-12).all()
    s, o, d = draw(K=1)
    squared = (d - o[:, 0]).square().sum(-1)
    for value, expected in (cooperative, squared), (gated, squared), (competitive, 0.5 * squared):
        torch.testing.assert_close(value(s.log_softmax(-1), o, d), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_gradients_of_the_model(objective: str, output: str) -> None:
    config = LocalExpertsConfig.model_validate(
        {"num_inputs": 2, "num_outputs": 3, "num_experts": 3, "objective": objective, "output": output}
    )
    model = LocalExperts(config, torch.float64)
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)

    def value(experts: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(Objective(model), {"model.experts": experts, "model.gate": gate}, (x, y))

    assert torch.autograd.gradcheck(value, (model.experts, model.gate))


class Objective(torch.nn.Module):
    """The model's objective as its forward."""

    def __init__(self, model: LocalExperts) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.model.objective(x, y)


def bent(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).uniform(-1, 1, (200, 1))
    return x, np.abs(x)


@pytest.mark.parametrize("seed", range(3))
def test_two_linear_experts_share_the_two_sides_of_a_bend(seed: int) -> None:
    """y = |x|: a line leaves a mean squared error of 1/12; two experts come to a twentieth of it, one for each side."""
    x, y = bent()
    model = LocalExperts(LocalExpertsConfig(num_inputs=1, num_outputs=1, num_experts=2, sigma=0.2))
    model.reset_parameters(seed)
    history = model.fit(x, y, step=0.03, epochs=400)
    assert history.epochs == 400 and history.objective[-1] < history.objective[0]
    assert history.error[-1] < 1 / 12 / 20
    left, right = (model([[at]]).gates[0] for at in (-0.8, 0.8))
    assert left.max() > 0.9 and right.max() > 0.9 and left.argmax() != right.argmax()
    share = model.responsibilities(x, y)
    torch.testing.assert_close(share.sum(1), torch.ones(200))


def test_units_of_the_inputs_do_not_matter() -> None:
    x, y = bent()
    models = [LocalExperts(LocalExpertsConfig(num_inputs=1, num_outputs=1), torch.float64) for _ in range(2)]
    for model, shown in zip(models, (x, 1000 * x + 5), strict=True):
        model.reset_parameters(1)
        model.fit(shown, y, epochs=20)
    torch.testing.assert_close(models[0].predict(x), models[1].predict(1000 * x + 5))


def test_it_ends_when_the_error_is_small_enough_and_goes_on_from_there() -> None:
    x, y = bent()
    model = LocalExperts(LocalExpertsConfig(num_inputs=1, num_outputs=1))
    model.reset_parameters(0)
    history = model.fit(x, y, until=0.05, valid=(x[:20], y[:20]))
    assert history.error[-1] < 0.05 <= min(history.error[:-1]) and len(history.valid_error) == history.epochs + 1
    again = model.fit(x, y, epochs=1)
    assert again.error[0] == pytest.approx(history.error[-1])


def test_what_cannot_be_fitted_is_said_in_a_line() -> None:
    model = LocalExperts(LocalExpertsConfig(num_inputs=2, num_outputs=1))
    x, y = torch.randn(6, 2), torch.randn(6)
    for wrong, says in (
        ((x[:, :1], y), r"x is \[6, 1\], not \[examples, 2\]"),
        ((x, y[:5]), "x has 6 rows and y has 5"),
        ((x * float("nan"), y), "x holds NaN"),
        ((torch.empty(0, 2), y[:0]), "at least one example"),
        ((x, "abc"), "y is no array of numbers"),
        ((x, [1.0, [2.0]]), "y is no array of numbers"),
    ):
        with pytest.raises(DataError, match=says):
            model.fit(*wrong)
    with pytest.raises(ConfigError, match="step = 0"):
        model.fit(x, y, step=0)
    with pytest.raises(UserError, match=r"step = 1e\+30 is too large: after [12] epochs"):
        model.fit(x, y, step=1e30)
