"""What comes before the first step: the data, the settings of now, and the state, new or as it was saved."""

from contextlib import nullcontext
from dataclasses import dataclass

from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.config.history import settings_at
from manyhands.config.load import dump_run, parse_run
from manyhands.config.tune import EsftTuning
from manyhands.files import write_atomic
from manyhands.models import AnyModel
from manyhands.parallel.group import mesh_of
from manyhands.parallel.ranks import Alone, Ranks, after_first, first
from manyhands.train.data import RunData
from manyhands.train.experts import choose_experts
from manyhands.train.fresh import fresh_state
from manyhands.train.preferences import with_reference
from manyhands.train.row_data import prepare
from manyhands.train.screen import Screen
from manyhands.train.session import Session
from manyhands.train.signals import StopSignals
from manyhands.train.state import TrainState
from manyhands.train.task import Task


@dataclass(frozen=True, slots=True)
class Prepared:
    """A session that can begin its steps."""

    run: RunConfig
    """The session's, with the experts that were chosen for it."""
    now: RunConfig
    """The same as its history says for the step it goes on from."""
    data: RunData
    state: TrainState
    processes: int
    """How many wrote what it goes on from; of a new run, its own."""
    had_ended: bool
    """Whether the run had come to its end, and goes on."""


def make_ready(
    directory: RunDirectory,
    session: Session,
    task: Task,
    ranks: Ranks,
    signals: StopSignals,
    screen: Screen,
    model: AnyModel | None,
    own: tuple[str, ...],
) -> Prepared:
    """Prepare what is missing, and write the run's description. `model` is the caller's, `own` names what else is.

    Rank 0 prepares, and a signal ends it at once; the others wait for it.
    """
    start = session.start

    def ready() -> RunData:
        with signals.preparing() if ranks.rank == 0 else nullcontext(), screen.busy("preparing the data"):
            found = prepare(directory.data_dir, session.run, screen.note, start.tokenizer if start else None)
            return with_reference(found, directory.data_dir, session.run, session.base, screen.note)

    def choose() -> str:
        assert session.base is not None
        with signals.preparing():
            return dump_run(choose_experts(session.run, session.base, data, task, Alone()))

    def tidy() -> None:  # only now: whatever is wrong with the command was said before
        directory.clean_partial()
        write_atomic(directory.config_file, dump_run(run))

    data = after_first(ranks, ready)
    run = session.run
    if isinstance(run.tune, EsftTuning) and run.tune.experts is None:
        run = parse_run(first(ranks, choose), "this run")
    first(ranks, tidy)
    now = settings_at(run, session.step)
    state = fresh_state(now, data, task, ranks, session.base, mesh_of(ranks, run.parallel.ep), model)
    state.own = own  # before what was saved is read, which must be of the same
    wrote = ranks.size if session.newest is None else state.load(session.newest, ranks, run.train.seed)
    progress = state.progress
    had_ended = 0 < progress.step >= progress.max_steps
    progress.max_steps = now.train.max_steps
    return Prepared(run, now, data, state, wrote, had_ended)
