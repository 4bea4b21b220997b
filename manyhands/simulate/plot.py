"""A simulation as a picture: hits and tokens per second against the budget. Needs matplotlib, the extra `report`."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.errors import ConfigError
from manyhands.files import check_replaceable, writing
from manyhands.format import show
from manyhands.simulate.report import Report
from manyhands.simulate.sweep import Row, speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".png", ".svg", ".pdf")
_MARK = "manyhands simulate"
_MADE_BY: dict[str, dict[str, str | None]] = {
    "png": {"Software": _MARK},
    "svg": {"Creator": _MARK, "Date": None},
    "pdf": {"Creator": _MARK},
}
"""The mark in a picture that this program drew, and may replace."""
_COLOURS = {"belady": "#8d99ae", "lfu": "#d1495b", "lru": "#00798c", "pinned": "#edae49"}
_DISKS = ("#2e4057", "#66a182", "#c97b2b", "#7a5195")
_INK, _GRID = "#2b2d31", "#eceef1"


def check_plot(path: Path) -> None:
    """Raises `ConfigError` for a format that is not drawn, without matplotlib, and over somebody else's file."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(_FORMATS)}")
    check_replaceable(path, _MARK.encode())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'manyhands[report]'") from None


def draw(path: Path, report: Report) -> None:
    """Write the picture. Raises what `check_plot` does, and `StorageError`."""
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [_hits, *([_speeds] if report.settings.disks else []), _union]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        panel(ax, report)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", colors=_INK, labelsize=9)
        ax.grid(True, which="major", color=_GRID, linewidth=0.8)
        ax.set_axisbelow(True)
    figure.tight_layout(pad=1.6, w_pad=2.6)
    kind = path.suffix[1:].lower()
    with writing(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=_MADE_BY[kind])
    pyplot.close(figure)


def _line(ax: "Axes", report: Report, name: str, value: Callable[[Row], float], colour: str, **style: object) -> None:
    rows = sorted((row for row in report.rows if row.policy == name), key=lambda row: row.budget_bytes)
    points = [(row.budget_bytes / 1e9, value(row)) for row in rows]
    points = [point for point in points if isfinite(point[1])]
    ax.plot([x for x, _ in points], [y for _, y in points], color=colour, **style)  # type: ignore[arg-type]


def _budget_axis(ax: "Axes", report: Report) -> None:
    budgets = sorted({row.budget_bytes / 1e9 for row in report.rows})
    ax.set_xscale("log")
    ax.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    ax.minorticks_off()
    ax.set_xlabel("GB of experts in memory", fontsize=9, color=_INK)
    if budgets[0] <= report.cycle_bytes / 1e9 <= budgets[-1]:
        ax.axvline(report.cycle_bytes / 1e9, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
        ax.annotate(
            " T: one token's experts",
            (report.cycle_bytes / 1e9, 0.95),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=_INK,
        )


def _hits(ax: "Axes", report: Report) -> None:
    """Hit rate of each policy."""
    for name in dict.fromkeys(row.policy for row in report.rows):
        dashed = {"linestyle": (0, (5, 2))} if name == "belady" else {}
        label = "belady (knows the future)" if name == "belady" else name
        _line(
            ax,
            report,
            name,
            lambda row: 100 * row.tally.hit_rate,
            _COLOURS[name],
            label=label,
            marker="o",
            ms=4,
            **dashed,
        )
    _budget_axis(ax, report)
    ax.set_ylim(0, 100)
    ax.set_title("experts found in memory, %", fontsize=10, color=_INK, loc="left")
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def _speeds(ax: "Axes", report: Report) -> None:
    """Tokens per second of the first policy, for each disk: forecast, and the disk's roofline."""
    name, memory = report.rows[0].policy, report.settings.memory
    for i, disk in enumerate(report.settings.disks):
        colour = _DISKS[i % len(_DISKS)]

        def at(row: Row, disk: float = disk) -> tuple[float, float]:
            found = speed(row.tally, disk, memory, report.dense_bytes)
            return found.forecast, found.roofline

        _line(ax, report, name, lambda row, at=at: at(row)[0], colour, label=show(disk, "B/s"), marker="o", ms=4)  # type: ignore[misc]
        if memory is not None:
            _line(ax, report, name, lambda row, at=at: at(row)[1], colour, linestyle=(0, (2, 2)), linewidth=1)  # type: ignore[misc]
    _budget_axis(ax, report)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lines = "; dotted: the disk alone" if memory is not None else ", the disk alone"
    ax.set_title(f"tokens per second, {name}{lines}", fontsize=10, color=_INK, loc="left")
    ax.legend(frameon=False, fontsize=8, loc="upper left", title="disk", title_fontsize=8)


def _union(ax: "Axes", report: Report) -> None:
    """Bytes of experts per token when several tokens share a pass."""
    ax.plot(
        [one.batch for one in report.union],
        [one.bytes_per_token for one in report.union],
        color=_COLOURS["lfu"],
        marker="o",
        ms=4,
    )
    for one in report.union:
        ax.annotate(
            f"{one.bytes_per_token:.2f}",
            (one.batch, one.bytes_per_token),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    ax.set_xscale("log", base=2)
    batches = [one.batch for one in report.union]
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.set_ylim(0, 1.12)
    ax.set_xlabel("tokens in one forward pass", fontsize=9, color=_INK)
    ax.set_title("experts' bytes per token, against one at a time", fontsize=10, color=_INK, loc="left")
