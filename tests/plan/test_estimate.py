"""Estimates: a planted law is found, the band holds, this machine's speeds come before other people's."""

import json
import math
from dataclasses import replace

import pytest

from manyhands.plan.estimate import DECODE, PREFILL, Kind, Point, estimate, fit, published_points
from manyhands.plan.published_speeds import all_compared
from manyhands.plan.roof import Bound
from manyhands.plan.traffic import StepBytes

from ..small_runs import manyhands

ONE = Kind(DECODE, format="4 bits")


def bound(seconds: float, tokens: int = 1, least: float = 1.0) -> Bound:
    """A step that is only read, `seconds` long; `least` of it were all its tokens alike."""
    step = StepBytes(tokens, distinct=8, experts=1e9, fixed=0, cache=0, fewest=8 * least)
    return Bound(step, 0.0, 0.0, seconds, None, None, None)


def points(share: float, constant: float, bounds: list[float], kind: Kind = ONE) -> list[Point]:
    return [Point(f"model {i}", kind, x, x / share + constant) for i, x in enumerate(bounds)]


@pytest.mark.parametrize(("share", "constant"), [(0.8, 1e-4), (0.3, 0.0), (1.0, 3e-3), (0.5, 2e-5)])
def test_a_planted_law_is_found(share: float, constant: float) -> None:
    law = fit(points(share, constant, [1e-5, 1e-4, 1e-3, 1e-2]), ONE)
    for x in (2e-5, 5e-4, 5e-3):
        assert law.seconds(x) == pytest.approx(x / share + constant, rel=0.01)
    assert law.points == 4 and law.low >= 0.9 and law.high <= 1.1 and law.span == (1e-5, 1e-2)


def test_the_band_is_what_models_left_out_were_missed_by() -> None:
    """One model of seven is 40 % slower than the others' law: the slow end is where it lies."""
    four = points(0.8, 0.0, [1e-4, 2e-4, 3e-4, 4e-4, 8e-4, 16e-4])
    odd = Point("odd", ONE, 3e-4, 3e-4 / 0.8 * 1.4)
    law = fit([*four, odd], ONE)
    assert law.low == pytest.approx(1 / 1.4, rel=0.01) and 1 <= law.high < 1.25
    assert law.band(3e-4) == (law.low, max(1.1, law.high)) and law.band(1.0) == (law.low, 1.25)


def test_too_little_is_not_taken_for_certain() -> None:
    """One model tells a share, no constant and no band."""
    law = fit([Point("a", ONE, x, 2 * x + 1e-4) for x in (1e-4, 1e-3, 1e-2, 1e-1)], ONE)
    assert law.constant == 0 and (law.low, law.high) == (0.5, 2.0)


def test_this_machines_speeds_come_first_and_of_the_format_asked_about() -> None:
    four, eight = Kind(DECODE, host=True, format="4 bits"), Kind(DECODE, host=True, format="8 bits")
    recorded = points(0.5, 0.0, [1e-4, 1e-3, 1e-2], four) + points(0.25, 0.0, [1e-4, 1e-3, 1e-2], eight)
    for kind, share in ((four, 0.5), (eight, 0.25)):
        found = estimate(bound(1.0), 4, kind, recorded)
        assert found.recorded and found.source == "from 3 speeds recorded here"
        assert found.tokens_per_second == pytest.approx(share, rel=0.01)
    other = estimate(bound(1.0), 4, replace(four, format="16 bits"), recorded)
    assert (
        other.recorded and other.source == "from 6 speeds recorded here" and other.high > 1.3 * other.tokens_per_second
    )
    prefill = estimate(bound(1.0), 4, Kind(PREFILL, host=True, format="4 bits"), recorded)
    assert not prefill.recorded and "published by others" in prefill.source


def test_what_is_left_out_does_not_count() -> None:
    recorded = [*points(0.5, 0.0, [1e-4, 1e-3, 1e-2]), Point("odd", ONE, 1e-3, 1.0)]
    assert estimate(bound(1.0), 4, ONE, recorded, without="odd").tokens_per_second == pytest.approx(0.5, rel=0.01)


def test_no_estimate_exceeds_what_is_possible() -> None:
    """A law that says 95 % of uniform routing, to a band of +60 %: no more than if all agree."""
    many = Kind(DECODE, many=True)
    capped, free = estimate(bound(1.0, 8), 1, many), estimate(bound(1.0, 8, least=0.1), 1, many)
    assert capped.low <= capped.tokens_per_second <= capped.high == 8.0 < free.high <= 80.0


def test_published_speeds_are_estimated_without_their_source() -> None:
    """Single sequences: three in four within a quarter. A mean share of the bound does far worse."""
    misses, plain = [], []
    singles = [(each, point) for each, point in zip(all_compared(), published_points(), strict=True)
               if point.kind.work == DECODE and not point.kind.many and not point.kind.host]  # fmt: skip
    for each, point in singles:
        found = estimate(each.alone, each.layers, point.kind, without=point.group)
        misses.append(abs(math.log(found.tokens_per_second / each.speed.tokens_per_second)))
        others = [math.log(p.bound / p.taken) for _, p in singles if p.group != point.group]
        plain.append(abs(math.log(point.bound / point.taken) - sum(others) / len(others)))
    near = [sum(miss < math.log(1.25) for miss in of) / len(of) for of in (misses, plain)]
    assert len(misses) >= 30 and near[0] >= 0.75 and near[1] < 0.5


def test_plan_shows_estimates_beside_the_bound() -> None:
    done = manyhands("plan", "qwen3-30b-a3b", "--machine", "rtx-4090", "--format", "q4_k_m", "--json")
    sections = json.loads(done.stdout)["sections"]
    best = {row["step"]: row["all"]["value"] for row in sections["speed"]["table"]}
    rows = sections["expected"]["table"]
    assert [row["step"] for row in rows] == [step for step in best if best[step] is not None]
    for row in rows:
        low, found, high = (row[key]["value"] for key in ("low", "estimate", "high"))
        assert low < found < high and found == pytest.approx(row["share"]["value"] * best[row["step"]])
    assert any("published by others" in note for note in sections["expected"]["notes"])


def test_nothing_is_expected_of_what_does_not_fit() -> None:
    printed = manyhands("plan", "deepseek-v3", "--machine", "rtx-4090").stdout
    assert "Best speed" in printed and "Expected speed" not in printed
