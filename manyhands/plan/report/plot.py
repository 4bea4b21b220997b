"""Pictures of a plan: the model among the catalogue's, its cost against context, its speed with experts on disk.

Needs matplotlib, the optional extra `report`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.errors import ConfigError
from manyhands.files import check_replaceable, writing
from manyhands.format import show
from manyhands.plan.compute import forward_flops
from manyhands.plan.count import Counts, count_model
from manyhands.plan.offload import offload_seconds
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import decode_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#30638e", "#5b8c5a")
_QUIET, _INK, _POINT = "#b9bec5", "#2b2d31", "#8d99ae"
_CONTEXTS = [2**n for n in range(10, 18)]
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


_MADE_BY: dict[str, dict[str, str | None]] = {
    "png": {"Software": "manyhands plan"},
    "svg": {"Creator": "manyhands plan", "Date": None},
    "pdf": {"Creator": "manyhands plan"},
}
"""The mark in a plot that this program drew, and may replace."""


_Panel = Callable[["Axes", list[Subject], list[Ask]], Callable[[], None] | None]
"""Draws one; what it gives, if anything, is called when everything has its place."""


def draw(path: Path, subjects: list[Subject], asks: list[Ask]) -> None:
    """Write the picture. Raises `ConfigError` without matplotlib or for a format it does not write."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    check_replaceable(path, b"manyhands plan")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'manyhands[report]'") from None

    panels: list[_Panel] = [_catalogue]
    panels += [_by_context] if all(subject.sizes is not None for subject in subjects) else []
    panels += [_by_hit_rate] if _offloads(subjects, asks) else []
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.6), squeeze=False)
    later = []
    for panel, ax in zip(panels, axes[0], strict=True):
        later.append(panel(ax, subjects, asks))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", colors=_INK, labelsize=9)
        ax.grid(True, which="major", color="#eceef1", linewidth=0.8)
        ax.set_axisbelow(True)
    figure.tight_layout(pad=1.6, w_pad=2.6)
    for write in later:
        if write is not None:
            write()
    kind = path.suffix[1:].lower()
    with writing(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=_MADE_BY[kind])
    pyplot.close(figure)


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
        ax.plot([1e8, 8e12], [1e8 * share, 8e12 * share], color=_QUIET, linewidth=0.8, linestyle=":", zorder=0)
        ax.text(1.5e8 / share, 1.15e8, text, fontsize=7.5, color="#7b828c")
    for subject, colour in zip(subjects, _COLOURS, strict=False):
        ax.scatter([subject.counts.total], [subject.counts.active], s=64, color=colour, zorder=3, label=subject.name)
    ax.set(xscale="log", yscale="log", xlabel="total parameters", ylabel="active per token", xlim=(1e8, 8e12))
    ax.set_ylim(1e8, 1e12)
    ax.set_title("Active against total", fontsize=11, color=_INK, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    return partial(_write_names, ax, named, [(subject.counts.total, subject.counts.active) for subject in subjects])


def _write_names(ax: "Axes", named: list[tuple[str, int, int]], marks: list[tuple[int, int]]) -> None:
    """Each name beside its point, where it covers no other name, nor the legend or one of the `marks`; else nowhere."""
    from matplotlib.transforms import Bbox

    figure = ax.figure
    figure.canvas.draw()  # so that places are known
    legend, frame = ax.get_legend(), ax.get_window_extent()
    taken = [] if legend is None else [legend.get_window_extent()]
    taken += [text.get_window_extent() for text in ax.texts]
    taken += [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in ax.transData.transform(marks)]
    for name, total, active in named:
        for offset, side in (((5, -9), "left"), ((5, 4), "left"), ((-5, 4), "right"), ((-5, -9), "right")):
            text = ax.annotate(
                name, (total, active), offset, textcoords="offset points", fontsize=7.5, color="#7b828c", ha=side
            )
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box.padded(3))
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
    """FLOPs per token."""
    from matplotlib.ticker import LogLocator, NullLocator

    for subject, colour in zip(subjects, _COLOURS, strict=False):
        assert subject.sizes is not None
        contexts = drawn_contexts(subject.sizes.positions)
        forward = [forward_flops(subject.sizes, subject.counts, c) for c in contexts]
        ax.plot(contexts, forward, color=colour, linewidth=2, label=f"{subject.name}, forward")
        if subject.sizes.mla:
            latent = [forward_flops(subject.sizes, subject.counts, c, latent=True) for c in contexts]
            ax.plot(contexts, latent, color=colour, linewidth=1.4, linestyle="--", label=f"{subject.name}, decoding")
    ax.set(xscale="log", yscale="log", xlabel="context, tokens")
    ax.set_xticks(_CONTEXTS[::2], [short(c) for c in _CONTEXTS[::2]])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: show(value, "FLOP"))
    ax.set_title("Arithmetic per token against context", fontsize=11, color=_INK, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def _offloads(subjects: list[Subject], asks: list[Ask]) -> bool:
    known = asks[0].machine is not None and asks[0].disk_rate is not None
    return known and any(s.sizes and s.sizes.num_experts for s in subjects)


def _by_hit_rate(ax: "Axes", subjects: list[Subject], asks: list[Ask]) -> None:
    """Tokens per second of one sequence with experts on disk."""
    hits = [n / 200 for n in range(201)]
    for subject, ask, colour in zip(subjects, asks, _COLOURS, strict=False):
        machine, disk = ask.machine, ask.disk_rate
        if subject.sizes is None or not subject.sizes.num_experts or machine is None or disk is None:
            continue
        step = decode_bytes(subject.sizes, subject.counts, ask.storage, context=ask.context, kv_bits=ask.kv_bits)
        for overlap, style in ((False, "-"), (True, "--")):
            speeds = [1 / offload_seconds(step, h, machine.all_bandwidth, disk, overlap=overlap) for h in hits]
            label = f"{subject.name}, {'all overlapped' if overlap else 'one after the other'}"
            ax.plot(hits, speeds, color=colour, linewidth=2 if not overlap else 1.4, linestyle=style, label=label)
    name = asks[0].machine.name if asks[0].machine is not None else ""
    ax.set_title(f"Tokens per second with experts on disk, {name}", fontsize=11, color=_INK, loc="left")
    ax.set(yscale="log", xlabel="hit rate of the expert cache", xlim=(0, 1.01))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
