"""A picture of a choice: how large each model is against how fast it can be, by where its experts lie.

Needs matplotlib, the optional extra `report`.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.errors import ConfigError
from manyhands.format import compact
from manyhands.plan.choose import Chosen
from manyhands.plan.report import canvas
from manyhands.plan.report.ask import short
from manyhands.plan.report.chosen import TITLES, Shown, format_of, machine_of
from manyhands.plan.tiers import LAYOUTS
from manyhands.plan.wish import Wish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"memory": "#0072b2", "host": "#009e73", "disk": "#d55e00"}
_MARK = "manyhands choose"
_APART = 15  # points between two numbers


def check_plot(path: Path) -> None:
    """Raises `ConfigError` and `UserError` as `canvas.check_plot` does."""
    canvas.check_plot(path, _MARK)


def draw_choice(path: Path, chosen: Chosen, rows: list[Shown], wish: Wish) -> None:
    """Write the picture: what is shown with its number and name, all other offers as rings.

    Raises `ConfigError` without matplotlib, for a format it does not write, and where there is nothing to draw.
    """
    check_plot(path)
    if not rows:
        raise ConfigError(f"--plot {path}: nothing keeps what was asked, so there is nothing to draw")
    size = 5.2 + 0.16 * max(0, len(rows) - 12)
    figure, (ax, key) = canvas.panels(2, 5.2, size, width_ratios=(5, 3))
    number = {id(row.offer): row.number for row in rows}
    for layout in LAYOUTS:
        found = [made for made in chosen.offers if made.tiers.layout == layout]
        for shown in (False, True):
            some = [made for made in found if (id(made) in number) == shown]
            if some:
                ax.scatter(
                    [made.speed for made in some],
                    [made.case.subject.counts.total for made in some],
                    s=110 if shown else 26,
                    facecolors=_COLOURS[layout] if shown else "none",
                    edgecolors=_COLOURS[layout],
                    alpha=0.9,
                    label=TITLES[layout] if shown else None,
                )
    if wish.speed > 1:
        ax.axvline(wish.speed, color=canvas.QUIET, linewidth=1, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="tokens per second of each user, at most", ylabel="parameters")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: compact(value))
        axis.set_minor_formatter(lambda value, _: compact(value) if f"{value:.0e}"[0] in "25" else "")
    canvas.tidy(ax)
    ax.margins(0.12)
    machines = list(dict.fromkeys(machine_of(row.offer) for row in rows))
    where = rows[0].offer.place.machine.title.partition(";")[0] if len(machines) == 1 else f"{len(machines)} machines"
    asked = f"{where}; context {short(wish.context)}" + (f"; {wish.users} at once" if wish.users > 1 else "")
    ax.set_title(f"What keeps the wish: size against speed\n{asked}", fontsize=10, color=canvas.INK, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="best", markerscale=0.6)
    key.set_axis_off()
    for line, row in enumerate(rows):
        of = f", {machine_of(row.offer)}" if len(machines) > 1 else ""
        y = 1 - (line + 0.5) / max(len(rows), 16)
        colour = _COLOURS[row.offer.tiers.layout]
        key.text(0.06, y, f"{row.number}", fontsize=8, weight="bold", color=colour, va="center", ha="right")
        text = f"{row.offer.case.id} {format_of(row.offer)}{of}"
        key.text(0.09, y, text, fontsize=8, color=canvas.INK, va="center")
    figure.tight_layout(pad=1.6)
    _number(ax, rows)
    canvas.save(figure, path, _MARK)


def _number(ax: "Axes", rows: list[Shown]) -> None:
    """Each row's number on its point, or beside it, with a line to it, where another number is too near."""
    ax.figure.canvas.draw()  # so that places are known
    points = [(row.offer.speed, row.offer.case.subject.counts.total) for row in rows]
    pixels = ax.figure.dpi / 72
    at = ax.transData.transform(points) / pixels
    taken: list[tuple[float, float]] = []
    for row, point, (x, y) in zip(rows, points, at, strict=True):
        turns = [(0.0, 0.0)]
        turns += [(r * math.cos(a), r * math.sin(a)) for r in (18, 27) for a in (math.pi * n / 4 for n in range(8))]
        others = taken + [tuple(other) for other in at if (other[0], other[1]) != (x, y)]

        def free(turn: tuple[float, float], x: float = x, y: float = y, others: Any = others) -> bool:
            near = taken if turn == (0.0, 0.0) else others
            return all(math.hypot(x + turn[0] - u, y + turn[1] - v) >= _APART for u, v in near)

        turn = next(filter(free, turns), turns[0])
        taken.append((x + turn[0], y + turn[1]))
        aside = turn != (0.0, 0.0)
        ax.annotate(
            f"{row.number}",
            point,
            xytext=turn,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=_COLOURS[row.offer.tiers.layout] if aside else "white",
            weight="bold",
            arrowprops={"arrowstyle": "-", "color": canvas.SOFT, "linewidth": 0.6, "shrinkB": 4} if aside else None,
        )
