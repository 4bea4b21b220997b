"""What is shown of what takes long: a bar on a terminal, and for a model that was loaded one line that stays.

Nothing with -q, and no bar where standard error is no terminal.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.cli.loudness import LOG, quiet
from manyhands.terminal import shown

if TYPE_CHECKING:
    from rich.progress import Progress

    from manyhands.checkpoint.model import LoadedModel


def _drawn(*columns: Any) -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    off = quiet() or not sys.stderr.isatty()
    # Before rich 14.3 one that is off leaves an empty line behind: it goes nowhere.
    console = Console(file=io.StringIO()) if off else Console(stderr=True)
    return Progress(*columns, console=console, disable=off, transient=True)


@contextmanager
def bar(what: str) -> Iterator[Callable[[float, float], None]]:
    """Gives what is called with how much is done, and of how much."""
    with bars() as update:
        yield lambda done, total: update(what, done, total)


@contextmanager
def bars() -> Iterator[Callable[[str, float, float], None]]:
    """Gives what is called with (what it is, how much is done, of how much): a bar for each thing."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    with _drawn(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) as drawn:
        rows: dict[str, Any] = {}

        def update(what: str, done: float, total: float) -> None:
            if what not in rows:
                rows[what] = drawn.add_task(shown(what[-60:]), total=total)
            drawn.update(rows[what], completed=done, total=total)

        yield update


@contextmanager
def named_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Gives what is called with (what is at hand, a tensor's name say, how many are done, of how many): one bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    with _drawn(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda name, done, total: drawn.update(task, completed=done, total=total, description=shown(name[-50:]))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """For what cannot say how far it is."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    with _drawn(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()) as drawn:
        drawn.add_task(shown(what), total=None)
        yield


class Loading:
    """`with` it a model is read, which is shown; `said(model)`, once it is known to be of use, tells what was read.

    A mistake is then one line alone. A download has bars of its own.
    """

    def __init__(self, place: str | Path) -> None:
        self._place, self._seconds = place, time.monotonic()
        self._waiting: AbstractContextManager[None] = (
            waiting(f"loading {place}") if Path(place).exists() else nullcontext()
        )

    def __enter__(self) -> "Loading":
        self._waiting.__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        self._waiting.__exit__(*failed)
        self._seconds = time.monotonic() - self._seconds

    def said(self, model: "LoadedModel") -> None:
        """One line: size, shape, format, seconds."""
        from manyhands.checkpoint.about import about
        from manyhands.format import show

        LOG.info("%s: %s; loaded in %s", self._place, about(model), show(self._seconds, "s"))
        LOG.debug("%s", _computed_by())


def _computed_by() -> str:
    import torch

    from manyhands.kernels.native import missing
    from manyhands.kernels.native.library import default_level

    absent = missing()
    kernels = f"native kernels {default_level()}" if absent is None else f"no native kernels ({absent})"
    return f"{kernels}, torch {torch.__version__}, {torch.get_num_threads()} threads"
