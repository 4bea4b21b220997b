"""The bar of verbs that write tensor after tensor."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from manyhands.terminal import shown


@contextmanager
def tensors_bar(unit: str = "tensors") -> Iterator[Callable[[str, int, int], None]]:
    """Gives what is called with (the last one's name, how many are done, of how many); nothing but on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[tensor]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(unit, total=None, tensor="")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, tensor=shown(name[-50:]))
