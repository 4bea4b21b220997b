"""`--trace DIR` of the verbs that run a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.cli.loudness import LOG

if TYPE_CHECKING:
    from manyhands.models import AnyModel
    from manyhands.text import Tokenizer
    from manyhands.trace.recorder import Recorder


def check_trace(trace: Path | None) -> None:
    """Say what is wrong with the directory before a model is loaded. Raises `UserError`."""
    if trace is not None:
        from manyhands.trace.recorder import new_directory

        new_directory(trace)


@contextmanager
def recording(
    model: "AnyModel", tokenizer: "Tokenizer", trace: Path | None, limit: int | None, verb: str
) -> "Iterator[Recorder | None]":
    """A recorder for as long as the model runs, if a trace is asked for; says on stderr what became of it."""
    if trace is None:
        yield None
        return
    from manyhands.engine.recording import recorder_for
    from manyhands.version import __version__

    with recorder_for(model, tokenizer, trace, f"recorded by manyhands {verb} {__version__}", limit) as recorder:
        yield recorder
    dropped = f", the first {recorder.dropped_tokens:,} deleted again" if recorder.dropped_tokens else ""
    LOG.info("[%s tokens recorded in %s%s]", f"{recorder.num_tokens:,}", trace, dropped)
