"""Pictures of a plan: the model among the catalogue's, its cost against context, its speed with experts on disk.

Needs matplotlib, the optional extra `report`.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.format import compact
from manyhands.plan.compute import forward_flops
from manyhands.plan.count import Counts, count_model
from manyhands.plan.offload import offload_seconds
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.canvas import COLOURS, INK, QUIET, SOFT, check_plot, legend_above, panels, save, tidy
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import decode_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARK = "manyhands plan"
_POINT = "#8d99ae"
_CONTEXTS = [round(2 ** (n / 4)) for n in range(40, 69)]
_MARKED = [2**n for n in range(10, 18)]
_NAMED = (
    "switch-c",
    "kimi-k2",
    "llama-3.1-405b",
    "mixtral-8x7b",
    "qwen3-30b-a3b",
    "gpt-oss-120b",
    "olmoe-1b-7b",
    "glm-4.5",
)


_Panel = Callable[["Axes", list[Subject], list[Ask]], Callable[[], None] | None]
"""Draws one; what it gives, if anything, is called when everything has its place."""


def draw(path: Path, subjects: list[Subject], asks: list[Ask]) -> None:
    """Write the picture. Raises `ConfigError` without matplotlib or for a format it does not write."""
    check_plot(path, _MARK)
    drawn: list[_Panel] = [_catalogue]
    drawn += [_by_context] if any(subject.sizes is not None for subject in subjects) else []
    drawn += [_by_hit_rate] if _offloads(subjects, asks) else []
    figure, axes = panels(len(drawn))
    later = []
    for panel, ax in zip(drawn, axes, strict=True):
        later.append(panel(ax, subjects, asks))
        tidy(ax)
    figure.tight_layout(pad=1.6, w_pad=2.6)
    for write in later:
        if write is not None:
            write()
    save(figure, path, _MARK)


def _colours(subjects: list[Subject]) -> list[tuple[Subject, str]]:
    return [(subject, COLOURS[n % len(COLOURS)]) for n, subject in enumerate(subjects)]


def _catalogue(ax: "Axes", subjects: list[Subject], asks: list[Ask]) -> Callable[[], None]:
    """Active against total parameters."""
    points: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    named = []
    for name, counts, is_sparse in _counted():
        points[is_sparse].append((counts.total, counts.active))
        if name in _NAMED and all(counts.total != subject.counts.total for subject in subjects):
            named.append((name, counts.total, counts.active))
    for is_sparse, found in points.items():
        x, y = [total for total, _ in found], [active for _, active in found]
        face = _POINT if is_sparse else "none"
        ax.scatter(x, y, s=22, facecolors=face, edgecolors=_POINT, label="sparse" if is_sparse else "dense")
    for share, text in ((1, "all"), (0.1, "1/10"), (0.01, "1/100")):
        ax.plot([1e8, 8e12], [1e8 * share, 8e12 * share], color=QUIET, linewidth=0.8, linestyle=":", zorder=0)
        ax.text(1.5e8 / share, 1.15e8, text, fontsize=7.5, color=SOFT)
    for subject, colour in _colours(subjects):
        ax.scatter([subject.counts.total], [subject.counts.active], s=64, color=colour, zorder=3, label=subject.name)
    ax.set(xscale="log", yscale="log", xlabel="total parameters", ylabel="active per token", xlim=(1e8, 8e12))
    ax.set_ylim(1e8, 1e12)
    ax.set_title("Active against total", fontsize=11, color=INK, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    others = [point for found in points.values() for point in found]
    return partial(_write_names, ax, named, [(s.counts.total, s.counts.active) for s in subjects], others)


def _write_names(
    ax: "Axes", named: list[tuple[str, int, int]], marks: list[tuple[int, int]], points: list[tuple[int, int]]
) -> None:
    """Each name beside its point, where it covers no other name, nor the legend or a point; else nowhere."""
    from matplotlib.transforms import Bbox

    figure = ax.figure
    figure.canvas.draw()  # so that places are known
    legend, frame = ax.get_legend(), ax.get_window_extent()
    taken = [] if legend is None else [legend.get_window_extent()]
    taken += [text.get_window_extent() for text in ax.texts]
    taken += [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in ax.transData.transform(marks)]
    taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in ax.transData.transform(points)]
    for name, total, active in named:
        for offset, side in (((5, -9), "left"), ((5, 4), "left"), ((-5, 4), "right"), ((-5, -9), "right")):
            text = ax.annotate(
                name, (total, active), offset, textcoords="offset points", fontsize=7.5, color=SOFT, ha=side
            )
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box.padded(6))
                break
            text.remove()


def _counted() -> list[tuple[str, Counts, bool]]:
    """Of every published system of some size: its name, its counts, whether it is a mixture."""
    from manyhands.catalog import entries
    from manyhands.plan.count_shape import count_shape

    found = []
    for entry in entries():
        if (config := entry.config) is not None:
            found.append((entry.id, count_model(config), entry.mixture is not None))
        elif entry.shape is not None:
            found.append((entry.id, count_shape(entry.shape), entry.mixture is not None))
    return [one for one in found if one[1].total > 1.5e8]


def drawn_contexts(positions: int | None) -> list[int]:
    """Where a curve is computed: as far as the model's context goes, and no further; None: it has no end."""
    if positions is None:
        return _CONTEXTS
    return ([c for c in _CONTEXTS if c < positions] or [max(1, positions // 2)]) + [min(positions, _CONTEXTS[-1])]


def _by_context(ax: "Axes", subjects: list[Subject], asks: list[Ask]) -> None:
    """FLOPs per token, of those whose layers are known."""
    from matplotlib.ticker import NullLocator

    values: list[float] = []
    last = 0
    for subject, colour in _colours(subjects):
        if subject.sizes is None:
            continue
        contexts = drawn_contexts(subject.sizes.positions)
        forward = [forward_flops(subject.sizes, subject.counts, c) for c in contexts]
        ax.plot(contexts, forward, color=colour, linewidth=2, label=subject.name)
        values, last = values + forward, max(last, contexts[-1])
        if subject.sizes.mla:
            latent = [forward_flops(subject.sizes, subject.counts, c, latent=True) for c in contexts]
            ax.plot(contexts, latent, color=colour, linewidth=1.4, linestyle="--")
            values += latent
    ax.set(xscale="log", yscale="log", xlabel="context, tokens")
    marked = [c for c in _MARKED if c <= last] or [last]
    marked = marked[:: 2 if len(marked) > 4 else 1]
    ax.set_xticks(marked, [short(c) for c in marked])
    legend_above(ax, min(values), max(values))
    marks = _round_between(*ax.get_ylim())
    ax.set_yticks(marks, [_flop(mark) for mark in marks])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
    dashed = "\ndashed: decoding from a latent cache" if any(s.sizes and s.sizes.mla for s in subjects) else ""
    ax.set_title(f"Arithmetic per token against context{dashed}", fontsize=11, color=INK, loc="left")


_OPERATIONS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))


def _round_between(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: decades, or more of them where that would be under four."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in (
        (1.0,),
        (1.0, 2.0, 5.0),
        (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
        tuple(n / 10 for n in range(10, 100, 2)),
    ):
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 4:
            break
    return found


def _flop(value: float) -> str:
    """A round number of operations, without digits that say nothing."""
    scale, name = next(unit for unit in _OPERATIONS if value >= unit[0] or unit[0] == 1)
    return f"{value / scale:.3g} {name}FLOP"


def _offloads(subjects: list[Subject], asks: list[Ask]) -> bool:
    known = asks[0].machine is not None and asks[0].disk_rate is not None
    return known and any(s.sizes and s.sizes.num_experts for s in subjects)


def _by_hit_rate(ax: "Axes", subjects: list[Subject], asks: list[Ask]) -> None:
    """Tokens per second of one sequence with experts on disk."""
    from matplotlib.ticker import NullLocator

    hits = [n / 200 for n in range(201)]
    all_speeds: list[float] = []
    for (subject, colour), ask in zip(_colours(subjects), asks, strict=True):
        machine, disk = ask.machine, ask.disk_rate
        if subject.sizes is None or not subject.sizes.num_experts or machine is None or disk is None:
            continue
        step = decode_bytes(subject.sizes, subject.counts, ask.storage, context=ask.context, kv_bits=ask.kv_bits)
        for overlap, style in ((False, "-"), (True, "--")):
            speeds = [1 / offload_seconds(step, h, machine.all_bandwidth, disk, overlap=overlap) for h in hits]
            label = None if overlap else subject.name
            all_speeds += speeds
            ax.plot(hits, speeds, color=colour, linewidth=2 if not overlap else 1.4, linestyle=style, label=label)
    name = asks[0].machine.name if asks[0].machine is not None else ""
    where = "this machine" if name == "here" else name
    ax.set_title(
        f"Tokens per second with experts on disk, {where}\ndashed: reading and computing at once",
        fontsize=11,
        color=INK,
        loc="left",
    )
    ax.set(yscale="log", xlabel="hit rate of the expert cache", xlim=(0, 1.01))
    legend_above(ax, min(all_speeds), max(all_speeds))
    marks = _round_between(*ax.get_ylim())
    ax.set_yticks(marks, [compact(mark) if mark >= 1000 else f"{mark:.3g}" for mark in marks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
