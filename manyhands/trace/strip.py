"""Per-expert load as one line of text, one cell per expert.

A cell's height is the expert's load, with the fair share 1/E at half height and twice the fair share at the top.
Red: the expert got nothing. Yellow: more than half as much again as its share. Green: the rest.
"""

from collections.abc import Sequence

from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=+*%#"
OVERLOADED = 1.5
"""Load, in fair shares, from which a cell is yellow: MaxVio 0.5."""


def strip(load_E: Sequence[float], width: int, ascii_only: bool = False) -> Text:
    """`load_E` (shares of pairs, sum 1) in at most `width` cells.

    With more experts than cells, neighbours share a cell: its height is their mean, its colour the worst of them.
    """
    cells = max(1, min(width, len(load_E)))
    text = Text()
    for cell in range(cells):
        group = load_E[cell * len(load_E) // cells : (cell + 1) * len(load_E) // cells]
        fair = [share * len(load_E) for share in group]
        style = "red" if min(fair) == 0 else "yellow" if max(fair) > OVERLOADED else "green"
        height = min(8, max(1, round(4 * sum(fair) / len(fair))))
        text.append((ASCII if ascii_only else BLOCKS)[height - 1], style)
    return text
