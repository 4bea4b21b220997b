"""Results as one HTML file that loads nothing. Its frame is `page.html`."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from manyhands.files import check_place, check_replaceable, write_atomic
from manyhands.format import compact, duration, number
from manyhands.lab.experiment import Chart
from manyhands.lab.run import Result
from manyhands.lab.show import spread
from manyhands.trace.charts import Line, line_chart
from manyhands.version import __version__

_MARK = b'<meta name="generator" content="manyhands lab">'
_COLOURS = 6


def check_page(path: Path) -> None:
    """Raises `UserError` if `path` is a file that this verb did not make, or where no file can be written."""
    check_replaceable(path, _MARK)
    check_place(path)


def write_page(path: Path, results: Sequence[Result]) -> None:
    """Replace `path` by the page of these results."""
    write_atomic(path, render(results))


def render(results: Sequence[Result]) -> str:
    """The page as text."""
    frame = (resources.files("manyhands.lab") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "compact": compact, "duration": duration, "spread": spread}
    shown = [(result, [(chart, draw(chart)) for chart in result.outcome.charts]) for result in results]
    return environment.from_string(frame).render(results=shown, version=__version__, svg=Markup)


def draw(chart: Chart) -> Markup:
    """The curves of a chart; faint ones have the colour of the last one that is not."""
    lines: list[Line] = []
    colour = -1
    for curve in chart.curves:
        colour += not curve.faint
        x, y, shade = np.asarray(curve.x, float), np.asarray(curve.y, float), f"var(--c{max(colour, 0) % _COLOURS})"
        lines.append(Line(curve.name, x, y, shade, "faint" if curve.faint else "line"))
    return line_chart(lines, chart.y_label, chart.x_label, height=260, y_from_zero=chart.y_from_zero)
