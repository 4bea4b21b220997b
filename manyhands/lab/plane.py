"""A picture of a plane: which of a few answers holds where, and points upon it. SVG, in the colours of the page."""

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from manyhands.trace.charts import ticks

_WIDTH, _HEIGHT, _LEFT, _BELOW, _RIGHT = 620, 380, 54, 40, 96
_COLOURS = 6


def plane(
    regions_YX: npt.NDArray[np.int64],
    points: Sequence[tuple[str, npt.NDArray[np.float64]]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    axes: tuple[str, str],
    names: Sequence[str],
) -> str:
    """`regions_YX` [rows from below, columns] says which of `names` holds in each cell; `points` are groups [n, 2] of
    (x, y), each drawn as the letter that names it.
    """
    rows, columns = regions_YX.shape
    right, above = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BELOW - 10

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + right * _share(x, x_range), 10 + above * (1 - _share(y, y_range))

    told = escape(f"{axes[1]} against {axes[0]}: which of {', '.join(names)} answers where")
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}" font-size="11" fill="var(--soft)">']
    parts.append('<g opacity=".22">')  # of all together: neighbours overlap a little, so that no gap shines through
    cell_w, cell_h = right / columns, above / rows
    for row in range(rows):
        start = 0
        for column in range(1, columns + 1):
            if column == columns or regions_YX[row, column] != regions_YX[row, start]:
                x, y = _LEFT + start * cell_w, 10 + above - (row + 1) * cell_h
                fill = f"var(--c{int(regions_YX[row, start]) % _COLOURS})"
                size = f'width="{(column - start) * cell_w:.1f}" height="{cell_h + 0.3:.1f}"'
                parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}"/>')
                start = column
    parts.append("</g>")
    for letter, group_N2 in points:
        for x, y in group_N2:
            px, py = place(float(x), float(y))
            parts.append(
                f'<text x="{px:.1f}" y="{py + 4:.1f}" text-anchor="middle" fill="var(--ink)">{escape(letter)}</text>'
            )
    for x in (x for x in ticks(*x_range, 6) if x_range[0] <= x <= x_range[1]):
        px, _ = place(x, y_range[0])
        parts.append(f'<text x="{px:.1f}" y="{_HEIGHT - _BELOW + 18}" text-anchor="middle">{x:g}</text>')
    for y in (y for y in ticks(*y_range, 6) if y_range[0] <= y <= y_range[1]):
        _, py = place(x_range[0], y)
        parts.append(f'<text x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(f'<text x="{_LEFT + right}" y="{_HEIGHT - 6}" text-anchor="end">{escape(axes[0])}</text>')
    parts.append(f'<text x="{_LEFT + 6}" y="22">{escape(axes[1])}</text>')
    for number, found in enumerate(sorted({int(value) for value in regions_YX.flat})):
        y = 24 + 18 * number
        fill = f"var(--c{found % _COLOURS})"
        parts.append(f'<rect x="{_LEFT + right + 12}" y="{y - 9}" width="11" height="11" fill="{fill}" opacity=".5"/>')
        parts.append(f'<text x="{_LEFT + right + 28}" y="{y + 1}">{escape(names[found])}</text>')
    return "".join([*parts, "</svg>"])


def _share(value: float, of: tuple[float, float]) -> float:
    """How far along the way; in the middle of none."""
    return (value - of[0]) / (of[1] - of[0]) if of[1] > of[0] else 0.5
