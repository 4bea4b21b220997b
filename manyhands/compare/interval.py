"""How much better one configuration is than another, with an interval over documents and seeds.

Each configuration was trained from several seeds, and every run read the same validation documents: two crossed
samples. A run's figure is Σ nats / Σ size over the documents. The difference B − A of the means over seeds varies

    with the seeds        v_S = s²_A / S_A + s²_B / S_B, from the spread of whole runs
    with the documents    v_D, the jackknife over documents of the difference of the means: what is common to both
                          configurations, how hard a document is, has cancelled

and what a seed does to a single document is in both, so it is taken off once (v_I): v = v_S + v_D − v_I, never less
than the larger of the two. The interval is Student's, with Satterthwaite's degrees of freedom: three seeds count as
three. Sources: Cameron, Gelbach & Miller 2011 (clusters in two directions), Owen 2007 (crossed random effects), Efron &
Tibshirani 1993, chapter 11 (jackknife), Satterthwaite 1946.

S seeds of one configuration, X documents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from manyhands.compare.student import two_sided

Floats = npt.NDArray[np.float64]
LEVEL = 0.95
Covers = Literal["documents and seeds", "documents", "seeds", "nothing"]


@dataclass(frozen=True, slots=True)
class Difference:
    """B − A in the unit of the figures: below 0, B has the lower loss."""

    value: float
    half: float
    """Half the interval's width; infinite where nothing could be estimated."""
    covers: Covers
    """What would vary if it were done again: other documents of the same kind, other seeds."""
    df: float
    """Degrees of freedom."""
    sd_seeds: float | None
    sd_documents: float | None
    pooled: bool = False
    """One configuration has a single seed, and the spread of the other's was taken for both."""

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.value) > self.half


def difference(a_S: Floats, b_S: Floats, a_SX: Floats | None, b_SX: Floats | None, size_X: Floats | None) -> Difference:
    """Of the runs' figures `a_S`, `b_S`, and of their losses by document [S, X] over `size_X`, if they were kept.

    A figure is then Σ_x of a row over Σ size.
    """
    value = float(b_S.mean() - a_S.mean())
    parts: list[tuple[float, float]] = []
    seeds, pooled = _of_seeds(a_S, b_S)
    parts += seeds
    v_seeds = sum(v for v, _ in seeds)
    v_documents = v_both = 0.0
    documents = a_SX is not None and b_SX is not None and size_X is not None and int((size_X > 0).sum()) > 1
    if documents:
        assert a_SX is not None and b_SX is not None and size_X is not None
        v_documents, df = _of_documents(b_SX.mean(0) - a_SX.mean(0), size_X)
        parts.append((v_documents, df))
        v_both = min(_of_both(a_SX, size_X) + _of_both(b_SX, size_X), v_seeds, v_documents)
    covers: Covers = (
        "documents and seeds" if seeds and documents else "documents" if documents else "seeds" if seeds else "nothing"
    )
    sd_seeds = math.sqrt(v_seeds) if seeds else None
    sd_documents = math.sqrt(v_documents) if documents else None
    if covers == "nothing":
        return Difference(value, math.inf, covers, 0.0, None, None)
    variance = max(v_seeds + v_documents - v_both, v_seeds, v_documents)
    below = sum(v * v / df for v, df in parts)
    df = variance * variance / below if below else math.inf
    half = two_sided(LEVEL, max(1.0, df)) * math.sqrt(variance)
    return Difference(value, half, covers, df, sd_seeds, sd_documents, pooled)


def _of_seeds(a_S: Floats, b_S: Floats) -> tuple[list[tuple[float, float]], bool]:
    """Variance and degrees of freedom of each mean; none where no configuration has two seeds."""
    known = [(float(y_S.var(ddof=1)), len(y_S) - 1) for y_S in (a_S, b_S) if len(y_S) > 1]
    if not known:
        return [], False
    if len(known) == 1:
        [(variance, df)] = known
        return [(variance * (1 / len(a_S) + 1 / len(b_S)), df)], True
    return [(v / len(y_S), df) for (v, df), y_S in zip(known, (a_S, b_S), strict=True)], False


def _of_documents(d_X: Floats, size_X: Floats) -> tuple[float, float]:
    """The jackknife's variance of Σd / Σsize and its degrees of freedom: few where few documents make most of it."""
    X = len(d_X)
    without_X = (d_X.sum() - d_X) / (size_X.sum() - size_X)
    share_X = (without_X - without_X.mean()) ** 2 * (X - 1) / X
    v = float(share_X.sum())
    fourth = float((share_X**2).sum())
    return v, min(X - 1.0, max(1.0, 3 * v * v / fourth)) if fourth else X - 1.0


def _of_both(y_SX: Floats, size_X: Floats) -> float:
    """The part of a mean's variance that is a seed's effect on single documents."""
    S = len(y_SX)
    if S < 2:
        return 0.0
    off_SX = y_SX - y_SX.mean(0)
    off_SX = off_SX - off_SX.sum(1, keepdims=True) * size_X / size_X.sum()
    return float((off_SX**2).sum() / size_X.sum() ** 2 / S / (S - 1))


def figures(y_SX: Floats, size_X: Floats) -> Floats:
    """[S]: each run's Σ over documents / Σ size."""
    found: Floats = y_SX.sum(1) / size_X.sum()
    return found


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds, the least and the most."""
    return math.fsum(values) / len(values), min(values), max(values)
