"""A new token and the experts that made it, as one line: `␣return      L1 3·0.61 7·0.22  L2 0·0.55 4·0.31`."""

import colorsys
from collections.abc import Mapping

from rich.color import Color
from rich.style import Style
from rich.text import Text

from manyhands.moe import Routing
from manyhands.trace.visible import visible

TOKEN_WIDTH = 16
_GOLDEN = 0.6180339887498949  # steps of the golden ratio around the colour wheel: neighbours far apart, none repeated


def expert_style(expert: int) -> Style:
    """The colour of an expert, the same everywhere: readable on dark and on light."""
    red, green, blue = colorsys.hls_to_rgb((expert * _GOLDEN) % 1.0, 0.5, 0.75)
    return Style(color=Color.from_rgb(255 * red, 255 * green, 255 * blue))


def routing_line(token: str, routings: Mapping[int, Routing], most: int = 8) -> Text:
    """One token, then per sparse layer `expert·weight`, first choice first.

    `token` is the new token's own text. After `most` experts of a layer comes `…`. Print it with a rich console, or
    `.plain`; every line of a model has the same columns.
    """
    line = Text(visible(token), "bold")
    line.truncate(TOKEN_WIDTH, overflow="ellipsis", pad=True)
    line = Text.assemble(line)  # what follows is not bold
    for layer, routing in routings.items():
        width = len(str(routing.num_experts - 1))
        experts, weights = routing.expert_ids[0].tolist(), routing.weights[0].tolist()
        chosen = [pair for pair in zip(experts, weights, strict=True) if pair[0] >= 0]
        line.append(f"  L{layer}", "dim")
        for expert, weight in chosen[:most]:
            line.append(f" {expert:>{width}}·{weight:.2f}", expert_style(expert))
        if len(chosen) > most:
            line.append(" …", "dim")
    return line
