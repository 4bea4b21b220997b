"""Jordan and Jacobs 1994 again, on a smaller arm: epochs of EM against epochs of gradient descent with momentum."""

import math
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from manyhands.config import HierarchicalExpertsConfig
from manyhands.lab.arm import NUM_INPUTS, NUM_OUTPUTS, swings
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.models import HierarchicalExperts
from manyhands.models.fitting import History, first_below

TREES = {"4 experts": (2, 2), "8 experts": (2, 2, 2), "16 experts": (2, 2, 2, 2), "16 experts, one gate": (16,)}
STEPS = (0.03, 0.1, 0.3, 1.0)
HIDDEN, MOMENTUM, MOST = 40, 0.9, 600
GOOD = 0.1
"""The relative error that sixteen experts are to come below."""
_AT = (5, 10, 20, 40)


class _Data:
    """Standardised examples, and the error of the linear regression."""

    def __init__(self, train: int, test: int) -> None:
        x, y = swings(train + test, seed=1994)
        x, y = ((t - t[:train].mean(0)) / t[:train].std(0) for t in (x, y))
        self.x, self.y, self.x_test, self.y_test = x[:train], y[:train], x[train:], y[train:]
        with_ones, test_ones = (torch.cat((t, t.new_ones(len(t), 1)), 1) for t in (self.x, self.x_test))
        fit = torch.linalg.lstsq(with_ones, self.y).solution
        self.spread = float(self.y_test.var(0, correction=0).mean())
        """Mean squared error of always saying the mean: what relative errors are relative to."""
        self.linear = float((test_ones @ fit - self.y_test).square().mean()) / self.spread

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """What is not fitted."""
        return self.x_test, self.y_test

    def curve(self, name: str, errors: Sequence[float]) -> Curve:
        """Relative errors by epoch."""
        return Curve(name, [float(epoch) for epoch in range(len(errors))], [e / self.spread for e in errors])


def run(job: Job) -> Outcome:
    """Trees by EM, the network by gradient descent; errors are relative, on examples that are not fitted."""
    data = _Data(600, 300) if job.quick else _Data(6000, 3000)
    epochs = 12 if job.quick else 40
    names = ("4 experts",) if job.quick else tuple(TREES)
    histories: list[History] = []
    trees: dict[str, list[Curve]] = {}
    for name in names:
        job.note(f"{name}: {epochs} epochs of EM, {len(job.seeds)} starts")
        found = [_tree(name).fit(data.x, data.y, epochs=epochs, seed=seed, valid=data.test) for seed in job.seeds]
        histories += found
        trees[name] = [data.curve(name, history.valid_error) for history in found]
    falls = sum(after < before - 1e-9 for h in histories for before, after in pairwise(h.objective))
    monotone = Criterion(
        "no epoch of EM lowers the objective",
        f"{falls} of {sum(h.epochs for h in histories)} do, in {len(histories)} runs",
        falls == 0,
    )
    figures = [Figure("relative test error", "linear regression", (data.linear,), published="0.31")]
    for name, curves in trees.items():
        for at in (at for at in _AT if at <= epochs):
            values = tuple(curve.y[at] for curve in curves)
            figures.append(Figure(f"relative test error, epoch {at}", name, values))
    arms = tuple(_arm(name, _tree(name), "every expert is evaluated") for name in names)
    if job.quick:
        worst = max(curve.y[-1] for curve in trees["4 experts"])
        found_text = f"{worst:.3f}, {data.linear:.3f}"
        better = Criterion("four experts are better than one linear regression", found_text, worst < data.linear)
        return Outcome(arms, tuple(figures), (monotone, better), (_chart(trees, {}, data, epochs),))
    network = f"{HIDDEN} hidden units"
    arms = (*arms, _arm(network, _network(0), f"momentum {MOMENTUM:g}"))
    nets = {step: [_descend(job, data, step, seed) for seed in job.seeds] for step in STEPS}
    best = min(min(curve.y) for curve in trees["16 experts"])
    target, needed = _goal(trees["16 experts"])
    name = f"epochs to {target:.3f}, best start"
    figures.append(Figure(name, "16 experts", (float(needed),), digits=0, published="35"))
    took: list[int] = []
    for step, curves in nets.items():
        epochs_to = [first_below(curve.y, target + 1e-12) for curve in curves]
        took += [epoch for epoch in epochs_to if epoch is not None]
        never = epochs_to.count(None)
        values = tuple(float(MOST if epoch is None else epoch) for epoch in epochs_to)
        beside = f"{never} never, counted as {MOST}" if never else ""
        figures.append(Figure(f"epochs to {target:.3f}, step {step:g}", network, values, digits=0, beside=beside))
    ends = {step: [curve.y[-1] for curve in curves if len(curve.y) > MOST] for step, curves in nets.items()}
    figures += [
        Figure(f"relative test error, epoch {MOST}, step {step:g}", network, tuple(values))
        for step, values in ends.items()
        if values
    ]
    quickest = min(took, default=None)
    criteria = (
        monotone,
        Criterion(
            f"16 experts come below {GOOD:g} in {epochs} epochs or fewer, best of {len(job.seeds)} starts",
            f"{best:.3f}",
            best < GOOD,
        ),
        Criterion(
            f"the network needs at least twice the epochs to the tree's {target:.3f}, at its best step and start",
            f"{'never' if quickest is None else quickest} against {needed}",
            quickest is None or quickest >= 2 * needed,
        ),
    )
    note = (
        f"the network goes on: after {MOST} epochs it is at {min(v for values in ends.values() for v in values):.3f}. "
        "EM wins in epochs, not in the end; and an epoch of EM, which solves a linear system for every part, costs more"
    )
    return Outcome(arms, tuple(figures), criteria, (_chart(trees, nets, data, MOST),), notes=(note,))


