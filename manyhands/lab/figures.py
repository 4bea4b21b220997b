"""The figures of trained arms, as a result prints them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manyhands.lab.experiment import Chart, Curve, Figure
from manyhands.lab.language import Trained


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that every arm has."""

    of: Callable[[Trained], float]
    unit: str = ""
    digits: int = 3
    sparse: bool = False
    """Only sparse arms have it."""


QUANTITIES = {
    "validation loss": Quantity(lambda arm: arm.valid_loss, "nats/token"),
    "validation": Quantity(lambda arm: arm.bits_per_byte, "bits/byte"),
    "training loss, last 50 steps": Quantity(lambda arm: arm.train_loss, "nats/token"),
    "validation minus training": Quantity(lambda arm: arm.valid_loss - arm.train_loss, "nats/token"),
    "MaxVio, worst layer": Quantity(lambda arm: arm.worst("max_vio"), digits=2, sparse=True),
    "dead experts, worst layer": Quantity(lambda arm: arm.worst("dead"), digits=1, sparse=True),
    "dropped, worst layer": Quantity(lambda arm: 100 * arm.worst("dropped"), "%", 1, sparse=True),
    "gradient norm after warm-up, 99th percentile": Quantity(lambda arm: _high_gradient(arm), digits=2),
    "skipped updates": Quantity(lambda arm: arm.skipped, digits=0),
    "time of a step": Quantity(lambda arm: 1e3 * arm.step_seconds, "ms", 0),
}


def _high_gradient(arm: Trained) -> float:
    """Fresh weights have the largest gradients, which say nothing of the run: the steps of the warm-up are left out."""
    return float(np.quantile(arm.grad_norms[arm.run.schedule.warmup_steps :] or arm.grad_norms, 0.99))


def figures(arms: Mapping[str, Sequence[Trained]], names: Sequence[str]) -> tuple[Figure, ...]:
    """These `QUANTITIES` of each arm, one value per seed."""
    return tuple(
        Figure(name, arm, tuple(map(what.of, trained)), what.unit, what.digits)
        for arm, trained in arms.items()
        for name in names
        if not (what := QUANTITIES[name]).sparse or trained[0].run.model.moe is not None
    )


def by_arm(*several: Sequence[Figure]) -> tuple[Figure, ...]:
    """All of them, those of an arm together, arms in the order of their first figures."""
    found = [figure for figures in several for figure in figures]
    arms = list(dict.fromkeys(figure.arm for figure in found))
    return tuple(sorted(found, key=lambda figure: arms.index(figure.arm)))


def mean(arm: Sequence[Trained], name: str) -> float:
    """One of the `QUANTITIES`, over seeds."""
    return float(np.mean([QUANTITIES[name].of(trained) for trained in arm]))


def loss_chart(arms: Mapping[str, Sequence[Trained]], title: str, about: str = "") -> Chart:
    """Validation loss by step; every seed a line, those after the first faint."""
    curves = tuple(
        Curve(name, trained.validation.steps, trained.validation.losses, faint=number > 0)
        for name, several in arms.items()
        for number, trained in enumerate(several)
    )
    return Chart(title, "step", "validation loss, nats/token", curves, about)
