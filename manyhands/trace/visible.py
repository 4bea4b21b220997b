"""Tokens as a person can read them, and what each expert takes, laid out for the report."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manyhands.trace.tokens import Measure, TokenShare

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_LONGEST = 24
_MOST_CHIPS = 3000
"""Tokens in one report: what keeps the file small when there are many layers and experts."""


@dataclass(frozen=True)
class Chip:
    """One token of one expert."""

    text: str
    ratio: float
    """Its share of the token's visits over chance."""
    percent: float
    """Its share of the token's visits, of 100."""
    visits: int
    strength: float
    """How deep its background is, of 100: 0 at chance, full where the expert takes the token every time."""


@dataclass(frozen=True)
class Expert:
    """One expert and the tokens it takes most."""

    number: int
    load_percent: float
    chips: list[Chip]


@dataclass(frozen=True)
class LayerExperts:
    """One sparse layer: its experts and how specialised they are. `experts` is empty where there is no room."""

    layer: int
    vocabulary: Measure
    repetition: Measure
    experts: list[Expert]
    random: Measure | None = None
    """`vocabulary` of a router with random weights, where it was measured."""


def visible(text: str) -> str:
    """`text` with white space and control characters shown: ␣ ⏎ ⇥; four or more in a row are counted (␣×8)."""
    text = re.sub(r"([ \n\t])\1{3,}", lambda run: f"{_MARKS[run[1]]}×{len(run[0])}", text)
    out = "".join(_MARKS.get(c, c) if c in _MARKS or unicodedata.category(c)[0] != "C" else _control(c) for c in text)
    return (out if len(out) <= _LONGEST else out[: _LONGEST - 1] + "…") or "∅"


def _control(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"U+{code:04X}"


def what_experts_take(
    tokens: TokenShare,
    decode: Callable[[int], str] | None,
    layers: Sequence[int],
    per_expert: int = 12,
    random: TokenShare | None = None,
) -> list[LayerExperts]:
    """Every layer's measures, and the top tokens of as many layers as fit (the first, the last and some between)."""
    if per_expert * tokens.num_experts * len(layers) > _MOST_CHIPS:
        per_expert = (per_expert + 1) // 2
    room = max(2, _MOST_CHIPS // (per_expert * tokens.num_experts))
    shown = {layers[i * (len(layers) - 1) // (room - 1)] for i in range(room)} if room < len(layers) else layers
    return [
        LayerExperts(
            layer,
            tokens.vocabulary_specialisation(layer),
            tokens.repetition(layer),
            _experts(tokens, decode, layer, per_expert) if layer in shown else [],
            None if random is None else random.vocabulary_specialisation(layer, shuffles=1),
        )
        for layer in layers
    ]


def _experts(tokens: TokenShare, decode: Callable[[int], str] | None, layer: int, per_expert: int) -> list[Expert]:
    most = 1 / tokens.experts_per_token(layer)

    def strength(share: float, load: float) -> float:
        # Not the ratio: a token that always comes here has (1/K) / load, which is largest where the load is least.
        return max(6.0, min(100.0, 100 * (share - load) / max(most - load, 1e-9)))

    def text(token_id: int) -> str:
        return visible(decode(token_id)) if decode else f"#{token_id}"

    experts = []
    for number, load in enumerate(tokens.load(layer)):
        chips = [
            Chip(text(top.token_id), top.ratio, 100 * top.share, top.visits, strength(top.share, load))
            for top in tokens.top_tokens(layer, number, per_expert)
            if top.ratio > 1
        ]
        experts.append(Expert(number, 100 * load, chips))
    return experts
