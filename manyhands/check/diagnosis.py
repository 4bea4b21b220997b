"""What is probably wrong where a layout disagrees with one process: the faults everybody makes, by what they leave.

Only a hint; the rows are the finding.
"""

from collections.abc import Iterator, Sequence
from math import isfinite

from manyhands.check.report import Row

_OF = "gradients of "
_NEAR = 1e-3  # of a ratio: far from every other that these faults leave
_FAR = 3.0


def diagnose(rows: Sequence[Row], dp: int, ep: int) -> list[str]:
    """One line for each fault that the failed rows of a layout look like; none where nothing failed."""
    return list(dict.fromkeys(_found([row for row in rows if not row.ok], dp, ep)))


def _found(failed: list[Row], dp: int, ep: int) -> Iterator[str]:
    names = {row.quantity for row in failed}
    first = {row.quantity.removeprefix(_OF): row for row in reversed(failed) if _at_once(row)}
    routers = first.get("routers")
    if "loss" in names:
        yield "the loss differs: a mean of the processes' means is not the mean over all targets"
    elif first.keys() == {"experts"} and (times := _times(first["experts"], dp, ep)):
        yield f"experts' gradients are {times} times one process's: they were summed or divided once too often"
    elif routers and all(_FAR * row.error < routers.error for kind, row in first.items() if kind != "routers"):
        yield "routers' gradients differ most: the weights of a token's experts lost their gradient on the way"
    elif first:
        yield "gradients differ, the loss does not: are they sums, of losses over the global number of targets?"
    if "gradient norm" in names and not first and "loss" not in names:
        yield "the norm alone differs: some elements are counted more than once, or not at all"
    if "counts of experts" in names:
        yield "counts are those of some processes only: sum them before they move a bias or weigh a loss"
    if "alike on every process" in names:
        yield "processes decide from different numbers: sum them over all first"


def _at_once(row: Row) -> bool:
    """Whether these are gradients that differ in the first step, before any weight does."""
    return row.quantity.startswith(_OF) and any(name.endswith(", step 1") for name in row.failing)


def _times(row: Row, dp: int, ep: int) -> str | None:
    sizes = sorted({dp, ep, dp * ep} - {1})
    said = {float(n): str(n) for n in sizes} | {1.0 / n: f"1/{n}" for n in sizes}
    near = (value for value in said if isfinite(row.ratio) and abs(row.ratio - value) < _NEAR * value)
    return said.get(next(near, 0.0))
