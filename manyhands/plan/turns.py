"""Where one of two costs becomes the smaller one: up to which context or batch a sparse model is the cheaper."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

Cost = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Whole numbers, both ends included, over which the same one of two is the smaller."""

    first: int
    last: int
    smaller: int
    """0 for the first of the two costs, 1 for the second; equal counts for the first."""


def stretches(a: Cost, b: Cost, last: int) -> list[Stretch]:
    """Who is smaller from 1 to `last`, in order.

    Looks at powers of two and halves the intervals whose ends differ: two turns between neighbours are not seen.
    """

    def smaller(at: int) -> int:
        return int(a(at) > b(at))

    grid = [1 << power for power in range(last.bit_length()) if 1 << power < last] + [last]
    starts = [1]
    for low, high in itertools.pairwise(grid):
        if smaller(low) != smaller(high):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if smaller(middle) == smaller(starts[-1]) else (low, middle)
            starts.append(high)
    ends = [start - 1 for start in starts[1:]] + [last]
    return [Stretch(start, end, smaller(start)) for start, end in zip(starts, ends, strict=True)]
