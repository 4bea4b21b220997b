"""The mixtures of 1991 and 1994 against float64 maths written apart from them: their objectives, gradients, likelihood.

N examples, I inputs with the column of ones, O outputs, K experts.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from math import pi

import torch
from torch import Tensor

from manyhands.check.compare import close, exact
from manyhands.check.report import Row, Situation
from manyhands.config import HierarchicalExpertsConfig, LocalExpertsConfig
from manyhands.models import HierarchicalExperts, LocalExperts
from manyhands.models.expectation_maximisation import EXPERT_RIDGE, regressions
from manyhands.models.local_experts import OBJECTIVES

N, INPUTS, OUTPUTS, K = 23, 3, 2, 4
SIGMA = 0.7


def number_rows(seed: int) -> Iterator[Row]:
    """Every objective with every output, the identities of the 1991 paper, and the tree of 1994."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, INPUTS, generator=g), torch.rand(N, OUTPUTS, generator=g)
    for objective, output, experts in product(OBJECTIVES, ("linear", "sigmoid"), (K, 1)):
        yield from _flat(objective, output, experts, x, y, seed)
    for branching in ((2, 3), (2, 2, 2)):
        yield from _tree(branching, x.double(), y.double(), seed)


def _flat(objective: str, output: str, experts: int, x: Tensor, y: Tensor, seed: int) -> Iterator[Row]:
    values = {"num_inputs": INPUTS, "num_outputs": OUTPUTS, "num_experts": experts, "sigma": SIGMA}
    config = LocalExpertsConfig.model_validate(values | {"objective": objective, "output": output})
    model = LocalExperts(config)
    model.reset_parameters(seed)
    at = Situation(f"experts of 1991, {experts}", f"{objective}, {output}", "–", "float32", "train")
    found = model.objective(x, y)
    found.mean().backward()  # type: ignore[no-untyped-call]

    x1, d = torch.cat((x, torch.ones(N, 1)), 1).double(), y.double()
    W, V = model.experts.detach().double(), model.gate.detach().double()
    a_NKO = (x1 @ W.flatten(0, 1).T).view(N, experts, OUTPUTS)
    o = 1.0 / (1.0 + (-a_NKO).exp()) if output == "sigmoid" else a_NKO
    powers = (x1 @ V.T).exp()
    p = powers / powers.sum(1, keepdim=True)
    off = d[:, None] - o
    square = (off * off).sum(-1)
    likely = p * (-square / (2.0 * SIGMA**2)).exp()
    h = likely / likely.sum(1, keepdim=True)
    rest = d - (p[..., None] * o).sum(1)
    value, by_o, by_s = {
        "competitive": (-likely.sum(1).log(), -h[..., None] * off / SIGMA**2, p - h),
        "gated": (
            (p * square).sum(1),
            -2.0 * p[..., None] * off,
            p * (square - (p * square).sum(1, keepdim=True)),
        ),
        "cooperative": (
            (rest * rest).sum(1),
            -2.0 * p[..., None] * rest[:, None],
            -2.0 * p * ((rest[:, None] * o).sum(-1) - (rest * (d - rest)).sum(1, keepdim=True)),
        ),
    }[objective]
    by_a = by_o * o * (1.0 - o) if output == "sigmoid" else by_o
    right = {"experts": torch.einsum("nko,ni->koi", by_a, x1) / N, "gate": by_s.T @ x1 / N}
    yield close(at, "objective", {objective: found}, {objective: value})
    yield close(at, "gradients", {"experts": model.experts.grad, "gate": model.gate.grad}, right)
    yield close(at, "responsibilities", {"h": model.responsibilities(x, y)}, {"h": h})
    if objective == "competitive" and experts == 1:
        yield close(at, "one expert: half the squared error", {"E": found}, {"E": square[:, 0] / (2.0 * SIGMA**2)})
    if objective == "competitive":
        above = (found.double() > (p * square).sum(1) / (2.0 * SIGMA**2) * (1.0 + 1e-6) + 1e-6).sum()
        yield exact(at, "at most half of gated", {"examples above": above}, {"examples above": torch.tensor(0)})


def _tree(branching: tuple[int, ...], x: Tensor, y: Tensor, seed: int) -> Iterator[Row]:
    config = HierarchicalExpertsConfig(num_inputs=INPUTS, num_outputs=OUTPUTS, branching=branching)
    model = HierarchicalExperts(config)
    model.reset_parameters(seed)
    with torch.no_grad():
        model.log_variance.copy_(torch.linspace(-1.0, 1.0, config.num_experts))
    at = Situation("hierarchy of 1994", "×".join(map(str, branching)), "–", "float32", "train")
    found = model.log_likelihood(x, y)
    found.mean().backward()  # type: ignore[no-untyped-call]

    p = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    x1 = torch.cat((x, torch.ones(N, 1).double()), 1)
    total = torch.zeros(N).double()
    for leaf, path in enumerate(product(*map(range, branching))):
        probable, gate = torch.ones(N).double(), 0
        for level, branch in enumerate(path):
            powers = (x1 @ p[f"gates.{level}"][gate].T).exp()
            probable = probable * powers[:, branch] / powers.sum(1)
            gate = gate * branching[level] + branch
        variance = p["log_variance"][leaf].exp()
        off = y - x1 @ p["experts"][leaf].T
        density = (-(off * off).sum(1) / (2.0 * variance)).exp() / (2.0 * pi * variance) ** (OUTPUTS / 2)
        total = total + probable * density
    total.log().mean().backward()  # type: ignore[no-untyped-call]
    yield close(at, "log-likelihood", {"log p": found}, {"log p": total.log()})
    grads = {name: value.grad for name, value in model.named_parameters()}
    yield close(at, "gradients", grads, {name: value.grad for name, value in p.items()})

    share = torch.rand(N, config.num_experts, generator=torch.Generator().manual_seed(seed)).double()
    solved = {"experts": regressions(share, x1, y)}
    ridge = EXPERT_RIDGE**0.5 * torch.eye(INPUTS + 1).double()
    rows = [torch.cat((share[:, m : m + 1].sqrt() * x1, ridge)) for m in range(config.num_experts)]
    sides = [
        torch.cat((share[:, m : m + 1].sqrt() * y, torch.zeros(INPUTS + 1, OUTPUTS).double()))
        for m in range(config.num_experts)
    ]
    right = torch.stack([torch.linalg.lstsq(a, b).solution.T for a, b in zip(rows, sides, strict=True)])
    yield close(at, "weighted regressions", solved, {"experts": right})
    curve = model.fit(x, y, epochs=12, seed=seed).objective
    falls = torch.tensor(sum(after < before - 1e-9 for before, after in pairwise(curve)))
    yield exact(at, "epochs that lower the objective", {"epochs": falls}, {"epochs": torch.tensor(0)})
