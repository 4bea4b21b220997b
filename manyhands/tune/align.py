"""The channels of one expert laid on those of another: the order in which their weights are most alike.

An expert's channels can stand in any order without changing what it computes, so two of them are averaged only after
the second is reordered (Git Re-Basin, Ainsworth et al. 2022, arXiv 2209.04836). F expert width, D model width.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.kernels import ExpertWeights

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def aligned(weights: ExpertWeights, fixed: int, moved: int) -> Tensor:
    """[F] int64: which channel of `moved` goes with each of `fixed`: the sum of their products is the largest."""
    a, b = channels(weights, fixed), channels(weights, moved)
    return torch.from_numpy(matching((a @ b.T).numpy()))


def channels(weights: ExpertWeights, expert: int) -> Tensor:
    """[F, …] float64: all weights of each channel: its rows of gate and up with their biases, its column of down."""
    up_RD, F = weights.up[expert].double(), weights.down.shape[2]
    parts = list(torch.split(up_RD, F)) if weights.activation in GATED else [up_RD]
    if weights.up_bias is not None:
        parts += [b[:, None] for b in torch.split(weights.up_bias[expert].double(), F)]
    return torch.cat([*parts, weights.down[expert].double().T], 1)


def matching(values_FF: Floats) -> Ints:
    """[F]: a column for each row, each column once, with the largest sum of values (Jonker and Volgenant 1987).

    Columns have prices. Those that undercut each other settle most rows; each row that is left then takes the shortest
    chain of moves that ends in a free column (Dijkstra on costs less prices). O(F³) at worst; F = 1,408 takes about a
    second.
    """
    cost_FF = values_FF.max(initial=0.0) - values_FF
    F = len(cost_FF)
    price_F, column_of, row_of = cost_FF.min(0), np.full(F, -1), np.full(F, -1)
    for column, row in enumerate(cost_FF.argmin(0)):
        if column_of[row] < 0:
            column_of[row], row_of[column] = column, row
    _bid(cost_FF, price_F, column_of, row_of)
    for row in np.flatnonzero(column_of < 0):
        _augment(int(row), cost_FF, price_F, column_of, row_of)
    return column_of


def _bid(cost_FF: Floats, price_F: Floats, column_of: Ints, row_of: Ints) -> None:
    """Rows without a column take their best, and lower its price by what the next best costs more; whoever had it bids
    again. Ends after 4·F bids, whoever is left then."""
    waiting = np.flatnonzero(column_of < 0).tolist()
    for _ in range(4 * len(cost_FF)):
        if not waiting:
            return
        row = waiting.pop()
        left_F = cost_FF[row] - price_F
        first = int(left_F.argmin())
        least, left_F[first] = left_F[first], np.inf
        second = int(left_F.argmin())
        undercuts = least < left_F[second]
        if undercuts and np.isfinite(left_F[second]):
            price_F[first] -= left_F[second] - least
        elif row_of[first] >= 0:  # equally good, and taken: the other one
            first = second
        before = int(row_of[first])
        column_of[row], row_of[first] = first, row
        if before >= 0:
            column_of[before] = -1
            if undercuts:
                waiting.append(before)


def _augment(row: int, cost_FF: Floats, price_F: Floats, column_of: Ints, row_of: Ints) -> None:
    """Give a row a column along the cheapest chain of moves; the prices stay such that no move would gain."""
    F = len(cost_FF)
    distance_F, from_row, done_F, passed = cost_FF[row] - price_F, np.full(F, row), np.zeros(F, bool), list[int]()
    while True:
        column = int(np.where(done_F, np.inf, distance_F).argmin())
        so_far = distance_F[column]
        done_F[column] = True
        holder = int(row_of[column])
        if holder < 0:
            break
        passed.append(column)
        through_F = so_far + (cost_FF[holder] - price_F) - (cost_FF[holder, column] - price_F[column])
        better_F = (through_F < distance_F) & ~done_F
        distance_F = np.where(better_F, through_F, distance_F)
        from_row[better_F] = holder
    for each in passed:
        price_F[each] += distance_F[each] - so_far
    while True:
        taker = int(from_row[column])
        row_of[column] = taker
        column, column_of[taker] = int(column_of[taker]), column
        if taker == row:
            return
