"""A comparison as lines for a terminal."""

import textwrap
from collections.abc import Iterator

from manyhands.compare.comparison import Arm, Comparison, decimals
from manyhands.compare.groups import shown
from manyhands.compare.interval import mean_and_range
from manyhands.format import NONE, compact, duration, number, show, table
from manyhands.terminal import shown as printable

_WIDTH = 112
HEAD = ("", "seeds", "", "least – most", "beside A", "parameters", "active", "tokens", "time", "memory")


def lines(found: Comparison) -> Iterator[str]:
    """Every line of it."""
    for text in found.verdicts:
        yield from _told(text)
    if found.verdicts:
        yield ""
    yield from table([found.unit if i == 2 else name for i, name in enumerate(HEAD)], [row(arm) for arm in found.arms])
    yield ""
    for arm in found.arms:
        runs = ", ".join(f"{printable(run.name)} (seed {run.seed})" for run in arm.group.runs)
        yield from _told(f"{arm.group.letter}: {runs}")
    names = sorted({name for arm in found.arms for name in arm.group.fields})
    if names:
        yield ""
        fields = [[name, *(value_of(arm, name) for arm in found.arms)] for name in names]
        yield from table(["differs", *(arm.group.letter for arm in found.arms)], fields)
    for text in found.notes:
        yield from _told(f"note: {printable(text)}")


def row(arm: Arm) -> list[str]:
    """One configuration's figures, under `HEAD`."""
    mean, least, most = mean_and_range(arm.figures)
    cost, beside = arm.cost, ""
    if arm.beside_first is not None:
        digits = decimals(arm.beside_first.half)
        beside = f"{arm.beside_first.value:+.{digits}f} ± {number(arm.beside_first.half, digits)}"
    counts = [
        NONE if (n := cost[name]) is None else compact(n) for name in ("parameters", "active_parameters", "tokens")
    ]
    time = NONE if cost["seconds"] is None else duration(cost["seconds"])
    spread = f"{least:.3f} – {most:.3f}" if len(arm.figures) > 1 else ""
    memory = "" if cost["memory_bytes"] is None else show(cost["memory_bytes"], "B")
    return [printable(arm.group.label), str(len(arm.figures)), f"{mean:.3f}", spread, beside, *counts, time, memory]


def value_of(arm: Arm, name: str) -> str:
    """A field's value, or a dash where this configuration has no such field."""
    return printable(shown(arm.group.fields[name])) if name in arm.group.fields else NONE


def _told(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
