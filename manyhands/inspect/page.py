"""The page: findings of `findings.measure` as one HTML file that loads nothing. Its frame is `page.html`.

Titles say what was found, from the figures: a measure counts as more than a random router's when the interval of the
model lies above all of theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from manyhands.inspect import titles
from manyhands.inspect.draw import bars, heat, hue, intervals
from manyhands.inspect.observed import Observed
from manyhands.trace.charts import Line, line_chart
from manyhands.trace.page import fill
from manyhands.trace.tokens import TokenShare
from manyhands.trace.visible import LayerExperts, visible, what_experts_take

_MOST_MAPS = 6
_READ_TOKENS = 240
_MOST_TAKEN_LAYERS = 3

Spell = Callable[[int], str]


def render(name: str, seen: Observed, found: Mapping[str, Any], spell: Spell | None) -> str:
    """The page as text. `name` is the subject's; `spell` gives the text of a token id, if there is a tokenizer."""
    layers = found["layers"]
    shown = _spread(len(layers), _MOST_MAPS)
    E = found["num_experts"]
    experts = [str(e) for e in range(E)]
    values = {
        "name": name,
        "found": found,
        "aligned": seen.about.get("aligned"),
        "titles": titles.of(found),
        "tiles": titles.tiles(found),
        "load": [(each["layer"], bars(each["load"]["share"]), each["load"]) for each in layers],
        "vocabulary": _rows(layers, "vocabulary", "share"),
        "vocabulary_bits": _rows(layers, "vocabulary", "bits", False),
        "syntax": _rows(layers, "syntax", "bits", False),
        "syntax_given": _rows(layers, "syntax", "bits_given_token", False),
        "syntax_maps": [_syntax_map(layers[i], seen.tags, experts) for i in shown if "syntax" in layers[i]],
        "domains": _rows(layers, "domains", "bits", False),
        "windows": _rows(layers, "domains", "window"),
        "domain_maps": [_domain_map(layers[i], seen.domains, experts, found) for i in shown if "domains" in layers[i]],
        "predicted": _predicted(layers),
        "over_time": _over_time(layers, shown),
        "pairs": [
            (layers[i]["layer"], heat(layers[i]["coactivation"]["lift"], experts, experts, "pairs"), layers[i])
            for i in shown
        ],
        "saturation": _saturation(found),
        "against": _against(found),
        "least": _least(found, spell),
        "read": _read(seen, spell) if spell else [],
        "taken": _taken(seen, spell),
        "hues": [hue(e) for e in range(E)],
        "layer_numbers": list(seen.layers),
    }
    return fill("inspect", "manyhands.inspect", "page.html", values)


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` places: the first, the last and some between."""
    return sorted({round(i * (count - 1) / max(1, min(most, count) - 1)) for i in range(min(most, count))})


def _rows(layers: Sequence[Mapping[str, Any]], kind: str, what: str, shuffled: bool = True) -> Markup | None:
    rows = [(f"layer {each['layer']}", each[kind][what]) for each in layers if what in each.get(kind, {})]
    return intervals(rows, show_shuffled=shuffled) if rows else None


def _syntax_map(layer: Mapping[str, Any], tags: Sequence[str], experts: Sequence[str]) -> tuple[int, Markup, Any]:
    found = layer["syntax"]
    rows = [g for g in np.argsort(-found["tokens"]) if found["tokens"][g] >= 50]
    with np.errstate(divide="ignore", invalid="ignore"):
        enough = found["tokens"][rows][:, None] * found["load"] >= 5
        lift = np.where(enough, found["share"][rows] / found["load"], np.nan)
    return layer["layer"], heat(lift, [tags[g] for g in rows], experts, "parts of speech by expert"), found["sharpest"]


def _domain_map(
    layer: Mapping[str, Any], names: Sequence[str], experts: Sequence[str], found: Mapping[str, Any]
) -> tuple[int, Markup]:
    share = layer["domains"]["share"]
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.where(share.mean(0) > 0, share / share.mean(0), np.nan)
    return layer["layer"], heat(lift, [name[:18] for name in names], experts, "domains by expert")


def _predicted(layers: Sequence[Mapping[str, Any]]) -> list[tuple[int, Markup]]:
    shown = _spread(len(layers), 12)
    return [
        (layers[i]["layer"], intervals(list(layers[i]["predictability"].items()), show_shuffled=True, most=1.0))
        for i in shown
    ]


def _over_time(layers: Sequence[Mapping[str, Any]], shown: Sequence[int]) -> Markup:
    lines = []
    for n, i in enumerate(shown):
        lags = layers[i]["over_time"]
        x = np.array([float(lag) for lag in lags])
        color = f"var(--c{n % 5})"
        lines.append(Line(f"layer {layers[i]['layer']}", x, np.array([f.value for f in lags.values()]), color))
        random = np.array([f.random for f in lags.values()])
        if np.isfinite(random).any():
            lines.append(Line(f"random {layers[i]['layer']}", x, random, color, "faint"))
    nulls = [f.shuffled for i in shown for f in layers[i]["over_time"].values()]
    reference = {"unrelated": float(np.mean(nulls))} if nulls else {}
    return line_chart(lines, "share of experts in common", "tokens apart", reference, y_from_zero=True)


def _saturation(found: Mapping[str, Any]) -> Markup | None:
    rows = found.get("saturation")
    if not rows:
        return None
    x = np.array([float(row["checkpoint"]) for row in rows])
    layers = [each["layer"] for each in found["layers"]]
    lines = [
        Line(f"layer {layers[i]}", x, np.array([row["layers"][i].value for row in rows]), f"var(--c{n % 5})")
        for n, i in enumerate(_spread(len(layers), 5))
    ]
    null = float(np.mean([figure.shuffled for row in rows for figure in row["layers"]]))
    return line_chart(lines, "share of experts as at the end", "step", {"unrelated": null}, y_from_zero=True)


def _against(found: Mapping[str, Any]) -> dict[str, Any] | None:
    other = found.get("against")
    if other is None:
        return None
    rows = [(f"layer {each['layer']}", each["experts"]) for each in other["layers"]]
    return {"name": other["name"], "rows": intervals(rows, most=1.0), "layers": other["layers"]}


def _least(found: Mapping[str, Any], spell: Spell | None) -> list[tuple[int, list[tuple[str, float]]]]:
    if spell is None or found.get("against") is None:
        return []
    return [
        (each["layer"], [(visible(spell(item["token_id"])), item["agreement"]) for item in each["least"][:8]])
        for each in found["against"]["layers"]
    ]


def _read(seen: Observed, spell: Spell) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each domain, the beginning of a sequence: the text of each token and its first expert in each layer."""
    out = []
    for d, name in enumerate(seen.domains[:4]):
        of_domain = np.flatnonzero(seen.domain == d)
        counts = np.bincount(seen.sequence[of_domain])
        best = int(counts.argmax())
        rows = of_domain[seen.sequence[of_domain] == best][:_READ_TOKENS]
        firsts = [",".join(map(str, seen.expert_ids[t, :, 0])) for t in rows]
        words = [(spell(int(seen.token_ids[t])), first) for t, first in zip(rows, firsts, strict=True)]
        out.append((name, words))
    return out


def _taken(seen: Observed, spell: Spell | None) -> list[LayerExperts]:
    """What each expert of a few layers takes, if the tokens can be spelled."""
    if spell is None or (seen.token_ids < 0).any():
        return []
    shares = TokenShare(seen.num_experts, int(seen.token_ids.max()) + 1)
    ids = torch.from_numpy(seen.token_ids)
    for i in _spread(len(seen.layers), _MOST_TAKEN_LAYERS):
        shares.add(seen.layers[i], ids, torch.from_numpy(np.ascontiguousarray(seen.expert_ids[:, i])).long())
    return what_experts_take(shares, spell, shares.layers, per_expert=6)
