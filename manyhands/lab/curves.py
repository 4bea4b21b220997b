"""Learning curves, and how much sooner one of two gets anywhere: the ratio for every loss, not one number."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhands.errors import UserError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run was, and when. Three rows of equal length."""

    steps: Sequence[int]
    """Optimiser steps done, rising."""
    seconds: Sequence[float]
    """Spent in training steps until then: without validation and saving."""
    losses: Sequence[float]
    """Nats per token."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """One loss, and when each of two runs first had it."""

    loss: float
    slow_step: float
    fast_step: float
    slow_seconds: float
    fast_seconds: float

    @property
    def by_steps(self) -> float:
        """How many times fewer steps the fast one needed."""
        return self.slow_step / self.fast_step

    @property
    def by_clock(self) -> float:
        """How many times less time."""
        return self.slow_seconds / self.fast_seconds


def smoothed(progress: Progress, window: int) -> Progress:
    """Each loss the mean of the last `window` up to it; the points before the first whole window are left out.

    A trailing mean is late by half a window in both of two curves, which draws their ratio a little towards 1.
    Raises `UserError` for fewer points than a window has.
    """
    if len(progress.losses) < window:
        raise UserError(f"{len(progress.losses)} points are fewer than a window of {window}")
    means = np.convolve(progress.losses, np.full(window, 1 / window), mode="valid")
    return Progress(progress.steps[window - 1 :], progress.seconds[window - 1 :], means.tolist())


def ratios(slow: Progress, fast: Progress) -> list[Ratio]:
    """For each loss that `slow` has for the first time: when it had it, and when `fast` first did.

    Between two points the losses are joined by straight lines. Losses that `fast` begins below or never reaches have no
    ratio, so the list may be shorter than the curve, or empty.
    """
    best = np.minimum.accumulate(np.asarray(fast.losses, np.float64))
    found, reached = [], np.inf
    for step, seconds, loss in zip(slow.steps, slow.seconds, slow.losses, strict=True):
        if loss < reached:
            reached = loss
            if best[-1] <= loss <= best[0]:
                there = _when(fast.steps, best, loss), _when(fast.seconds, best, loss)
                found.append(Ratio(loss, step, there[0], seconds, there[1]))
    return found


def _when(positions: Sequence[float], best: Floats, loss: float) -> float:
    """Where a falling curve first is at `loss`, which lies between its ends."""
    after = int(np.argmax(best <= loss))
    if after == 0:
        return float(positions[0])
    left, right = float(positions[after - 1]), float(positions[after])
    above, below = float(best[after - 1]), float(best[after])
    return left + (right - left) * (above - loss) / (above - below)
