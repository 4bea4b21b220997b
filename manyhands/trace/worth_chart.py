"""What experts are worth, drawn: a bar for each expert's cost, its error, and what its share of pairs costs at random.

All layers of a run have one scale, so that they compare. E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from manyhands.trace.balance_charts import by_depth
from manyhands.trace.charts import Line, line_chart, tick_text, ticks
from manyhands.trace.series import Record, column

_MOST_EXPERTS = 64
"""Bars of one layer: the dearest and the cheapest where there are more."""
_CLOSE = 0.1
"""A distance between two experts' outputs below it is said."""


@dataclass(frozen=True)
class WorthLayer:
    """One sparse layer in the report."""

    layer: str
    chart: Markup
    shuffled: float | None
    random_router: float | None
    nothing: int
    """Experts whose cost is not above twice its error."""
    num_experts: int
    alike: list[tuple[int, int, float]]
    """Pairs of experts that say nearly the same, and how far they are from each other."""
    silent: list[int]
    """Experts that say nothing."""


def worth_layers(record: Record | None) -> list[WorthLayer]:
    """A `worth` record as pictures; none without one, or without a number that could be drawn."""
    layers: dict[str, Record] = (record or {}).get("layers") or {}
    reach = [
        bound
        for of in layers.values()
        for cost, error in _pairs(of)
        for bound in (cost - 2 * error, cost + 2 * error)
        if math.isfinite(bound)
    ]
    if not reach or max(reach) <= min(reach):
        return []
    marks = ticks(min(0.0, *reach), max(0.0, *reach), 5)
    return [_layer(name, layers[name], marks) for name in sorted(layers, key=int)]


def worth_over_time(records: Sequence[Record]) -> Markup | None:
    """What the layers' routing is worth (the cost of shuffled tokens) as training went on; None for one record."""
    worths = [record for record in records if record["kind"] == "worth" and record.get("layers")]
    if len(worths) < 2:
        return None
    x, names = column(worths, "step"), sorted({name for record in worths for name in record["layers"]}, key=int)
    lines = []
    for place, name in enumerate(names):
        y = column([{"y": record["layers"].get(name, {}).get("shuffled")} for record in worths], "y")
        lines.append(Line(f"layer {name}", x, y, by_depth(place, len(names))))
    return line_chart(lines, "bits per byte lost with the experts of other tokens", y_from_zero=True)


def _pairs(of: Record) -> list[tuple[float, float]]:
    return [
        (float("nan") if cost is None else cost, error or 0.0)
        for cost, error in zip(of["cost"], of["error"], strict=True)
    ]


def _layer(name: str, of: Record, marks: list[float]) -> WorthLayer:
    pairs, E = _pairs(of), len(of["cost"])
    twins = zip(of.get("twin") or [], of.get("distance") or [], strict=True)
    alike = {
        (min(e, twin), max(e, twin)): distance
        for e, (twin, distance) in enumerate(twins)
        if twin is not None and distance is not None and distance < _CLOSE
    }
    return WorthLayer(
        name,
        _bars(of, pairs, marks),
        of.get("shuffled"),
        of.get("random_router"),
        sum(not cost > 2 * error for cost, error in pairs),
        E,
        [(a, b, distance) for (a, b), distance in sorted(alike.items())],
        [e for e, size in enumerate(of.get("size") or []) if size == 0.0],
    )


def _bars(of: Record, pairs: list[tuple[float, float]], marks: list[float]) -> Markup:
    low, high = marks[0], marks[-1]
    order = sorted(range(len(pairs)), key=lambda e: (-pairs[e][0] if math.isfinite(pairs[e][0]) else math.inf, e))
    if len(order) > _MOST_EXPERTS:
        order = order[: _MOST_EXPERTS // 2] + order[-_MOST_EXPERTS // 2 :]
    row, E, height = 1000 / len(order), len(pairs), min(560, max(72, 14 * len(order)))

    def x(value: float) -> float:
        return 1000 * (value - low) / (high - low)

    kinds = {"barfair": "", "barunknown": "", "bardead": "", "whisker": "", "null": ""}
    labels = []
    for place, e in enumerate(order):
        cost, error = pairs[e]
        labels.append(Markup('<i class="y" style="top:{:.2f}%">{}</i>').format((place + 0.5) * row / 10, e))
        if not math.isfinite(cost):
            continue
        top, left, right = row * (place + 0.15), x(min(0.0, cost)), x(max(0.0, cost))
        silent = bool(of.get("size")) and of["size"][e] == 0.0
        kind = "bardead" if silent or cost < -2 * error else "barfair" if cost > 2 * error else "barunknown"
        kinds[kind] += f"M{left:.1f} {top:.1f}H{right:.1f}v{row * 0.7:.1f}H{left:.1f}z"
        kinds["whisker"] += f"M{x(cost - 2 * error):.1f} {row * (place + 0.5):.1f}H{x(cost + 2 * error):.1f}"
        if of.get("null") is not None:
            kinds["null"] += f"M{x(min(high, max(low, of['null'] * E * of['share'][e]))):.1f} {top:.1f}v{row * 0.7:.1f}"
    labels += [
        Markup('<i class="x" style="left:{:.2f}%">{}</i>').format(x(mark) / 10, tick_text(mark)) for mark in marks
    ]
    first = f"dearest: {', '.join(f'expert {e} costs {pairs[e][0]:.4g}' for e in order[:5])}"
    told = f"bits per byte lost without each of {E} experts; the {first}"
    grid = "".join(f"M{x(mark):.1f} 0V1000" for mark in marks)
    drawn = Markup("").join(Markup('<path class="{}" d="{}"/>').format(kind, d) for kind, d in kinds.items() if d)
    return Markup(
        '<div class="chart worth"><div class="ylabel">expert, the dearest first</div><div class="plot" '
        'style="height:{}px" role="img" aria-label="{}">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="grid" d="{}"/>{}<path class="fairline" d="M{:.1f} 0V1000"/></svg>{}</div>'
        '<div class="xlabel">bits per byte lost without it</div></div>'
    ).format(height, told, grid, drawn, x(0.0), Markup("").join(labels))
