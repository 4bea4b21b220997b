"""Sentences that say the finding, made from the figures alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.format import number
from manyhands.inspect.resample import Figure


@dataclass(frozen=True)
class Tile:
    """One headline figure and what stands beside it."""

    label: str
    value: str
    about: str
    random: bool = False
    """Whether that is a random router."""


def _all(found: Mapping[str, Any], kind: str, what: str) -> list[Figure]:
    return [each[kind][what] for each in found["layers"] if what in each.get(kind, {})]


def _mean(values: Sequence[float]) -> float:
    real = [value for value in values if math.isfinite(value)]
    return sum(real) / len(real) if real else math.nan


def _beside(figures: Sequence[Figure], told: Callable[[float], str]) -> str:
    """What random routers show, and in how many layers the model's interval lies above all of theirs."""
    known = [figure.above_random for figure in figures if figure.above_random is not None]
    if not known:
        return ""
    random = f"more than a random router's {told(_mean([figure.random for figure in figures]))}"
    if not any(known):
        return f": no {random}"
    return f": {random}" if all(known) else f": {random} in {sum(known)} of {len(known)} layers"


def _bits(value: float) -> str:
    return f"{value:.2f} bits"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def of(found: Mapping[str, Any]) -> dict[str, str]:
    """The title of each section."""
    titles: dict[str, str] = {}
    for key, kind, what, told, sentence in (
        ("syntax", "syntax", "bits", _bits, "The part of speech tells {} about the expert"),
        ("given", "syntax", "bits_given_token", _bits, "Once the token is known, its part of speech tells {}"),
        ("vocabulary", "vocabulary", "share", _percent, "The token decides {} of first experts"),
        ("domains", "domains", "bits", _bits, "The domain tells {} about the expert"),
        ("windows", "domains", "window", _percent, "Load alone tells the domain of {} of sequences"),
    ):
        if figures := _all(found, kind, what):
            value = told(_mean([figure.value for figure in figures]))
            titles[key] = sentence.format(value) + _beside(figures, told)
    if "against" in found:
        same = [each["experts"] for each in found["against"]["layers"]]
        share, unrelated = _mean([f.value for f in same]), _mean([f.shuffled for f in same])
        titles["against"] = f"The other chooses {share:.1%} of the same experts; unrelated tokens share {unrelated:.0%}"
    titles["predict"] = _predict(found)
    lag = [each["over_time"][1] for each in found["layers"] if 1 in each["over_time"]]
    titles["time"] = "Overlap in time"
    if lag:
        here, null = _mean([f.value for f in lag]), _mean([f.shuffled for f in lag])
        titles["time"] = f"Neighbouring tokens share {here:.0%} of their experts; unrelated ones {null:.0%}"
    dead = sum(len(each["load"]["dead"]) for each in found["layers"])
    worst = max(found["layers"], key=lambda each: each["load"]["max_vio"])
    busiest = f"The busiest expert takes {1 + worst['load']['max_vio']:.1f} × its share (layer {worst['layer']})"
    titles["load"] = f"{busiest}; {f'{dead} took nothing of this text' if dead else 'none is dead'}"
    return titles


def _predict(found: Mapping[str, Any]) -> str:
    def recall(name: str) -> float:
        return _mean([each["predictability"][name].value for each in found["layers"] if name in each["predictability"]])

    early, token, constant = recall("router early"), recall("token id"), recall("constant")
    if math.isfinite(early):
        return f"The layer's own router, asked one sublayer early, names {early:.0%} of the experts"
    if math.isfinite(token):
        return f"The token id names {token:.0%} of the experts; the busiest experts alone {constant:.0%}"
    if not math.isfinite(constant):
        return "Too few texts to foretell experts from others"
    return f"The busiest experts alone are {constant:.0%} of those used"


def tiles(found: Mapping[str, Any]) -> list[Tile]:
    """The page's headline figures: means over layers."""
    out: list[Tile] = []

    def add(label: str, figures: Sequence[Figure], unit: str = "", percent: bool = False) -> None:
        if not figures:
            return

        def told(value: float) -> str:
            return number(100 * value, 0) + " %" if percent else number(value, 2) + unit

        random = _mean([f.random for f in figures])
        chance = _mean([f.shuffled for f in figures])
        beside = f"random router {told(random)}" if math.isfinite(random) else f"chance {told(chance)}"
        out.append(Tile(label, told(_mean([f.value for f in figures])), beside, math.isfinite(random)))

    add("part of speech → expert", _all(found, "syntax", "bits"), " bits")
    add("token → first expert", _all(found, "vocabulary", "share"), percent=True)
    add("domain → expert", _all(found, "domains", "bits"), " bits")
    add("experts foretold one sublayer early", _all(found, "predictability", "router early"), percent=True)
    if "against" in found:
        add("experts as in the other", [each["experts"] for each in found["against"]["layers"]], percent=True)
    dead = sum(len(each["load"]["dead"]) for each in found["layers"])
    out.append(Tile("dead experts", str(dead), "took no token of this text"))
    return out
