"""What a caller of `train` may watch: each step, each validation, the end. One that fails stops the run, saved."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.errors import ConfigError
from manyhands.models import AnyModel

_CALLS = ("on_step", "on_validation", "on_end")


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a run is when it calls."""

    step: int
    """Optimiser steps done."""
    record: dict[str, Any]
    """What the journal says of it (`trace/journal.py`): the loss and the loads of a step, a validation's figures, the
    end's reason. A step is given whether it is logged or not."""
    model: AnyModel
    """As it is after that step. Whatever changes it changes the run."""
    directory: Path


class Callback:
    """Subclass it, and say what you need; or bring any object with these three methods.

    A call's time counts in a time budget, and not in tokens per second. Random numbers that it draws from torch's
    global generator change what a noisy router draws. An exception stops the run once it is saved, and is raised to the
    caller of `train`, with a note that says so.
    """

    def on_step(self, moment: Moment) -> None:
        """After each optimiser step, a skipped one too."""

    def on_validation(self, moment: Moment) -> None:
        """After each validation."""

    def on_end(self, moment: Moment) -> None:
        """When nothing is left to train, and the last validation is done."""


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises `ConfigError` for what cannot be called."""
    for callback in callbacks:
        missing = [name for name in _CALLS if not callable(getattr(callback, name, None))]
        if missing or isinstance(callback, type):
            what = "is a class: make one of it, with ()" if isinstance(callback, type) else f"has no {missing[0]}"
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(f"callbacks: {name} {what}; a manyhands.Callback has {', '.join(_CALLS)}")
        for name in dir(callback) if isinstance(callback, Callback) else ():
            if name.startswith("on_") and name not in _CALLS:
                raise ConfigError(
                    f"callbacks: {type(callback).__name__}.{name} is never called; a manyhands.Callback has "
                    f"{', '.join(_CALLS)}"
                )


def tell(callbacks: Sequence[Callback], call: str, moment: Moment, keep: Callable[[str], str]) -> None:
    """Make one of the `_CALLS` of all, in order. `keep` saves the run after a failure, given what failed in words; what
    it says is noted on the exception, which goes on."""
    for callback in callbacks:
        with _saved(f"{type(callback).__name__}.{call} at step {moment.step}", keep):
            getattr(callback, call)(moment)


@contextmanager
def _saved(what: str, keep: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(keep(f"{what} raised {type(error).__name__}"))
        raise
