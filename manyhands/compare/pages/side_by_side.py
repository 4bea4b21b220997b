"""A comparison as one HTML file that loads nothing: differences with their intervals, curves, costs. Its frame is
`page.html`."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from manyhands.compare.comparison import Arm, Comparison
from manyhands.compare.run import BITS, Run
from manyhands.compare.show import HEAD, row, value_of
from manyhands.files import check_place, check_replaceable, write_atomic
from manyhands.trace.charts import Line, line_chart, tick_text, ticks
from manyhands.trace.page import COLOURS, fill
from manyhands.trace.series import Floats, bin_mean, smooth, window

_MARK = b'<meta name="generator" content="manyhands compare">'
_POINTS = 300
_LEAST_VALIDATIONS = 3


def check_page(path: Path) -> None:
    """Raises `UserError` if `path` is a file that this verb did not make, or where no file can be written."""
    check_replaceable(path, _MARK)
    check_place(path)


def write_page(path: Path, found: Comparison) -> None:
    """Replace `path` by the page of this comparison."""
    write_atomic(path, render(found))


def render(found: Comparison) -> str:
    """The page as text."""
    names = sorted({name for arm in found.arms for name in arm.group.fields})
    head, rows = [found.unit if i == 2 else name for i, name in enumerate(HEAD)], [row(arm) for arm in found.arms]
    kept = [i for i in range(len(head)) if any(cells[i] for cells in rows)]
    values = {
        "title": " · ".join(arm.group.label for arm in found.arms[:3]),
        "found": found,
        "head": [head[i] for i in kept],
        "rows": [(_colour(number), [cells[i] for i in kept]) for number, cells in enumerate(rows)],
        "whiskers": _whiskers(found),
        "charts": _charts(found),
        "differs": [(name, [value_of(arm, name) for arm in found.arms]) for name in names],
    }
    return fill("compare", "manyhands.compare.pages", "page.html", values)


def _colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _charts(found: Comparison) -> list[tuple[str, str, Markup]]:
    """Title, a sentence, and the drawing: training and, where runs validated on the way, validation."""
    drawn = []
    seeds = "; dashed: single seeds" if any(len(arm.group.runs) > 1 for arm in found.arms) else ""
    y = "loss, bits per byte" if found.unit == BITS else "loss, nats per target"
    axes = {"tokens": ("tokens", "over tokens"), "elapsed": ("seconds in training steps", "over time")}
    for x, (label, over) in axes.items():
        curves = [[_training(run, x) for run in arm.group.runs] for arm in found.arms]
        about = f"Training text, smoothed{seeds}."
        drawn.append((f"Training loss {over}", about, _drawn(found.arms, curves, y, label)))
    for x, (label, over) in axes.items():
        curves = [[run.validations(x) for run in arm.group.runs] for arm in found.arms]
        if all(len(xs) >= _LEAST_VALIDATIONS for runs in curves for xs, _ in runs):
            about = f"Validation text{seeds}."
            drawn.append((f"Validation loss {over}", about, _drawn(found.arms, curves, y, label)))
    return drawn


def _training(run: Run, x: str) -> tuple[Floats, Floats]:
    xs, ys = run.curve(x)
    return bin_mean(xs, _POINTS), bin_mean(smooth(ys, window(len(ys))), _POINTS)


def _drawn(arms: Sequence[Arm], curves: Sequence[Sequence[tuple[Floats, Floats]]], y: str, x: str) -> Markup:
    lines = []
    for number, (arm, runs) in enumerate(zip(arms, curves, strict=True)):
        runs = [run for run in runs if len(run[0])]
        if len(runs) > 1:
            lines += [Line(arm.group.letter, *run, _colour(number), "faint") for run in runs]
        if runs:
            lines.append(Line(arm.group.label, *_mean(runs), _colour(number)))
    return line_chart(lines, y, x, height=260, spikes_run_off=True)


def _mean(runs: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """The mean curve, where all of them are."""
    if len(runs) == 1:
        return runs[0]
    first, last = max(xs[0] for xs, _ in runs), min(xs[-1] for xs, _ in runs)
    grid = np.linspace(first, max(first, last), max(2, min(len(xs) for xs, _ in runs)))
    return grid, np.mean([np.interp(grid, xs, ys) for xs, ys in runs], axis=0)


def _whiskers(found: Comparison) -> Markup:
    """A row per difference: its interval beside 0. Below 0 is better."""
    shown = [(n, arm, d) for n, arm in enumerate(found.arms) if (d := arm.beside_first) and math.isfinite(d.half)]
    if not shown:
        return Markup("")
    ends = [0.0, *(d.value - d.half for _, _, d in shown), *(d.value + d.half for _, _, d in shown)]
    marks = ticks(min(ends), max(ends), 4)
    low, high = marks[0], marks[-1]

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    grid = Markup("").join(
        Markup('<s class="{}" style="left:{}"></s>').format("zero" if mark == 0 else "", at(mark)) for mark in marks
    )
    lines = [
        Markup(
            '<div class="name">{}</div><div class="track">{}<u style="left:{};width:{:.2f}%;background:{}"></u>'
            '<b style="left:{};background:{}"></b></div>'
        ).format(
            arm.group.label,
            grid,
            at(d.value - d.half),
            200 * d.half / (high - low),
            _colour(n),
            at(d.value),
            _colour(n),
        )
        for n, arm, d in shown
    ]
    scale = Markup("").join(Markup('<i style="left:{}">{}</i>').format(at(mark), tick_text(mark)) for mark in marks)
    lines.append(Markup('<div class="name"></div><div class="track scale">{}</div>').format(scale))
    return Markup('<div class="whiskers">{}</div>').format(Markup("").join(lines))
