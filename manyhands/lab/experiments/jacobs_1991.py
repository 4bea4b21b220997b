"""Jacobs et al. 1991 again: epochs to a mean squared error of 0.08, who is in use, and what for.

N vowels, K experts, H hidden units, O = 4 outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from manyhands.config import LocalExpertsConfig
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Drawing, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.plane import plane
from manyhands.lab.vowels import VOWELS, Vowels, made_up_vowels, read_vowels
from manyhands.models import LocalExperts
from manyhands.models.fitting import History, Mixed, NumberRegressor, descend

BOUND, STEP, MOST = 0.08, 10.0, 400
"""Mean squared error at which a system has learned; the step that all take; epochs after which it has failed."""
SMALL_STEP, SMALL_MOST, SMALL_STARTS = 0.35, 6000, 5
"""A step with which the epochs are about as many as were published."""
STEPS = (5.0, 10.0, 20.0, 40.0, 80.0)
"""From which each system may take the one that suits it best."""
_OUTPUTS = len(VOWELS)


class Perceptron(NumberRegressor):
    """The rival: a hidden layer of sigmoids, sigmoid outputs, half the squared error, which is what the competitive
    objective is with one expert: so equal steps mean the same. Fresh weights are uniform in ±½, as the experts'.
    """

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__(2, _OUTPUTS, torch.float32)
        g = torch.Generator().manual_seed(seed)
        self.hidden = nn.Parameter(torch.rand(hidden, 3, generator=g) - 0.5)
        self.out = nn.Parameter(torch.rand(_OUTPUTS, hidden + 1, generator=g) - 0.5)

    def mix(self, x1_NI: Tensor) -> Mixed:
        """As a mixture of one."""
        h_NH = (x1_NI @ self.hidden.T).sigmoid()
        mean_NO = (torch.cat((h_NH, h_NH.new_ones(len(h_NH), 1)), 1) @ self.out.T).sigmoid()
        return Mixed(mean_NO, mean_NO[:, None], mean_NO.new_zeros(len(mean_NO), 1))

    def fit(self, x: Tensor, y: Tensor, *, step: float, epochs: int, until: float) -> History:
        """As `LocalExperts.fit`."""
        self.take_scale(x)
        x1_NI, y_NO = self.pair(x, y)

        def evaluate() -> tuple[Tensor, Tensor]:
            mean_NO = self.mix(x1_NI).mean
            return 0.5 * (mean_NO - y_NO).square().sum(-1).mean(), mean_NO

        return descend([self.hidden, self.out], evaluate, y_NO, step=step, epochs=epochs, until=until)


@dataclass(frozen=True, slots=True)
class System:
    """One of those that are compared."""

    name: str
    experts: int = 0
    hidden: int = 0
    objective: str = "competitive"
    published: str = ""

    def make(self, seed: int) -> LocalExperts | Perceptron:
        """With fresh weights."""
        if self.hidden:
            return Perceptron(self.hidden, seed)
        values = {"num_inputs": 2, "num_outputs": _OUTPUTS, "num_experts": self.experts, "output": "sigmoid"}
        model = LocalExperts(LocalExpertsConfig.model_validate(values | {"objective": self.objective}))
        model.reset_parameters(seed)
        return model


MLP_6 = System("6 hidden units", hidden=6, published="2209")
MLP_12 = System("12 hidden units", hidden=12, published="2435")
FOUR = System("4 experts", 4, published="1124")
EIGHT = System("8 experts", 8, published="1083")
OTHERS = (
    System("4 experts, gated", 4, objective="gated"),
    System("4 experts, cooperative", 4, objective="cooperative"),
)


@dataclass(frozen=True, slots=True)
class Fitted:
    """One system from one start."""

    model: LocalExperts | Perceptron
    history: History

    @property
    def epochs(self) -> float:
        """Until it had learned; all that there were if it never did."""
        return float(self.history.epochs)

    @property
    def learned(self) -> bool:
        """Whether it did."""
        return self.history.error[-1] < BOUND


def run(job: Job) -> Outcome:
    """Every system from every seed's weights."""
    vowels = made_up_vowels() if job.data is None else read_vowels(job.data)
    systems = (MLP_6, FOUR) if job.quick else (MLP_6, MLP_12, FOUR, EIGHT, *OTHERS)
    fitted: dict[System, list[Fitted]] = {}
    for system in systems:
        job.note(f"{system.name}: {len(job.seeds)} starts")
        fitted[system] = [_fit(system, vowels, seed, STEP, MOST) for seed in job.seeds]
    figures: list[Figure] = []
    for system, runs in fitted.items():
        figures.append(Figure(f"epochs, step {STEP:g}", system.name, tuple(f.epochs for f in runs), digits=1))
        if not job.quick:
            figures += _other_steps(job, system, vowels)
        figures += _said(system, runs, vowels)
    return Outcome(
        tuple(_arm(system) for system in systems),
        tuple(figures),
        _criteria(fitted, vowels, job.quick),
        (_curves(fitted),),
        (_regions(fitted[FOUR][0], vowels),),
        tuple(_notes(fitted, vowels)),
    )


