"""How steady runs are: how far seeds lie apart, and how often a gradient jumps."""

from collections.abc import Sequence
from statistics import median, variance

import numpy as np

from manyhands.errors import UserError

SPIKE = 2.0
"""Times the median of the steps before it, above which a gradient norm is called a spike."""
BEFORE = 20
"""Steps of that median."""


def spikes(norms: Sequence[float]) -> int:
    """How many gradient norms, from the 21st on, are more than `SPIKE` times the median of the `BEFORE` before them.

    A run that is no longer finite counts each of its steps.
    """
    found = 0
    for step in range(BEFORE, len(norms)):
        found += not norms[step] <= SPIKE * median(norms[step - BEFORE : step])
    return found


def variance_test(wide: Sequence[float], narrow: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """How often chance alone gives `wide` so much more variance than `narrow`: the one-sided F test, by simulation.

    Raises `UserError` for fewer than two values, of which nothing can be said.
    """
    if min(len(wide), len(narrow)) < 2:
        raise UserError("a spread needs two seeds at least")
    seen = variance(wide) / max(variance(narrow), 1e-300)
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((draws, len(values))).var(1, ddof=1) for values in (wide, narrow))
    return float((a / b >= seen).mean())
