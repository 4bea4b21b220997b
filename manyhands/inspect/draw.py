"""Pictures of the page: figures with their intervals on one scale, tables as heat maps, tokens coloured by expert."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from manyhands.format import number
from manyhands.inspect.observed import Floats
from manyhands.inspect.resample import Figure
from manyhands.trace.charts import tick_text, ticks
from manyhands.trace.heat import png

_OCTAVES = 3
"""A heat map goes from an eighth of what is expected to eight times as much."""


def intervals(
    rows: Sequence[tuple[str, Figure]], unit: str = "", show_shuffled: bool = True, most: float | None = None
) -> Markup:
    """A row per figure: the model's value and interval, the random routers', the shuffled null, and the numbers."""
    shown = [(name, figure) for name, figure in rows if math.isfinite(figure.value)]
    if not shown:
        return Markup('<p class="none">Nothing to measure.</p>')
    ends = [0.0] + [
        end
        for _, figure in shown
        for end in (figure.value, figure.high, figure.random_high, figure.shuffled if show_shuffled else math.nan)
        if math.isfinite(end)
    ]
    least = min(0.0, *(figure.low for _, figure in shown if math.isfinite(figure.low)), 0.0)
    marks = ticks(least, most or max(ends), 5)
    low, high = marks[0], marks[-1]

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    def span(kind: str, low_: float, high_: float) -> Markup:
        if not (math.isfinite(low_) and math.isfinite(high_)):
            return Markup("")
        width = f"{100 * (high_ - low_) / (high - low):.2f}%"
        return Markup('<u class="{}" style="left:{};width:{}"></u>').format(kind, at(low_), width)

    def dot(kind: str, value: float) -> Markup:
        if not math.isfinite(value):
            return Markup("")
        return Markup('<b class="{}" style="left:{}"></b>').format(kind, at(value))

    grid = Markup("").join(Markup('<s style="left:{}"></s>').format(at(mark)) for mark in marks)
    lines = []
    for name, figure in shown:
        track = [grid, span("rand", figure.random_low, figure.random_high), span("own", figure.low, figure.high)]
        track += [dot("shuf", figure.shuffled) if show_shuffled else Markup(""), dot("rand", figure.random)]
        track.append(dot("own", figure.value))
        digits = 3 if high < 1 else 2
        told = Markup("<strong>{}</strong>{}").format(number(figure.value, digits), unit)
        if math.isfinite(figure.low):
            told += Markup(" <small>[{}, {}]</small>").format(number(figure.low, digits), number(figure.high, digits))
        beside = Markup("{}").format(number(figure.random, digits))
        chance = number(figure.shuffled, digits)
        lines.append(
            Markup(
                '<div class="name">{}</div><div class="track">{}</div><div class="num">{}</div>'
                '<div class="num r">{}</div><div class="num s">{}</div>'
            ).format(name, Markup("").join(track), told, beside, chance)
        )
    axis = Markup("").join(Markup('<i style="left:{}">{}</i>').format(at(mark), tick_text(mark)) for mark in marks)
    head = Markup(
        '<div></div><div></div><div class="num h">model</div><div class="num h r">random router</div>'
        '<div class="num h s">shuffled</div>'
    )
    return Markup('<div class="ivs">{}{}<div></div><div class="axis">{}</div></div>').format(
        head, Markup("").join(lines), axis
    )


def heat(lift_RC: Floats, rows: Sequence[str], columns: Sequence[str], label: str) -> Markup:
    """A table of ratios: clear at 1, orange above, blue below, red for 0; NaN is clear."""
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.clip(np.log2(np.maximum(lift_RC, 1e-9)) / _OCTAVES, -1, 1)
    level = np.where(np.isnan(lift_RC), 30, np.where(lift_RC <= 0, 0, np.maximum(1, np.rint(30 + 30 * octaves))))
    every_row, every_column = max(1, math.ceil(len(rows) / 24)), max(1, math.ceil(len(columns) / 12))
    height = max(60, min(420, (18 if len(rows) <= 24 else 4) * len(rows)))
    left = Markup("").join(
        Markup('<i class="y" style="top:{:.2f}%">{}</i>').format(100 * (i + 0.5) / len(rows), rows[i])
        for i in range(0, len(rows), every_row)
    )
    below = Markup("").join(
        Markup('<i class="x" style="left:{:.2f}%">{}</i>').format(100 * (i + 0.5) / len(columns), columns[i])
        for i in range(0, len(columns), every_column)
    )
    return Markup('<div class="map" style="height:{}px"><img alt="{}" src="{}">{}{}</div>').format(
        height, label, png(level.astype(np.uint8)), left, below
    )


def bars(share_E: Floats) -> Markup:
    """Each expert's load as a bar, the fair share as a line."""
    E = len(share_E)
    most = max(2.0, float(share_E.max() * E) * 1.05)
    width = 1000 / E
    paths = {"fair": "", "over": "", "dead": ""}
    for e, share in enumerate(share_E * E):
        kind = "dead" if share == 0 else "over" if share > 1.5 else "fair"
        tall = 14 if share == 0 else 1000 * share / most
        paths[kind] += f"M{width * (e + 0.1):.1f} 1000h{width * 0.8:.1f}v-{tall:.1f}h-{width * 0.8:.1f}z"
    drawn = Markup("").join(Markup('<path class="bar{}" d="{}"/>').format(kind, d) for kind, d in paths.items() if d)
    fair = 1000 * (1 - 1 / most)
    busiest = int(share_E.argmax())
    told = f"load of {E} experts; the busiest is {busiest}, with {share_E[busiest] * E:.2f} times the fair share"
    return Markup(
        '<div class="plot loads" role="img" aria-label="{}"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none">'
        '{}<path class="fairline" d="M0 {:.0f}H1000"/></svg></div>'
    ).format(told, drawn, fair)


def hue(expert: int) -> int:
    """Of an expert's colour: neighbours in number are far apart on the circle."""
    return round(expert * 137.508) % 360
