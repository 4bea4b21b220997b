"""Balanced assignment and Sinkhorn's scaling for the oracle, by other methods than `moe/assign.py`.

T tokens, E experts.
"""

import numpy as np
import torch
from torch import Tensor

from manyhands.check.verdict import Slack, Verdict, one_hot


def largest_sum(values_TE: Tensor) -> Tensor:
    """[T]: experts of the assignment with the largest sum, at most ⌈T/E⌉ tokens each (Kuhn and Munkres, a column for
    each place of each expert, one row after the other)."""
    T, E = values_TE.shape
    places = np.repeat(np.arange(E), -(-T // E))
    costs = -values_TE.detach().numpy()[:, places]
    row_of = np.full(len(places) + 1, -1)  # the last place is where a row waits
    of_rows, of_places = np.zeros(T), np.zeros(len(places) + 1)
    for row in range(T):
        row_of[-1], place = row, len(places)
        least, before = np.full(len(places), np.inf), np.full(len(places), len(places))
        seen = np.zeros(len(places) + 1, dtype=bool)
        while row_of[place] >= 0:
            seen[place] = True
            here = row_of[place]
            reduced = np.where(seen[:-1], np.inf, costs[here] - of_rows[here] - of_places[:-1])
            before = np.where(reduced < least, place, before)
            least = np.minimum(reduced, least)
            following = int(np.where(seen[:-1], np.inf, least).argmin())
            step = least[following]
            of_rows[row_of[seen]] += step
            of_places[seen] -= step
            least[~seen[:-1]] -= step
            place = following
        while place < len(places):
            row_of[place], place = row_of[before[place]], before[place]
    found = np.zeros(T, dtype=np.int64)
    found[row_of[:-1][row_of[:-1] >= 0]] = places[row_of[:-1] >= 0]
    return torch.from_numpy(found)


def judge_assignment(logits: Tensor, tested_T1: Tensor, slack: Slack) -> Verdict:
    """Whether an assignment is one of the largest sum, up to rounding, with room for all; it is taken if so.

    Two assignments may have the same sum, so it is the sums that are compared.
    """
    T, E = logits.shape
    own_T = largest_sum(logits)
    own = one_hot(own_T[:, None], E)
    theirs = one_hot(tested_T1.clamp(max=E - 1), E)
    if not T or torch.equal(own, theirs):
        return Verdict(own, 0, 0)
    different = int((own != theirs).any(1).sum())
    fits = bool((theirs.sum(1) == 1).all()) and int(theirs.sum(0).max()) <= -(-T // E)
    lost = float((logits * own).sum() - (logits * theirs).sum())
    if fits and lost <= 2.0 * float(slack.per_token.sum()):
        return Verdict(theirs, different, 0)
    return Verdict(own, 0, different)


def even_offsets(logits: Tensor) -> Tensor:
    """[E]: Sinkhorn's factors of the experts, in logarithms, by plain products: rows to 1/T, then columns to 1/E."""
    T, E = logits.shape
    matrix, factors = (logits - logits.max()).exp(), torch.ones(E, dtype=torch.float64)
    for _ in range(100 if T else 0):
        rows = 1.0 / (matrix * factors).sum(1) / T
        before, factors = factors, 1.0 / (matrix * rows[:, None]).sum(0) / E
        if float((factors.log() - before.log()).abs().max()) < 1e-4:
            break
    return factors.log()
