"""What all plots share: where they may be written, how they look, how they are saved.

Needs matplotlib, the optional extra `report`. Colours are those of Okabe and Ito (2008), which colour-blind readers
tell apart.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.errors import ConfigError
from manyhands.files import check_replaceable, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#a8508a", "#7a6a00", "#56b4e9")
INK, SOFT, QUIET, GRID = "#2b2d31", "#656b74", "#b9bec5", "#eceef1"
_LEGEND = 0.065  # of a panel's height, that one line of a legend takes


def check_plot(path: Path, mark: str) -> None:
    """Raises `ConfigError` for a format that is not drawn and without matplotlib, `UserError` over a file without the
    `mark` of what this program drew.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    check_replaceable(path, mark.encode())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'manyhands[report]'") from None


def panels(count: int, width: float = 5.6, height: float = 4.6, **how: Any) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of panels side by side, each so many inches; a window is never opened."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False, **how)
    return figure, list(axes[0])


def tidy(ax: "Axes") -> None:
    """The look of one panel."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", colors=INK, labelsize=9)
    ax.tick_params(which="minor", pad=5)  # labels of short ticks on the line of the others
    ax.grid(True, which="major", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def legend_above(ax: "Axes", least: float, most: float) -> None:
    """A legend at the upper left of a logarithmic panel of values from `least` to `most`, with room made for it."""
    entries = len(ax.get_legend_handles_labels()[1])
    columns = 1 if entries < 3 else 2
    lines = math.ceil(entries / columns)
    room = min(0.6, _LEGEND * (lines + 0.5))
    span = max(most / least, 1.5)
    ax.set_ylim(least / span**0.06, most * span ** (room / (1 - room)))
    ax.legend(fontsize=8, frameon=False, loc="upper left", ncols=columns)


def save(figure: "Figure", path: Path, mark: str) -> None:
    """Write the figure at once, with the `mark` by which this program knows it again. Raises `StorageError`."""
    from matplotlib import pyplot

    kind = path.suffix[1:].lower()
    made_by: dict[str, str | None] = {"Software" if kind == "png" else "Creator": mark}
    if kind == "svg":
        made_by["Date"] = None
    with writing(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=made_by)
    pyplot.close(figure)
