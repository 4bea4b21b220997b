"""What a session of a run is to do: decided by rank 0, which alone looks into the run's directory and locks it."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.config.history import go_on, repeat
from manyhands.config.load import dump_run, load_run, parse_run
from manyhands.parallel.ranks import Ranks, first
from manyhands.train.budget import with_plan
from manyhands.train.dtype import settle_dtype
from manyhands.train.experts import as_chosen
from manyhands.train.ready import check_ready
from manyhands.train.start import Start, with_model


@dataclass(frozen=True, slots=True)
class Session:
    """The run as it goes on now, and from where; alike on every rank."""

    run: RunConfig
    """Resolved: with its model, its dtype and its history."""
    before: RunConfig | None
    """What the directory held; None for a new run."""
    step: int
    """Steps done."""
    newest: Path | None
    """The checkpoint to go on from, verified; None: a run begins."""
    start: Start | None
    """The checkpoint that it has just begun from."""
    base: Start | None
    """The model whose weights it is given before `newest` is read, which may hold but what is trained."""
    changes: dict[str, tuple[Any, Any]]
    """Settings that are no longer what they were, `{field: (before, after)}`; on rank 0, which says them."""

    def told(self) -> dict[str, Any]:
        """As JSON can say it, without the changes."""
        return {
            "run": dump_run(self.run),
            "before": None if self.before is None else dump_run(self.before),
            "step": self.step,
            "newest": None if self.newest is None else str(self.newest),
            "start": _named(self.start),
            "base": _named(self.base),
        }

    @classmethod
    def heard(cls, said: dict[str, Any]) -> "Session":
        """From what `told` gave."""
        run = parse_run(said["run"], "this run")
        before = None if said["before"] is None else parse_run(said["before"], "this run")
        newest = None if said["newest"] is None else Path(said["newest"])
        start, base = (
            None if named is None else Start(named[0], Path(named[1]), run.model)
            for named in (said["start"], said["base"])
        )
        return cls(run, before, said["step"], newest, start, base, {})


def _named(start: Start | None) -> list[str] | None:
    return None if start is None else [start.source, str(start.path)]


def open_session(directory: RunDirectory, run: RunConfig, ranks: Ranks, held: ExitStack) -> Session:
    """Start or continue the run in `directory` as `run` says; rank 0 keeps the directory's lock in `held`.

    Raises, on rank 0, `UserError` if the directory holds anything but a run, `ConfigError` if it holds another run or
    this machine cannot train it, `RunLocked` if a process is using it; the others end with it, by `EndedElsewhere`.
    """
    mine: list[Session] = []

    def look() -> dict[str, Any]:
        mine.append(foresee(directory, run, ranks, held))
        return mine[0].told()

    said = first(ranks, look)
    return mine[0] if mine else Session.heard(said)


def foresee(directory: RunDirectory, run: RunConfig, ranks: Ranks, held: ExitStack | None = None) -> Session:
    """What `open_session` decides, on one process. Without `held` nothing is locked, nor written."""
    directory.check_ours()
    before = load_run(directory.config_file) if directory.config_file.is_file() else None
    start = None if run.start is None or before is not None else Start.open(run.start, run.puts_beside)
    if start is not None:
        run = with_model(run, start.config)
    elif before is not None and run.start is not None and run.start == before.start:
        run = with_model(run, before.model)
    if before is not None:
        run = as_chosen(run, before)
    check_ready(run, ranks)
    run, before = settle_dtype(run, before)
    if held is not None:
        held.enter_context(directory.lock())
    newest = directory.newest_valid()
    step, path = newest if newest else (0, None)
    changes: dict[str, tuple[Any, Any]] = {}
    if before is None:
        run = repeat(run)
    else:
        before = with_plan(before, path)
        run, changes = go_on(before, run, step, str(directory.path))
    if newest is None and start is None and run.start is not None:  # begun before, never saved
        start = Start.open(run.start, run.puts_beside)
    base = Start.of_tuned(path) if path is not None and run.saves_changes else start
    return Session(run, before, step, path, start, base, changes)
