"""Tables that fit, with nothing cut short: what has no room is left out by name, or stands below.

The room is the terminal's width or COLUMNS, piped 80.
"""

import shutil
import sys
import textwrap
from collections.abc import Sequence

from manyhands.cli.loudness import LOG
from manyhands.terminal import styled


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()) -> None:
    """Print rows under a head; `>` before a column's name marks numbers.

    While a row is wider than the room, columns in `spare` are left out, the first first, which a line on stderr says;
    after them the last columns go on lines of their own, below their row.
    """
    room = shutil.get_terminal_size((80, 24)).columns
    kept, gone = list(range(len(columns))), []
    widths = [max(map(len, cells)) for cells in zip([c.lstrip(">") for c in columns], *rows, strict=True)]

    def width(of: Sequence[int]) -> int:
        return sum(widths[i] + 2 for i in of) - 2

    for name in spare:
        if width(kept) > room:
            kept.remove(columns.index(name))
            gone.append(name.lstrip(">"))
    below: list[int] = []
    while width(kept) > room and len(kept) > 1:
        below.insert(0, kept.pop())

    def line(cells: Sequence[str]) -> str:
        placed = (cells[i].rjust(widths[i]) if columns[i][0] == ">" else cells[i].ljust(widths[i]) for i in kept)
        return "  ".join(placed).rstrip()

    bold, plain = ("\033[1m", "\033[0m") if styled(sys.stdout) else ("", "")
    print(f"{bold}{line([name.lstrip('>') for name in columns])}{plain}")
    for row in rows:
        print(line(row))
        if more := ": ".join(row[i] for i in below if row[i]):
            print(textwrap.fill(more, max(room, 40), initial_indent="    ", subsequent_indent="    "))
    if gone:
        LOG.info("left out at %d columns: %s; --json has all", room, ", ".join(gone))
