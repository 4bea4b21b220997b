"""A run's journal as arrays that fit a page, however long the run was.

n steps   E experts   C columns (points or heat-map cells along the steps)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyhands.trace.journal import of_layer

Floats = NDArray[np.float64]
Record = Mapping[str, Any]


def column(records: Sequence[Record], name: str) -> Floats:
    """[n]: one field of every record; NaN where it is null or missing."""
    values = (record.get(name) for record in records)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def layer_column(steps: Sequence[Record], layer: str, name: str) -> Floats:
    """[n]: one figure of one MoE layer at every step; NaN where it is missing."""
    return column([of_layer(step, layer) for step in steps], name)


def layer_load(steps: Sequence[Record], layer: str) -> Floats:
    """[n, E]: the load of one MoE layer in fair shares (1: the expert takes exactly 1/E of the pairs)."""
    loads = [load for step in steps if (load := of_layer(step, layer).get("load"))]
    load_nE = np.array(loads, dtype=np.float64)
    fair_nE: Floats = load_nE * load_nE.shape[1]
    return fair_nE


def edges(n: int, most: int) -> NDArray[np.int64]:
    """The starts of at most `most` nearly equal bins over n items."""
    count = min(n, most)
    return np.arange(count, dtype=np.int64) * n // max(count, 1)


def bin_mean(values: Floats, most: int) -> Floats:
    """Means over at most `most` bins along the first axis, NaN left out; NaN for a bin without numbers."""
    starts = edges(len(values), most)
    if not len(starts):
        return values
    real = np.isfinite(values)
    total = np.add.reduceat(np.where(real, values, 0.0), starts, axis=0)
    count = np.add.reduceat(real.astype(np.float64), starts, axis=0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def bin_least(values: Floats, most: int) -> Floats:
    """The least over the bins of `bin_mean`."""
    starts = edges(len(values), most)
    least: Floats = np.minimum.reduceat(values, starts, axis=0) if len(starts) else values
    return least


def envelope(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """(x, y) unchanged if it has at most `most` points; else the lowest and highest of each of `most` / 2 bins."""
    real = np.isfinite(y)
    x, y = x[real], y[real]
    if len(y) <= most:
        return x, y
    starts = edges(len(y), most // 2)
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return np.repeat(x[starts], 2), np.stack([low, high], axis=1).reshape(-1)


def window(steps: int) -> int:
    """Over how many of a run's steps its curves are smoothed: a fortieth, and of a short run a few all the same."""
    return max(steps // 40, min(9, steps // 6))


def smooth(y: Floats, width: int) -> Floats:
    """[n]: means over a centred window of about `width` steps; NaN carries no weight.

    At both ends the window keeps half its width and the value is that of a line through it: a window that shrank to
    one step would end the curve in that step's noise, and a one-sided mean would lag behind a slope.
    """
    half = width // 2
    if half and len(y) > 2 * half:
        return _line_at_ends(y, _centred(y, half), half)
    return _centred(y, half)


def _line_at_ends(y: Floats, means: Floats, half: int) -> Floats:
    """`means` with the first and last `half` values replaced by a line fitted to the first and last 2·`half` of `y`."""
    means = means.copy()
    for near in (slice(0, 2 * half), slice(len(y) - 2 * half, len(y))):
        at = np.arange(len(y), dtype=np.float64)[near]
        real = np.isfinite(y[near])
        if real.sum() < 2:
            continue
        slope, start = np.polyfit(at[real], y[near][real], 1)
        ends = at[:half] if near.start == 0 else at[half:]
        means[ends.astype(int)] = slope * ends + start
    return means


def _centred(y: Floats, half: int) -> Floats:
    at = np.arange(len(y))
    reach = np.minimum(half, np.minimum(at, len(y) - 1 - at))
    real = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(real, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(real)])
    first, after = at - reach, at + reach + 1
    window = count[after] - count[first]
    means: Floats = np.divide(total[after] - total[first], window, out=np.full_like(y, np.nan), where=window > 0)
    return means
