"""How evenly a run's experts were used, for its page: MaxVio and the balance loss, and each layer's load over time.

A page holds only so much: where a layer has more experts than rows of its picture, neighbours share a row, which is
red if one of them got nothing; where a run has more layers than one looks at, those in trouble are open and the rest
folded away.

n steps   E experts   C columns of the picture   R rows of it
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from manyhands.trace.charts import Line, line_chart
from manyhands.trace.heat import load_chart
from manyhands.trace.journal import LAST_STEPS, last_steps, of_layer
from manyhands.trace.series import Floats, Record, bin_least, bin_mean, column, layer_column, layer_load, smooth

_POINTS = 400  # per line
_LINE_POINTS = 6000  # over all lines of one chart
_CELLS = 100_000  # over all heat maps
MOST_ROWS = 64
"""Of one heat map."""
MOST_OPEN = 8
"""Layers whose load is seen at once, and whose lines have a name."""


@dataclass(frozen=True)
class LayerRow:
    """One MoE layer over the last steps."""

    layer: str
    max_vio: float | None
    worst_max_vio: float | None
    entropy: float | None
    dead: int
    dropped: float | None
    top1_weight: float | None
    load: Markup
    group: int
    """Experts of one row of the picture, at most."""


def balance_charts(steps: Sequence[Record], layers: Sequence[str]) -> dict[str, Markup]:
    """MaxVio of every layer, and the balance loss; empty for a dense run.

    Of many layers the middle and the worst are drawn, and all of them faintly behind.
    """
    if not layers:
        return {}
    x = column(steps, "step")
    points = min(_POINTS, max(60, _LINE_POINTS // len(layers)))
    span = max(len(steps) // 100, min(5, len(steps) // 8))
    lines, many = [], len(layers) > MOST_OPEN
    vio_Ln = np.stack([layer_column(steps, layer, "max_vio") for layer in layers])
    for i, layer in enumerate(layers):
        y = bin_mean(smooth(vio_Ln[i], span), points)
        lines.append(
            Line(f"layer {layer}", bin_mean(x, points), y, by_depth(i, len(layers)), "faint" if many else "line")
        )
    if many:
        known_n = np.isfinite(vio_Ln).any(axis=0)
        for name, of, color in (("worst layer", np.nanmax, "var(--c1)"), ("middle layer", np.nanmedian, "var(--c0)")):
            y_n = np.full(len(steps), np.nan)
            y_n[known_n] = of(vio_Ln[:, known_n], axis=0)
            lines.append(Line(name, bin_mean(x, _POINTS), bin_mean(smooth(y_n, span), _POINTS), color))
    aux = Line("balance loss", bin_mean(x, _POINTS), bin_mean(smooth(column(steps, "aux_loss"), span), _POINTS))
    return {
        "max_vio": line_chart(lines, "MaxVio", y_from_zero=True, spikes_run_off=True, references={"0.5": 0.5}),
        "aux": line_chart([aux], "balance loss f·P", references={"balance": 1.0}),
    }


def by_depth(position: int, count: int) -> str:
    """From blue (first layer) to orange (last), at a lightness that reads on white and on black."""
    share = position / max(count - 1, 1)
    return f"hsl({215 + 175 * share:.0f} 72% 52%)"


def layer_rows(steps: Sequence[Record], layers: Sequence[str]) -> list[LayerRow]:
    """Each layer's figures over the last steps, and its load drawn."""
    rows = []
    for layer in layers:
        here = [step for step in steps if of_layer(step, layer)]
        last = last_steps(here, LAST_STEPS)
        load_nE = layer_load(here, layer)
        final_E = layer_load(last, layer).mean(axis=0)
        num_experts = len(final_E)
        columns = int(np.clip(_CELLS // (min(num_experts, MOST_ROWS) * len(layers)), 24, 160))
        over_CE = bin_mean(load_nE, columns)
        mean_CR, least_CR = bin_mean(over_CE.T, MOST_ROWS).T, bin_least(over_CE.T, MOST_ROWS).T
        span = (float(here[0]["step"]), float(max(here[-1]["step"], here[0]["step"] + 1)))
        vio = layer_column(last, layer, "max_vio")
        rows.append(
            LayerRow(
                layer=layer,
                max_vio=_mean(vio),
                worst_max_vio=float(np.nanmax(vio)) if np.isfinite(vio).any() else None,
                entropy=_mean(layer_column(last, layer, "entropy")),
                dead=int((final_E == 0).sum()),
                dropped=_mean(layer_column(last, layer, "dropped")),
                top1_weight=_mean(layer_column(last, layer, "top1_weight")),
                load=load_chart(
                    np.where(least_CR == 0, 0.0, mean_CR),
                    bin_mean(final_E, MOST_ROWS),
                    num_experts,
                    span,
                    bin_least(final_E, MOST_ROWS) == 0,
                ),
                group=-(-num_experts // min(num_experts, MOST_ROWS)),
            )
        )
    return rows


def in_trouble(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """The layers that are open on the page, in order: all of a few, else those with most dead experts, then MaxVio."""
    worst = sorted(rows, key=lambda row: (-row.dead, -(row.max_vio or 0.0)))[:MOST_OPEN]
    return [row for row in rows if row in worst]


def _mean(values: Floats) -> float | None:
    real = values[np.isfinite(values)]
    return float(real.mean()) if len(real) else None
