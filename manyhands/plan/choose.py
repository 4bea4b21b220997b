"""Which model, in which format, on which machine: every combination held against a wish, and the best of them.

Of a model's formats the most precise that keeps the wish is offered, where experts lie outside of the device the
fastest; of the numbers of devices the smallest. Then an offer is left out if another is no worse in anything: size,
active size, precision, speed, cost, layout.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from manyhands.plan.fit import shown_share, usable
from manyhands.plan.offer import Loss, Offer, Place, copies_for
from manyhands.plan.tiers import MOST_BESIDE_A_HOST
from manyhands.plan.wish import Case

By = Literal["model", "machine", "format"]


@dataclass(frozen=True, slots=True)
class Beaten:
    """An offer that another one beats."""

    offer: Offer
    by: Offer


@dataclass(frozen=True, slots=True)
class Chosen:
    """An answer."""

    offers: list[Offer]
    """The frontier: all in memory first, then host memory, then disk; among those the largest model first."""
    wider: dict[int, Loss]
    """By place in `offers`: why the next more precise format of that model is not offered there."""
    losses: list[Loss]
    """What was nearest to be offered and is not, of each model and machine that has no offer."""
    beaten: list[Beaten] = field(default_factory=list)
    considered: int = 0
    """Combinations of model, format, machine and number of devices."""


def choose(models: Sequence[Sequence[Case]], places: Sequence[Place], *, by: By, frontier: bool = True) -> Chosen:
    """`models`: the formats of each model, equals that shall stay first. `by`: of which each has one row at most.

    Without `frontier` what another offer beats stays.
    """
    kept: list[tuple[Offer, Loss | None]] = []
    losses: list[Loss] = []
    considered = 0
    for cases in models:
        ordered = sorted(cases, key=lambda case: -case.weights)
        mine: list[tuple[Offer, Loss | None]] = []
        missed: list[Loss] = []
        for place in places:
            found, lost = _all(ordered, place) if by == "format" else _best(ordered, place)
            considered += len(ordered) * len(_counts(place, ordered))
            mine += found
            if not found or by == "format":
                missed += lost[:1] if by != "format" else lost
        if by == "model":
            mine = sorted(mine, key=lambda each: _preference(each[0]))[:1]
            missed = [] if mine else sorted(missed, key=lambda loss: loss.ratio)[:1]
        kept += mine
        losses += missed
    offers, beaten = [each for each, _ in kept], list[Beaten]()
    if frontier:
        offers, beaten = _frontier(offers)
    wider = {id(made): loss for made, loss in kept if loss is not None}
    offers.sort(key=lambda made: (made.rank, *_order(made)))
    return Chosen(
        offers,
        {i: wider[id(made)] for i, made in enumerate(offers) if id(made) in wider},
        sorted(losses, key=lambda loss: loss.ratio),
        beaten,
        considered,
    )


def first_of_each_layout(offers: Iterable[Offer], rows: int) -> list[int]:
    """The places of those that are shown."""
    found: list[int] = []
    for _, group in groupby(enumerate(offers), key=lambda each: each[1].rank):
        found += [i for i, _ in group][:rows]
    return found


def _counts(place: Place, cases: Sequence[Case]) -> list[int]:
    """Numbers of devices that are joined: what is named; of GPUs powers of two times that as far as they may be had."""
    most, named = cases[0].wish.devices, place.machine.devices
    if most is None or place.machine.kind != "gpu":
        return [named]
    return [named << n for n in range(20) if named << n <= most]


def _best(cases: Sequence[Case], place: Place) -> tuple[list[tuple[Offer, Loss | None]], list[Loss]]:
    """The best offer of one model on one machine and why nothing wider is; else what was missing, nearest first.

    More devices than a node has are joined only where a node does not do: before that, whole machines are added.
    """
    best: tuple[Offer, Loss | None] | None = None
    losses: list[Loss] = []
    cases = [case for case in cases if case.reads(place.machine)]
    for devices in _counts(place, cases) if cases else ():
        if best is not None and best[0].rank == 0 and devices > max(place.machine.node, MOST_BESIDE_A_HOST):
            break
        bought = place.of(devices)
        wider: Loss | None = None
        for case in cases:
            made = copies_for(case, bought)
            if isinstance(made, Loss):
                losses.append(made)
                wider = made
                continue
            if best is None or _preference(made) < _preference(best[0]):
                best = made, wider if made.rank == 0 else None
            if made.rank == 0 and made.copies == 1:
                break
            share = made.need.total / usable(bought.machine)
            wider = Loss(case, bought, "layout", share, f"needs {shown_share(share)} the memory")
        if best is not None and best[0].rank == 0 and best[0].copies == 1:
            break
    losses.sort(key=lambda loss: loss.ratio)
    return ([best], []) if best is not None else ([], losses)


def _all(cases: Sequence[Case], place: Place) -> tuple[list[tuple[Offer, Loss | None]], list[Loss]]:
    """Every format of one model on one machine, on as few devices as do; else what each is nearest to."""
    found: list[tuple[Offer, Loss | None]] = []
    missed: list[Loss] = []
    for case in cases:
        made, lost = _best([case], place)
        found += made
        missed += lost[:1]
    return found, missed


def _preference(made: Offer) -> tuple[float, ...]:
    """The smaller the better: layout, cost, memory bought, machines, then bits; speed where bytes are waited for."""
    cost = made.per_hour if made.per_hour is not None else float("inf")
    last = -made.case.bits if made.rank == 0 else -made.speed
    return made.rank, cost, _bought(made), made.copies, last


def _bought(made: Offer) -> float:
    return made.place.machine.all_memory * made.copies


def _order(made: Offer) -> tuple[float, ...]:
    """Rows: the largest model first; of one model the cheapest or smallest machine; of one machine the widest."""
    counts = made.case.subject.counts
    return -counts.total, *_preference(made)[1:]


def _frontier(offers: list[Offer]) -> tuple[list[Offer], list[Beaten]]:
    ordered = sorted(offers, key=lambda made: [-value for value in _worth(made)])
    kept: list[Offer] = []
    beaten: list[Beaten] = []
    for made in ordered:
        by = next((other for other in kept if _beats(other, made)), None)
        if by is None:
            kept.append(made)
        else:
            beaten.append(Beaten(made, by))
    return kept, beaten


def _worth(made: Offer) -> tuple[float, ...]:
    """The more the better, each for itself."""
    counts = made.case.subject.counts
    cost = made.per_hour if made.place.price is not None else None
    return (
        counts.total,
        counts.active,
        made.case.kept,
        made.speed,
        -made.rank,
        -(cost if cost is not None else _bought(made)),
    )


def _beats(one: Offer, other: Offer) -> bool:
    """No worse in anything; of equals the first one."""
    return all(a >= b for a, b in zip(_worth(one), _worth(other), strict=True))
