"""Rows as the model will see them, with what it learns in colour; between ⟦ and ⟧ where there is no colour."""

from collections.abc import Callable
from itertools import islice, pairwise

import numpy as np
from rich.console import Console
from rich.text import Text

from manyhands.config import RunConfig
from manyhands.terminal import clean, shown
from manyhands.text import Tokenizer
from manyhands.text.targets import Example, Targets
from manyhands.train.row_data import cut_of, examples_of, rows_config, tokenizer_of

LEARNT, GIVEN = "bold green", "dim"
BEGIN, END = "⟦", "⟧"


def show_data(
    run: RunConfig,
    number: int,
    ready_made: Callable[[], Tokenizer] | None = None,
    console: Console | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Print the first `number` rows of `data.sources` as `prepare_rows` would cut them; returns how many there were.

    Raises what `prepare_rows` does of these rows.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    tokenizer = tokenizer_of(run, ready_made)
    rows = rows_config(run)
    targets = Targets(tokenizer, rows.turns, rows.append_stop)
    count = 0
    for row, examples in islice(examples_of(run, run.data.sources, targets, say), number):
        cut = cut_of(run)
        pieces = cut.fit(row, examples)
        for at, piece in enumerate(pieces):
            if row.form == "preference":
                part = ", " + ("chosen", "rejected")[at] + ", cut" * cut.cut
            else:
                part = f", part {at + 1} of {len(pieces)}" if len(pieces) > 1 else ", cut" * cut.cut
            console.print(Text(f"{shown(row.where)}{part}: {_counts(piece)}", style="bold"))
            console.print(picture(piece, tokenizer, colour=console.is_terminal and not console.no_color))
        if not pieces:
            console.print(Text(f"{shown(row.where)}: left out: nothing to learn before the cut", style="bold red"))
        count += 1
    return count


def picture(example: Example, tokenizer: Tokenizer, colour: bool) -> Text:
    """The text of an example's tokens; what is learnt is `LEARNT`, or between `BEGIN` and `END`."""
    found = Text()
    edges = [0, *(np.flatnonzero(np.diff(example.learnt)) + 1).tolist(), len(example.ids)]
    for start, stop in pairwise(edges):
        text, learnt = clean(tokenizer.decode(example.ids[start:stop].tolist())), bool(example.learnt[start])
        if not colour:
            found.append(f"{BEGIN}{text}{END}" if learnt else text)
        else:
            found.append(text, style=LEARNT if learnt else GIVEN)
    return found.append("\n")


def _counts(example: Example) -> str:
    return f"{len(example.ids):,} tokens, {int(example.learnt.sum()):,} learnt"
