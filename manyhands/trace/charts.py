"""Charts as HTML that opens offline: lines and dots. `heat.py` has expert load.

The drawing stretches with the page, its text does not: shapes are SVG in a 1000 × 1000 box without aspect ratio,
labels are HTML placed in percent. Colours are CSS variables, so one drawing serves light and dark. What the pointer and
the arrow keys show comes from `data-` attributes, which `page.js` reads; a screen reader is told what each line does.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from markupsafe import Markup

from manyhands.format import compact
from manyhands.trace.series import Floats

_LABEL_PIXELS = 15  # least distance between two reference labels
_TOLD = 8  # lines of a chart that a screen reader is told of


@dataclass(frozen=True)
class Line:
    """One series. `dashed` is what others are held against; `faint` stays in the background: no legend, no pointer."""

    name: str
    x: Floats
    y: Floats
    color: str = "var(--c0)"
    style: Literal["line", "dashed", "faint", "dots"] = "line"


def line_chart(
    lines: Sequence[Line],
    y_label: str,
    x_label: str = "optimiser step",
    references: Mapping[str, float] | None = None,
    height: int = 220,
    y_from_zero: bool = False,
    spikes_run_off: bool = False,
) -> Markup:
    """Lines and dots over steps; `references` are labelled horizontal lines. `height` in CSS pixels.

    With `spikes_run_off` the highest 4 % of a line may leave at the top, so that the first steps or one spike do
    not flatten the rest.
    """
    references = references or {}
    shown = [_visible(line) for line in lines if np.isfinite(line.y).any()]
    if not shown:
        return Markup('<p class="none">Nothing recorded.</p>')
    x0, x1 = _x_range(shown)
    y_ticks = ticks(*_y_range(shown, list(references.values()), y_from_zero, spikes_run_off), 5)
    y0, y1 = y_ticks[0], y_ticks[-1]

    def path(line: Line) -> str:
        px, py = (line.x - x0) / (x1 - x0) * 1000, 1000 - (line.y - y0) / (y1 - y0) * 1000
        points = [(x, min(y, 9000.0)) for x, y in zip(px, np.maximum(py, -9000), strict=True)]
        if line.style == "dots":
            return "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in points if math.isfinite(y))
        return _strokes(points)

    whole = all(np.array_equal(line.x, np.rint(line.x)) for line in shown)  # no step 1.5

    def top(y: float) -> float:
        return 100 * (1 - (y - y0) / (y1 - y0))

    marks = [Markup('<path class="grid" d="M0 {0:.1f}H1000"/>').format(10 * top(y)) for y in y_ticks]
    marks += [Markup('<path class="ref" d="M0 {0:.1f}H1000"/>').format(10 * top(y)) for y in references.values()]
    marks += [
        Markup('<path class="{}" style="stroke:{}" d="{}"/>').format(line.style, line.color, path(line))
        for line in shown
        if line.style != "dots"
    ]
    dots = [
        Markup('<path class="dots" style="stroke:{}" d="{}"/>').format(line.color, path(line))
        for line in shown
        if line.style == "dots"
    ]
    labels = [Markup('<i class="y" style="top:{:.2f}%">{}</i>').format(top(y), tick_text(y)) for y in y_ticks]
    labels += [
        Markup('<i class="x" style="left:{:.2f}%">{}</i>').format(100 * (x - x0) / (x1 - x0), tick_text(x))
        for x in ticks(x0, x1, 6)
        if x0 <= x <= x1 and (x == round(x) or not whole)
    ]
    labels += [
        Markup('<i class="reflabel" style="top:{:.2f}%">{}</i>').format(place, name)
        for name, place in _spread({name: top(y) for name, y in references.items()}, 100 * _LABEL_PIXELS / height)
    ]
    named = [line for line in shown if line.style != "faint"]
    hover = [{"name": s.name, "x": short(s.x), "y": short(s.y)} for s in named]
    legend = Markup("").join(
        Markup('<span><b class="{}" style="background:{}"></b>{}</span>').format(s.style, s.color, s.name)
        for s in named
    )
    return Markup(
        '<div class="chart"><div class="top"><span class="ylabel">{}</span><span class="legend">{}</span></div>'
        '<div class="plot{}" style="height:{}px;--left:{}ch" role="img" aria-label="{}" '
        'data-x="{}" data-range="{}" data-hover="{}">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
        '<svg class="above" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{}</svg>{}</div>'
        '<div class="xlabel">{}</div></div>'
    ).format(
        y_label,
        legend if len(named) > 1 else "",
        " refs" if references else "",
        height,
        max(len(tick_text(y)) for y in y_ticks),
        _told(named or shown, y_label, x_label),
        x_label,
        json.dumps([x0, x1]),
        json.dumps(hover, separators=(",", ":")),
        Markup("").join(marks),
        Markup("").join(dots),
        Markup("").join(labels),
        x_label,
    )


def _visible(line: Line) -> Line:
    """One point makes no line, and is drawn as a dot."""
    alone = line.style == "line" and np.isfinite(line.y).sum() == 1
    return replace(line, style="dots") if alone else line


def _strokes(points: Sequence[tuple[float, float]]) -> str:
    """A line through the points, with a gap where there is no number."""
    path, gap = "", True
    for x, y in points:
        if math.isfinite(y):
            path += f"{'M' if gap else 'L'}{x:.1f} {y:.1f}"
        gap = not math.isfinite(y)
    return path


def _told(lines: Sequence[Line], y_label: str, x_label: str) -> str:
    """A chart in words: of each line where it begins and ends, and its least and most."""
    parts = []
    for line in lines[:_TOLD]:
        y = line.y[np.isfinite(line.y)]
        ends = (
            f"{y[0]:.4g}" if len(y) == 1 else f"from {y[0]:.4g} to {y[-1]:.4g}, least {y.min():.4g}, most {y.max():.4g}"
        )
        parts.append(f"{line.name}: {ends}")
    if len(lines) > _TOLD:
        parts.append(f"and {len(lines) - _TOLD} more lines")
    return f"{y_label} over {x_label}. " + "; ".join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round numbers that cover [low, high]; the first is <= low, the last >= high."""
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high)):  # equal but for rounding
        span = abs(low) or 1.0
    size = 10.0 ** math.floor(math.log10(span / about))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m * about >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(12, 3 - math.floor(math.log10(step)))  # of a span of 1e-14 too
    return [round(i * step, digits) for i in range(first, max(last, first + 1) + 1)]


def tick_text(value: float) -> str:
    """A round number as an axis label."""
    return compact(value) if abs(value) >= 10_000 else f"{value:g}"


def _x_range(lines: Sequence[Line]) -> tuple[float, float]:
    low = min(float(line.x.min()) for line in lines)
    high = max(float(line.x.max()) for line in lines)
    if low < 0.05 * high:
        low = 0.0
    return low, high if high > low else low + 1


def _y_range(
    lines: Sequence[Line], references: list[float], from_zero: bool, spikes_run_off: bool
) -> tuple[float, float]:
    low, high = [*references], [*references]
    for line in lines:
        real = line.y[np.isfinite(line.y)]
        low.append(float(real.min()))
        high.append(float(np.quantile(real, 0.96) if spikes_run_off else real.max()))
    return min(0.0, *low) if from_zero else min(low), max(high)


def _spread(places: Mapping[str, float], least: float) -> list[tuple[str, float]]:
    """Labels from top to bottom, pushed down where two would overlap."""
    out: list[tuple[str, float]] = []
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        out.append((name, max(place, out[-1][1] + least) if out else place))
    return out


def short(values: Floats) -> list[float | None]:
    """For JSON in a page: four digits, None for what is no number."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