def _notes(fitted: dict[System, list[Fitted]], vowels: Vowels) -> Iterator[str]:
    if vowels.made_up:
        yield (
            "the vowels are made up, Gaussians around the means published in 1952: for the real ones give --data (R "
            "package phonTools, table pb52; Praat's `Create formant table (Peterson & Barney 1952)`)"
        )
    yield (
        "epochs depend on the step, so only those of one step compare; the hidden units minimise half the squared "
        "error, which is what the competitive objective is with one expert"
    )
    if any(system in fitted for system in OTHERS):
        yield (
            "the gated and the cooperative objective are, as printed, the whole squared error: twice as steep, so "
            "their epochs at an equal step compare with half of those of the hidden units; see each at its best step"
        )
    failed = {system.name: sum(not f.learned for f in runs) for system, runs in fitted.items()}
    if any(failed.values()):
        told = ", ".join(f"{name} {count}" for name, count in failed.items() if count)
        yield f"starts that had not learned after {MOST} epochs, counted as {MOST}: {told}"


def _fit(system: System, vowels: Vowels, seed: int, step: float, most: int) -> Fitted:
    model = system.make(seed)
    train = ~vowels.test
    return Fitted(model, model.fit(vowels.x[train], vowels.targets[train], step=step, epochs=most, until=BOUND))


def _other_steps(job: Job, system: System, vowels: Vowels) -> list[Figure]:
    """Epochs with a small step, and with the step of its own that is best for a few starts."""
    job.note(f"{system.name}: other steps")
    few = job.seeds[:SMALL_STARTS]
    small = [_fit(system, vowels, seed, SMALL_STEP, SMALL_MOST).epochs for seed in few]
    tried = {step: [_fit(system, vowels, seed, step, MOST) for seed in few] for step in STEPS}
    best = min(STEPS, key=lambda step: sum(f.epochs if f.learned else 10.0 * MOST for f in tried[step]))
    own = [_fit(system, vowels, seed, best, MOST).epochs for seed in job.seeds]
    return [
        Figure(f"epochs, step {SMALL_STEP:g}", system.name, tuple(small), digits=0, published=system.published),
        Figure("epochs, at its best step", system.name, tuple(own), digits=1, beside=f"step {best:g}"),
    ]


def _said(system: System, runs: Sequence[Fitted], vowels: Vowels) -> list[Figure]:
    """How many vowels are right, and of experts: how many are in use, and whether they divide front from back."""
    figures, name = [], system.name
    parts = (~vowels.test, "right, trained on", "88"), (vowels.test, "right, new speakers", "90")
    for part, what, published in parts:
        values = tuple(100.0 * right(fitted.model, vowels, part) for fitted in runs)
        beside = f"always one vowel {100.0 * float(torch.bincount(vowels.vowel[part]).max() / part.sum()):.0f}"
        shown = published if system.published else ""
        figures.append(Figure(what, name, values, "%", 1, published=shown, beside=beside))
    if system.experts:
        used, told, chance = zip(*(division(fitted.model, vowels) for fitted in runs), strict=True)
        shown = "2 to 3" if system.published else ""
        figures.append(Figure("experts with more than 5 % of the gate", name, used, digits=2, published=shown))
        beside = f"1 is all; vowels shuffled {sum(chance) / len(chance):.3f}"
        figures.append(Figure("what the expert says of front or back", name, told, "bits", 2, beside=beside))
    return figures


@torch.no_grad()
def right(model: LocalExperts | Perceptron, vowels: Vowels, part: Tensor) -> float:
    """Share of vowels whose output is the largest."""
    return float((model.predict(vowels.x[part]).argmax(-1) == vowels.vowel[part]).float().mean())


