"""How many times sooner one of two models was at the other's loss: as figures, and as a curve."""

from collections.abc import Sequence

from manyhands.lab.curves import Ratio
from manyhands.lab.experiment import Chart, Curve, Figure

PARTS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Where in the slower run the ratio is printed."""


def at(found: Sequence[Ratio], step: float) -> Ratio:
    """The last ratio at or before this step of the slower run; the first if all are later."""
    return [ratio for ratio in found if ratio.slow_step <= step or ratio is found[0]][-1]


def ratio_figures(found: Sequence[Sequence[Ratio]], steps: int, slow: str) -> list[Figure]:
    """By steps and by clock at each of `PARTS`, one value per seed; `slow` is what the slower run is called."""
    shown = []
    for part in PARTS:
        there = [at(one, part * steps) for one in found]
        where = f"at the {slow} loss of step {round(part * steps)}"
        shown.append(Figure(f"{where}: by steps", "ratio", tuple(r.by_steps for r in there), "×", 2))
        shown.append(Figure(f"{where}: by clock", "ratio", tuple(r.by_clock for r in there), "×", 2))
    return shown


def ratio_chart(found: Sequence[Sequence[Ratio]], slow: str, of: str) -> Chart:
    """The ratio against the loss that is asked for. `of`: what a loss is per."""
    return Chart(
        "How many times sooner",
        f"loss of the {slow} model, nats/{of}",
        "ratio",
        tuple(
            Curve(name, [-r.loss for r in one], [getattr(r, field) for r in one], faint=number > 0)
            for number, one in enumerate(found)
            for name, field in (("by steps", "by_steps"), ("by clock", "by_clock"))
        ),
        "Losses have a minus, so that better is to the right. The ratio has no single value: it grows with the quality "
        "that is asked for.",
    )
