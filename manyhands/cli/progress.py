"""The bar of verbs that write tensor after tensor, and the line of those that read a model."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def loading(place: str | Path) -> Iterator[None]:
    """Says on a terminal that a model is read. A download says so itself."""
    if not sys.stderr.isatty() or not Path(place).exists():
        yield
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(f"loading {escape(shown(place))}"):
        yield
