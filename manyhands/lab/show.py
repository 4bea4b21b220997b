"""A result as lines for a terminal: what was published, what is different, the arms, the figures, the verdict."""

import textwrap
from collections.abc import Iterator

from manyhands.format import compact, duration, number, table
from manyhands.lab.experiment import Figure
from manyhands.lab.run import Result

_WIDTH = 112
_MARKS = {True: "✓", False: "✗", None: "·"}


def lines(result: Result) -> Iterator[str]:
    """Every line of it."""
    about, outcome = result.description, result.outcome
    yield f"{result.name}: {about.question}"
    yield from _told("published", f"{about.published} ({about.source})")
    yield from _told("here", about.different)
    yield ""
    yield from table(
        ["", "parameters", "active", "FLOPs", ""],
        [[arm.name, *(_count(n) for n in (arm.parameters, arm.active, arm.flops)), arm.note] for arm in outcome.arms],
    )
    yield ""
    yield from figures(result)
    yield ""
    for criterion in outcome.criteria:
        yield f"{_MARKS[criterion.held]} {criterion.text}: {criterion.found}"
    for text in outcome.notes:
        yield from _told("note", text)
    if not result.quiet:
        yield from _told(
            "note", "another program was using the processor: times are a hint, and ratios of them are not judged"
        )
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"
    yield f"{result.verdict}; {seeds}, {duration(result.seconds)}, {result.threads} threads, {result.machine}"


def figures(result: Result) -> Iterator[str]:
    """The figures as a table: mean, range over seeds, what to compare with, what was published."""
    rows, last = [], None
    for figure in result.outcome.figures:
        mean = f"{number(figure.mean, figure.digits)} {figure.unit}".rstrip()
        arm = figure.arm if figure.arm != last else ""
        rows.append([arm, figure.name, mean, spread(figure), figure.beside, figure.published])
        last = figure.arm
    head = ["", "", "mean" if len(result.seeds) > 1 else "", "least – most", "beside", "published"]
    yield from table(head, rows, left=(0, 1, 4))


def spread(figure: Figure) -> str:
    """The range over seeds; nothing where there is one value."""
    low, high = figure.range
    if len(figure.values) < 2:
        return ""
    return f"{number(low, figure.digits)} – {number(high, figure.digits)}"


def _told(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}", _WIDTH, subsequent_indent="  ")


def _count(value: float | None) -> str:
    return "" if value is None else compact(value)
