"""The interval of a difference holds what it says: in a simulation that draws documents and seeds anew each time."""

import math

import numpy as np
import pytest

from manyhands.compare.interval import Floats, difference, figures
from manyhands.compare.student import two_sided

TABLE = [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (30, 2.04227), (math.inf, 1.95996)]


@pytest.mark.parametrize(("df", "t"), TABLE)
def test_student(df: float, t: float) -> None:
    """Printed tables."""
    assert two_sided(0.95, df) == pytest.approx(t, rel=2e-5)


def test_student_between_whole_numbers() -> None:
    """The density, summed up to the quantile by Simpson's rule."""
    for df in (1.3, 2.5, 7.9):
        t, half = np.linspace(0, two_sided(0.95, df), 200_001), (df + 1) / 2
        scale = math.exp(math.lgamma(half) - math.lgamma(df / 2)) / math.sqrt(math.pi * df)
        weights = np.full(len(t), 2.0)
        weights[1::2], weights[[0, -1]] = 4.0, 1.0
        inside = (scale * (1 + t * t / df) ** -half * weights).sum() * t[1] / 3
        assert 2 * inside == pytest.approx(0.95, abs=1e-9)


SPREADS = {"seeds": (0.02, 0.02, 0.02), "documents": (0.001, 0.2, 0.02), "both alike": (0.03, 0.1, 0.1)}


def drawn(
    rng: np.random.Generator, seeds: tuple[int, int], X: int, spread: tuple[float, float, float]
) -> tuple[list[Floats], Floats]:
    """Losses of two configurations whose true difference is 0.03 per byte: of a run, of a configuration on a document,
    of a run on a document, each with its spread; a document's difficulty, the largest of all, is common."""
    of_run, of_document, of_both = spread
    size_X = rng.lognormal(8, 1, X)
    hard_X = rng.normal(2, 0.5, X)
    found = []
    for number, S in enumerate(seeds):
        level_S1 = 0.03 * number + rng.normal(0, of_run, (S, 1))
        per_byte_SX = hard_X + level_S1 + rng.normal(0, of_document, X) + rng.normal(0, of_both, (S, X))
        found.append(per_byte_SX * size_X)
    return found, size_X


@pytest.mark.parametrize("spread", SPREADS)
def test_coverage(spread: str) -> None:
    """Between 90 and 99 % of 400 intervals hold the truth; seeds alone, or documents alone, would not do."""
    rng = np.random.default_rng(1)
    held = {"whole": 0, "documents": 0, "seeds": 0}
    for _ in range(400):
        (a, b), size_X = drawn(rng, (3, 3), 60, SPREADS[spread])
        whole = difference(figures(a, size_X), figures(b, size_X), a, b, size_X)
        assert whole.covers == "documents and seeds" and whole.sd_documents and whole.sd_seeds
        held["whole"] += abs(whole.value - 0.03) <= whole.half
        held["documents"] += abs(whole.value - 0.03) <= 1.96 * whole.sd_documents
        held["seeds"] += abs(whole.value - 0.03) <= 1.96 * whole.sd_seeds
    assert 0.90 <= held["whole"] / 400 <= 0.99, held
    lacking = {"seeds": ["documents"], "documents": ["seeds"], "both alike": ["documents", "seeds"]}[spread]
    assert all(held[name] / 400 < 0.88 for name in lacking), held


def test_few_seeds() -> None:
    """One seed each: documents only, and it says so. One beside three: the spread of the three, for both."""
    (a, b), size_X = drawn(np.random.default_rng(0), (3, 1), 60, SPREADS["seeds"])
    one = difference(figures(a[:1], size_X), figures(b, size_X), a[:1], b, size_X)
    assert one.covers == "documents" and one.sd_seeds is None and not one.pooled
    both = difference(figures(a, size_X), figures(b, size_X), a, b, size_X)
    assert both.covers == "documents and seeds" and both.pooled and both.half > one.half
    bare = difference(np.array([2.0, 2.1]), np.array([1.9, 2.0]), None, None, None)
    assert bare.covers == "seeds" and bare.df == pytest.approx(2) and bare.value == pytest.approx(-0.1)
    assert bare.half == pytest.approx(4.30265 * math.sqrt(0.005), rel=1e-4)
    none = difference(np.array([2.0]), np.array([1.0]), None, None, None)
    assert none.covers == "nothing" and none.half == math.inf and not none.shown


def test_paired_by_document() -> None:
    """How hard a document is is common: it cancels, and the same runs have no difference and no width."""
    (a, _), size_X = drawn(np.random.default_rng(0), (1, 1), 40, SPREADS["documents"])
    same = difference(figures(a, size_X), figures(a, size_X), a, a, size_X)
    assert same.value == same.half == 0 and not same.shown
    shifted = difference(figures(a, size_X), figures(a - 0.1 * size_X, size_X), a, a - 0.1 * size_X, size_X)
    assert shifted.value == pytest.approx(-0.1) and shifted.half < 1e-12