def _tree(name: str) -> HierarchicalExperts:
    return HierarchicalExperts(
        HierarchicalExpertsConfig(num_inputs=NUM_INPUTS, num_outputs=NUM_OUTPUTS, branching=TREES[name])
    )


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(NUM_INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, NUM_OUTPUTS)).double()


def _descend(job: Job, data: _Data, step: float, seed: int) -> Curve:
    """The network's error after every epoch; it ends early where the step is too large."""
    job.note(f"{HIDDEN} hidden units, step {step:g}, seed {seed}")
    network = _network(seed)
    optimizer = torch.optim.SGD(network.parameters(), step, momentum=MOMENTUM)
    errors: list[float] = []
    for epoch in range(MOST + 1):
        with torch.no_grad():
            errors.append(float((network(data.x_test) - data.y_test).square().mean()))
        if not math.isfinite(errors[-1]):
            return data.curve(f"step {step:g}", errors[:-1])
        if epoch < MOST:
            optimizer.zero_grad()
            (network(data.x) - data.y).square().mean().backward()
            optimizer.step()
    return data.curve(f"step {step:g}", errors)


def _goal(curves: list[Curve]) -> tuple[float, int]:
    """The lowest error at the end of a start, and the first epoch at which that start was as low."""
    best = min(curves, key=lambda curve: curve.y[-1])
    return best.y[-1], next(epoch for epoch, error in enumerate(best.y) if error <= best.y[-1])


def _arm(name: str, model: nn.Module, note: str) -> Arm:
    """Every weight is multiplied by once per example."""
    count = sum(p.numel() for p in model.parameters())
    active = count - (prod(TREES[name]) if name in TREES else 0)  # the variances
    return Arm(name, count, active, 2.0 * active, note)


def _chart(trees: dict[str, list[Curve]], nets: dict[float, list[Curve]], data: _Data, epochs: int) -> Chart:
    """The best start of each, by its last error."""
    curves = [min(found, key=lambda curve: curve.y[-1]) for found in trees.values()]
    curves += [min(found, key=lambda curve: curve.y[-1]) for found in nets.values()]
    shown = [Curve(curve.name, curve.x[1:], curve.y[1:]) for curve in curves]
    shown.append(Curve("linear regression", [1.0, float(epochs)], [data.linear] * 2, faint=True))
    about = "The best start of each. Trees are fitted by EM; the network by gradient descent with each of its steps."
    return Chart("Error on new examples", "epoch", "relative error", tuple(shown), about, y_from_zero=True)
