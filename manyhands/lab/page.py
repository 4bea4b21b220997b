"""Results as one HTML file that loads nothing. Its frame is `page.html`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from manyhands.files import check_place, check_replaceable, write_atomic
from manyhands.lab.experiment import Chart
from manyhands.lab.run import Result
from manyhands.lab.show import spread
from manyhands.trace.charts import Line, line_chart
from manyhands.trace.page import COLOURS, fill

_MARK = b'<meta name="generator" content="manyhands lab">'


def check_page(path: Path) -> None:
    """Raises `UserError` if `path` is a file that this verb did not make, or where no file can be written."""
    check_replaceable(path, _MARK)
    check_place(path)


def write_page(path: Path, results: Sequence[Result]) -> None:
    """Replace `path` by the page of these results."""
    write_atomic(path, render(results))


def render(results: Sequence[Result]) -> str:
    """The page as text."""
    shown = [(result, [(chart, draw(chart)) for chart in result.outcome.charts]) for result in results]
    return fill("lab", "manyhands.lab", "page.html", {"results": shown, "svg": Markup}, {"spread": spread})


def draw(chart: Chart) -> Markup:
    """The curves of a chart. Faint ones have the colour of the last one that is not: further seeds have its name too,
    and no entry in the legend; a baseline has a name of its own, and one.
    """
    lines: list[Line] = []
    colour = -1
    for curve in chart.curves:
        colour += not curve.faint
        x, y, shade = np.asarray(curve.x, float), np.asarray(curve.y, float), f"var(--c{max(colour, 0) % COLOURS})"
        again = any(curve.name == line.name for line in lines)
        lines.append(Line(curve.name, x, y, shade, "line" if not curve.faint else "faint" if again else "dashed"))
    return line_chart(lines, chart.y_label, chart.x_label, height=260, y_from_zero=chart.y_from_zero)
