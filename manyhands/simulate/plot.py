"""A simulation as a picture: hits and tokens per second against the budget. Needs matplotlib, the extra `report`."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.format import compact, show
from manyhands.plan.report import canvas
from manyhands.simulate.report import Report
from manyhands.simulate.sweep import Row, speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARK = "manyhands simulate"
_COLOURS = {"belady": "#6b7280", "lfu": "#d55e00", "lru": "#0072b2", "pinned": "#009e73"}
_MARKERS = {"belady": ("D", 3), "lfu": ("o", 8), "lru": ("s", 6.5), "pinned": ("^", 5)}
"""Of falling size, so that policies that do equally well are seen."""
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def check_plot(path: Path) -> None:
    """Raises `ConfigError` for a format that is not drawn, without matplotlib, and over somebody else's file."""
    canvas.check_plot(path, _MARK)


def draw(path: Path, report: Report) -> None:
    """Write the picture. Raises what `check_plot` does, and `StorageError`."""
    check_plot(path)
    drawn = [_hits, *([_speeds] if report.settings.disks else []), _union]
    figure, axes = canvas.panels(len(drawn), 5.2, 4.6)
    for panel, ax in zip(drawn, axes, strict=True):
        panel(ax, report)
        canvas.tidy(ax)
    experts = f"{report.manifest.num_experts_per_tok} of {report.manifest.num_experts} experts per token"
    layers = f"{len(report.manifest.layers)} sparse layer{'s' if len(report.manifest.layers) > 1 else ''}"
    said = f"{report.name}: {layers}, {experts}; {report.replayed_tokens:,} tokens replayed"
    figure.suptitle(said, fontsize=9, color=canvas.SOFT, x=0.01, ha="left")
    figure.tight_layout(pad=1.6, w_pad=2.6)
    canvas.save(figure, path, _MARK)


def _unit(report: Report) -> tuple[float, str]:
    """In which budgets are read best."""
    least = min(row.budget_bytes for row in report.rows)
    return next((size, name) for size, name in _UNITS if least >= size or size == 1)


def _line(
    ax: "Axes", report: Report, name: str, value: Callable[[Row], float], colour: str, **style: object
) -> list[float]:
    rows = sorted((row for row in report.rows if row.policy == name), key=lambda row: row.budget_bytes)
    points = [(row.budget_bytes / _unit(report)[0], value(row)) for row in rows]
    points = [point for point in points if isfinite(point[1])]
    ax.plot([x for x, _ in points], [y for _, y in points], color=colour, **style)  # type: ignore[arg-type]
    return [y for _, y in points]


def _budget_axis(ax: "Axes", report: Report) -> None:
    size, name = _unit(report)
    budgets = sorted({row.budget_bytes / size for row in report.rows})
    cycle = report.cycle_bytes / size
    ax.set_xscale("log")
    ax.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    ax.minorticks_off()
    ax.set_xlabel(f"{name} of experts in memory", fontsize=9, color=canvas.INK)
    if budgets[0] <= cycle <= budgets[-1]:
        ax.axvline(cycle, color=canvas.INK, linewidth=0.8, linestyle=(0, (2, 3)))
        ax.annotate(
            " T: one token's experts",
            (cycle, 0.95),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=canvas.INK,
        )


def _hits(ax: "Axes", report: Report) -> None:
    """Hit rate of each policy."""
    for name in dict.fromkeys(row.policy for row in report.rows):
        dashed = {"linestyle": (0, (5, 2))} if name == "belady" else {}
        marker, size = _MARKERS[name]
        label = "belady (knows the future)" if name == "belady" else name
        _line(
            ax,
            report,
            name,
            lambda row: 100 * row.tally.hit_rate,
            _COLOURS[name],
            label=label,
            marker=marker,
            ms=size,
            markerfacecolor="white" if name != "belady" else _COLOURS[name],
            **dashed,
        )
    _budget_axis(ax, report)
    ax.set_ylim(0, 100)
    ax.set_title("experts found in memory, %", fontsize=10, color=canvas.INK, loc="left")
    ax.legend(frameon=False, fontsize=8, loc="best")


def _speeds(ax: "Axes", report: Report) -> None:
    """Tokens per second of the first policy, for each disk: forecast, and the disk's roofline."""
    name, memory = report.rows[0].policy, report.settings.memory
    values: list[float] = []
    for i, disk in enumerate(report.settings.disks):
        colour = canvas.COLOURS[i % len(canvas.COLOURS)]

        def forecast(row: Row, disk: float = disk) -> float:
            return speed(row.tally, disk, memory, report.dense_bytes).forecast

        def roofline(row: Row, disk: float = disk) -> float:
            return speed(row.tally, disk, memory, report.dense_bytes).roofline

        values += _line(ax, report, name, forecast, colour, label=show(disk, "B/s"), marker="o", ms=4)
        if memory is not None:
            values += _line(ax, report, name, roofline, colour, linestyle=(0, (2, 2)), linewidth=1)
    _budget_axis(ax, report)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: compact(value) if value >= 1000 else f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")
    lines = "; dotted: the disk alone" if memory is not None else ", the disk alone"
    ax.set_title(f"tokens per second, {name}{lines}", fontsize=10, color=canvas.INK, loc="left")
    canvas.legend_above(ax, min(values), max(values))


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
            color=canvas.INK,
        )
    ax.set_xscale("log", base=2)
    batches = [one.batch for one in report.union]
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.set_ylim(0, 1.12)
    ax.set_xlabel("tokens in one forward pass", fontsize=9, color=canvas.INK)
    ax.set_title("experts' bytes per token, against one at a time", fontsize=10, color=canvas.INK, loc="left")
