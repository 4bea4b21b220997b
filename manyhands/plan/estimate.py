"""What a model will really do: the bound, and what measured speeds say is lost on the way to it.

A step takes x/a + c a layer: x seconds is the layer's share of the bound, a the share of the machine's rates that
kernels reach, c what no bound knows (launches, synchronisation), whatever the layer's size. These two numbers explain
published speeds of single sequences, on one device to eight, within a fifth; a mean share of the bound is off by a
factor of two, since small layers on fast machines are mostly c. Fitted in the logarithm of time, so that twice too slow
counts as twice too fast. The band is how far the law misses what it was not fitted on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from manyhands.plan.roof import Bound

DECODE, PREFILL = "decode", "prefill"
UNSURE = 2.0
"""Factor of the band where too little was measured to know it."""
SLACK, BEYOND = 1.1, 1.25
"""Least factor of the band: other shapes differ by as much; and of layers beyond the shortest or longest measured."""
LEAST, FEW, ENOUGH = 2, 3, 4
"""Points that a law takes; that a band takes; and that tell a constant time from a share, if of several groups."""
MANY = 10
"""Points of which the band leaves out the furthest tenth on either side; of fewer it holds all."""
_COARSE, _FINE = 31, 21


@dataclass(frozen=True, slots=True)
class Kind:
    """What was done: steps of one kind lose alike."""

    work: str
    """`decode` or `prefill`."""
    many: bool = False
    """Several sequences in a step of decoding."""
    several: bool = False
    """Devices that exchange what they compute."""
    host: bool = False
    """The processor computes the experts: a machine without a GPU, or experts in host memory beside one."""
    format: str | None = None
    """Of the weights, for steps recorded on one machine; None for published ones, whose engines differ more."""

    @property
    def exchange(self) -> bool:
        """Much is sent between devices; one token for each sequence of a few is not."""
        return self.several and (self.many or self.work == PREFILL)


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step."""

    group: str
    """What is left out together: the model of a recorded speed, the source of a published one."""
    kind: Kind
    bound: float
    """Seconds a layer, as `Bound.seconds` has them."""
    taken: float
    """Seconds a layer that it took."""


@dataclass(frozen=True, slots=True)
class Law:
    """Seconds a layer from the bound's: x/share + constant. `low` and `high` are what it missed, in speed."""

    share: float
    constant: float
    low: float
    high: float
    points: int
    span: tuple[float, float]
    """The shortest and the longest bound that it was fitted on, in seconds a layer."""

    def seconds(self, bound: float) -> float:
        """A layer's, from its share of the bound."""
        return bound / self.share + self.constant

    def band(self, bound: float) -> tuple[float, float]:
        """Factors of the speed at its ends, for a layer of this bound."""
        least = SLACK if self.span[0] <= bound <= self.span[1] else BEYOND
        return min(1 / least, self.low), max(least, self.high)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens per second of all sequences together, and the band in which they are expected."""

    tokens_per_second: float
    low: float
    high: float
    source: str
    """What it is from, for people."""
    recorded: bool
    """From speeds of this machine, not from other people's."""


def estimate(bound: Bound, layers: int, kind: Kind, recorded: Sequence[Point] = (), *, without: str = "") -> Estimate:
    """Of a step of `layers` layers. `recorded`: what this machine did before; without any, published speeds are taken.

    `without` names a group that does not count: how the method is tested.
    """
    law, ours = law_for(kind, recorded, without=without)
    each = bound.seconds / layers
    speed, (low, high) = bound.step.tokens / (layers * law.seconds(each)), law.band(each)
    top, what = bound.most_per_second, "recorded here" if ours else "published by others"
    source = f"from {law.points} speed{'s' if law.points > 1 else ''} {what}"
    return Estimate(min(speed, top), min(speed * low, top), min(speed * high, top), source, ours)


def law_for(kind: Kind, recorded: Sequence[Point] = (), *, without: str = "") -> tuple[Law, bool]:
    """What speeds say of steps of `kind`, and whether they are of this machine (`recorded`) or published."""
    ours = [point for point in recorded if point.kind.work == kind.work and point.group != without]
    points = ours or [point for point in published_points() if point.group != without]
    return fit(points, kind if ours else replace(kind, format=None)), bool(ours)


