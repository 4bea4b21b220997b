"""How many bits a label tells about the expert, I(E; X) and I(E; X | Z), from weighted counts.

The plug-in estimate from N tokens is too high by about (rows − 1)(columns − 1) / (2 N ln 2) bits (Miller 1955); the
shuffled null has the same bias, and more exactly, so it is what the figures subtract (`Resampler.figure`, excess).

T tokens   E experts
"""

import numpy as np
from numpy.typing import NDArray

from manyhands.inspect.observed import Floats, Ints
from manyhands.inspect.resample import Statistic


def entropy(weights: NDArray[np.float64]) -> float:
    """In bits, of weights that need not sum to 1."""
    total = weights.sum()
    share = weights[weights > 0] / total
    return float(-(share * np.log2(share)).sum()) if total else 0.0


def information(labels: Ints, num_experts: int, given: Ints | None = None) -> Statistic:
    """I(expert; label) in bits, or I(expert; label | given), as a function of the tokens' first experts and weights.

    labels, given   [T], from 0; a token whose expert is -1 is left out.
    """
    outer = np.zeros(len(labels), np.int64) if given is None else given
    inner = np.unique(np.stack([outer, labels]), axis=1, return_inverse=True)[1].ravel()
    _, outer = np.unique(outer, return_inverse=True)

    def bits(first_T: NDArray[np.int32], weight_T: Floats) -> float:
        return _left(outer, first_T, weight_T, num_experts) - _left(inner, first_T, weight_T, num_experts)

    return bits


def _left(cells: Ints, first_T: NDArray[np.int32], weight_T: Floats, num_experts: int) -> float:
    """H(expert | cell) in bits."""
    E = num_experts
    flat = cells * (E + 1) + np.where(first_T < 0, E, first_T)
    table = np.bincount(flat, weight_T, (int(cells.max(initial=0)) + 1) * (E + 1)).reshape(-1, E + 1)[:, :E]
    total = table.sum()
    rows = table.sum(1)
    if not total:
        return 0.0
    table, rows = table[table > 0], rows[rows > 0]
    return float(((rows * np.log2(rows)).sum() - (table * np.log2(table)).sum()) / total)
