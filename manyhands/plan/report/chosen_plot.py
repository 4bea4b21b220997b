"""A picture of a choice: how large each model is against how fast it can be, by where its experts lie.

Needs matplotlib, the optional extra `report`.
"""

from pathlib import Path

from manyhands.errors import ConfigError
from manyhands.files import check_replaceable, writing
from manyhands.format import compact
from manyhands.plan.choose import Chosen
from manyhands.plan.report.chosen import TITLES, Shown, format_of, machine_of
from manyhands.plan.report.plot import FORMATS
from manyhands.plan.tiers import LAYOUTS
from manyhands.plan.wish import Wish

_COLOURS = {"memory": "#00798c", "host": "#edae49", "disk": "#d1495b"}
_INK, _QUIET = "#2b2d31", "#b9bec5"
_MARK = "manyhands choose"
_MADE_BY: dict[str, dict[str, str | None]] = {
    "png": {"Software": _MARK},
    "svg": {"Creator": _MARK, "Date": None},
    "pdf": {"Creator": _MARK},
}


def check_plot(path: Path) -> None:
    """Raises `ConfigError` for a format that is not written, without matplotlib, and as `check_replaceable` does."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    check_replaceable(path, _MARK.encode())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'manyhands[report]'") from None


def draw_choice(path: Path, chosen: Chosen, rows: list[Shown], wish: Wish) -> None:
    """Write the picture: what is shown with its number and name, all other offers as rings.

    Raises `ConfigError` as `check_plot` does, and where there is nothing to draw.
    """
    check_plot(path)
    if not rows:
        raise ConfigError(f"--plot {path}: nothing keeps what was asked, so there is nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 5.2 + 0.16 * max(0, len(rows) - 12)
    figure, (ax, key) = pyplot.subplots(1, 2, figsize=(10.4, size), width_ratios=(5, 3))
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
    for row in rows:
        place = (row.offer.speed, row.offer.case.subject.counts.total)
        ax.annotate(f"{row.number}", place, ha="center", va="center", fontsize=7.5, color="white", weight="bold")
    if wish.speed > 1:
        ax.axvline(wish.speed, color=_QUIET, linewidth=1, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="tokens per second of each user, at most", ylabel="parameters")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: compact(value))
        axis.set_minor_formatter(lambda value, _: compact(value) if f"{value:.0e}"[0] in "25" else "")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", colors=_INK, labelsize=8)
    ax.grid(True, which="major", color="#eceef1", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(0.12)
    ax.set_title("What keeps the wish: size against speed", fontsize=11, color=_INK, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="best", markerscale=0.6)
    key.set_axis_off()
    several = len({row.offer.place.machine.name for row in rows}) > 1
    for line, row in enumerate(rows):
        where = f", {machine_of(row.offer)}" if several else ""
        text = f"{row.number:>2}  {row.offer.case.id} {format_of(row.offer)}{where}"
        colour = _COLOURS[row.offer.tiers.layout]
        key.text(0, 1 - (line + 0.5) / max(len(rows), 16), text, fontsize=8, color=colour, va="center")
    figure.tight_layout(pad=1.6)
    kind = path.suffix[1:].lower()
    with writing(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=_MADE_BY[kind])
    pyplot.close(figure)