def fit(points: Sequence[Point], kind: Kind) -> Law:
    """The law of those most like `kind`, and its band: four in five of them, and each of exactly this kind if few."""
    alike = _alike(points, kind)
    both = len({point.group for point in alike}) > 1 and len(alike) >= ENOUGH
    share, constant = _fitted(alike, both)
    bounds = [point.bound for point in alike]
    law = Law(share, constant, 1 / UNSURE, UNSURE, len(alike), (min(bounds), max(bounds)))
    missed = _missed(alike, both)
    if len(missed) < FEW:
        return law
    speeds = sorted(speed for _, speed in missed)
    tenth = len(speeds) // 10
    kept = speeds[tenth : len(speeds) - tenth] + [
        speed for point, speed in missed if point.kind == kind and _few(alike, kind)
    ]
    return replace(law, low=min(1.0, *kept), high=max(1.0, *kept))


def _missed(points: Sequence[Point], both: bool) -> list[tuple[Point, float]]:
    """Each point, and its speed over that of a law fitted on the other groups."""
    found = []
    for group in sorted({point.group for point in points}):
        others = [point for point in points if point.group != group]
        if len(others) >= LEAST:
            share, constant = _fitted(others, both and len(others) > LEAST)
            left = [point for point in points if point.group == group]
            found += [(point, (point.bound / share + constant) / point.taken) for point in left]
    return found


def _few(points: Sequence[Point], kind: Kind) -> bool:
    """Whether the points of exactly this kind are too few for the band to leave the furthest out."""
    return sum(point.kind == kind for point in points) < MANY


def _fitted(points: Sequence[Point], both: bool) -> tuple[float, float]:
    """(a, c) of the least Σ (ln(x/a + c) - ln t)². With r = a·c, ln a is the mean of ln(x + r) - ln t: one unknown, r.

    r is looked for from a thousandth to a thousand times the shortest bound, five to a decade and then between the
    best one's neighbours, and at 0; a stays at most 1. `both`: c too, and not a alone.
    """

    def tried(r: float) -> tuple[float, float, float]:
        logs = [math.log((point.bound + r) / point.taken) for point in points]
        mean = min(0.0, sum(logs) / len(logs))
        return sum((value - mean) ** 2 for value in logs), math.exp(mean), r

    best = tried(0.0)
    if both:
        shortest = min(point.bound for point in points)
        coarse = min(tried(shortest * 10 ** (step / 5 - 3)) for step in range(_COARSE))
        fine = (tried(coarse[2] * 10 ** (0.2 * (2 * step / (_FINE - 1) - 1))) for step in range(_FINE))
        best = min(best, coarse, *fine)
    _, share, r = best
    return share, r / share


_LIKENESS: tuple[Callable[[Kind], object], ...] = (
    lambda kind: (kind.work, kind.host, kind.exchange, kind.format, kind.many if kind.format else None),
    lambda kind: (kind.work, kind.host, kind.exchange, kind.many),
    lambda kind: (kind.work, kind.host, kind.exchange),
    lambda kind: (kind.work, kind.host),
    lambda kind: kind.work,
)
"""What steps may have in common, the most first. Published batches share the law of single sequences: a few sources."""


def _alike(points: Sequence[Point], kind: Kind) -> list[Point]:
    for trait in _LIKENESS:
        found = [point for point in points if trait(point.kind) == trait(kind)]
        if len(found) >= LEAST:
            return found
    return list(points)


@cache
def published_points() -> tuple[Point, ...]:
    """Of `published_speeds.toml`, in its order."""
    from manyhands.plan.published_speeds import all_compared

    found = []
    for each in all_compared():
        speed, step = each.speed, each.bound.step
        kind = Kind(
            speed.work,
            many=speed.work == DECODE and speed.batch > 1,
            several=each.machine.devices > 1 and not speed.in_turns,
            host=speed.host is not None or each.machine.kind == "cpu",
        )
        taken = step.tokens / speed.tokens_per_second / each.layers
        found.append(Point(f"{speed.url} {speed.engine}", kind, each.alone.seconds / each.layers, taken))
    return tuple(found)