@torch.no_grad()
def division(model: LocalExperts | Perceptron, vowels: Vowels) -> tuple[float, float, float]:
    """(experts in use, bits that the likeliest expert says of front or back, the same with the vowels shuffled)."""
    assert isinstance(model, LocalExperts)
    train = ~vowels.test
    gates_NK = model(vowels.x[train]).gates
    top_N, back_N = gates_NK.argmax(-1), vowels.back[train]
    shuffled_N = back_N[torch.randperm(len(back_N), generator=torch.Generator().manual_seed(0))]
    K = gates_NK.shape[1]
    return float((gates_NK.mean(0) > 0.05).sum()), bits(top_N, back_N, K), bits(top_N, shuffled_N, K)


def bits(expert_N: Tensor, label_N: Tensor, K: int) -> float:
    """Mutual information of expert and a label of two values."""
    joint_K2 = torch.bincount(2 * expert_N + label_N.long(), minlength=2 * K).view(K, 2).double() / len(expert_N)
    alone_K2 = joint_K2.sum(1, keepdim=True) * joint_K2.sum(0, keepdim=True)
    held = joint_K2 > 0
    return float((joint_K2[held] * (joint_K2[held] / alone_K2[held]).log2()).sum())


def _criteria(fitted: dict[System, list[Fitted]], vowels: Vowels, quick: bool) -> tuple[Criterion, ...]:
    mean = {system: sum(f.epochs for f in runs) / len(runs) for system, runs in fitted.items()}
    ratio = mean[MLP_6] / mean[FOUR]
    text = "epochs of 6 hidden units over those of 4 experts, equal step"
    if quick:
        return (Criterion(f"{text}: above 1", f"{ratio:.2f}", ratio > 1.0),)
    experts = [(s, f) for s in (FOUR, EIGHT) for f in fitted[s]]
    used, told = zip(*(division(f.model, vowels)[:2] for _, f in experts), strict=True)
    tested = {s: sum(right(f.model, vowels, vowels.test) for f in fitted[s]) / len(fitted[s]) for s in (FOUR, EIGHT)}
    return (
        Criterion(f"{text}: at least 1.7", f"{ratio:.2f}", ratio >= 1.7),
        Criterion(
            "at most 3.5 experts are in use, in the mean over starts, of 4 and of 8",
            f"{sum(used) / len(used):.2f}",
            sum(used) / len(used) <= 3.5,
        ),
        Criterion(
            "the expert tells front from back: at least 0.8 of 1 bit",
            f"{sum(told) / len(told):.2f}",
            sum(told) / len(told) >= 0.8,
        ),
        Criterion(
            "at least 80 % right on new speakers, of 4 and of 8 experts",
            " and ".join(f"{100 * value:.1f}" for value in tested.values()),
            min(tested.values()) >= 0.8,
        ),
    )


def _arm(system: System) -> Arm:
    """Every weight is multiplied by once."""
    count = sum(p.numel() for p in system.make(0).parameters())
    return Arm(system.name, count, count, 2.0 * count, "" if system.hidden else "every expert is evaluated")


def _curves(fitted: dict[System, list[Fitted]]) -> Chart:
    """The error of the first start of each."""
    curves = []
    for system, runs in fitted.items():
        error = runs[0].history.error
        curves.append(Curve(system.name, [float(epoch) for epoch in range(len(error))], error))
    about = f"One start of each, until it is below {BOUND:g}; every system takes steps of {STEP:g}."
    return Chart("Learning", "epoch", "mean squared error", tuple(curves), about, y_from_zero=True)


@torch.no_grad()
def _regions(fitted: Fitted, vowels: Vowels) -> Drawing:
    """Which expert answers where, and the vowels of new speakers."""
    assert isinstance(fitted.model, LocalExperts)
    low, high = vowels.x.amin(0), vowels.x.amax(0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    columns, rows = 120, 60
    f1, f2 = torch.linspace(float(low[0]), float(high[0]), columns), torch.linspace(float(low[1]), float(high[1]), rows)
    grid = torch.stack(torch.meshgrid(f1, f2, indexing="xy"), -1).flatten(0, 1)
    answers = fitted.model(grid).log_gates.argmax(-1).view(rows, columns).numpy()
    points = [
        (letter, vowels.x[vowels.test & (vowels.vowel == number)].numpy().astype(np.float64))
        for number, letter in enumerate(VOWELS)
    ]
    svg = plane(
        answers,
        points,
        (float(low[0]), float(high[0])),
        (float(low[1]), float(high[1])),
        ("F1, Hz", "F2, Hz"),
        [f"expert {k}" for k in range(fitted.model.config.num_experts)],
    )
    about = "Colours: the expert with most of the gate, first start. Letters: what new speakers said, i and I at the "
    return Drawing("Who answers where", svg, about + "front of the mouth, A and V at the back.")
