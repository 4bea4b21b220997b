"""How much is said beside the result, on standard error: -q, -v and --debug, which every verb has in one meaning.

    -q, --json   warnings and errors
    otherwise    also a line or a bar for what takes long
    -v           also where files came from, what they are, what computes them, and what it took

The level of the package's loggers is what holds it; the library speaks through them too, at DEBUG.
"""

import functools
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from manyhands.terminal import shown

LOG = logging.getLogger("manyhands")
QUIET, USUAL, VERBOSE = logging.WARNING, logging.INFO, logging.DEBUG


def quiet() -> bool:
    """Whether only warnings are wanted."""
    return LOG.getEffectiveLevel() > USUAL


def verbose() -> bool:
    """Whether details are wanted."""
    return LOG.getEffectiveLevel() < USUAL


def set_level(level: int) -> None:
    """What is heard from here on."""
    LOG.setLevel(level)


class _Stderr(logging.Handler):
    """Lines on what is standard error at that moment: a bar that is drawn stands in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more
            print(shown(self.format(record)), file=sys.stderr, flush=True)


@contextmanager
def heard() -> Iterator[None]:
    """For one call of the command line: the package's loggers speak on standard error."""
    before, handler, began = LOG.level, _Stderr(), time.monotonic()
    LOG.addHandler(handler)
    LOG.setLevel(USUAL)
    try:
        yield
        LOG.debug("%s", _taken(time.monotonic() - began))
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before)


def dated() -> None:
    """Lines that are a log: with the time in front."""
    for handler in LOG.handlers:
        if isinstance(handler, _Stderr):
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))


def _taken(seconds: float) -> str:
    """What the call took."""
    from manyhands.format import show

    memory = ""
    with suppress(ImportError):  # Windows has none
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = f", at most {show(most, 'B')} of memory"
    return f"took {show(seconds, 's')}{memory}"


def _quiet(asked: bool) -> None:
    if asked:
        set_level(QUIET)


def _verbose(asked: bool) -> None:
    if asked:
        set_level(VERBOSE)


@functools.cache
def everywhere() -> tuple[Any, ...]:
    """The options themselves, as the version of Typer that is here makes them."""
    described = typer.Typer()

    @described.command()
    def verb(
        quiet: Annotated[
            bool,
            typer.Option("--quiet", "-q", callback=_quiet, expose_value=False, help="Only the result and warnings."),
        ] = False,
        verbose: Annotated[
            bool,
            typer.Option(
                "--verbose",
                "-v",
                callback=_verbose,
                expose_value=False,
                help="Also what was read, what computes it, and what it took.",
            ),
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", expose_value=False, help="Show the traceback of an error.")
        ] = False,
    ) -> None: ...

    return tuple(p for p in typer.main.get_command(described).params if {"--quiet", "--verbose", "--debug"} & {*p.opts})
