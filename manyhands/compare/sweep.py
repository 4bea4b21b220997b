"""A sweep: run after run, each a process of its own, until all are there. What is finished is not done again.

A run is started by the very command that a person would type, so whatever `train` promises holds: a run that was
stopped goes on where it was, a directory that holds something else is refused.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from manyhands.checkpoint.runs import RunDirectory
from manyhands.compare.run import Run
from manyhands.compare.sweep_file import Planned
from manyhands.compare.verdict import NOT_KEPT
from manyhands.config import RunConfig
from manyhands.config.history import FREE, differences
from manyhands.config.load import load_run
from manyhands.errors import Interrupted, ManyhandsError
from manyhands.plan.host import usable_cores

_LOOK = 0.2  # seconds between two looks at what runs
_TAIL = 1 << 14
State = Literal["finished", "to continue", "to do"]


@dataclass
class Done:
    """One run of a sweep, and what became of it."""

    planned: Planned
    directory: Path
    exit_code: int | None = None
    """None: it was finished before, or was not begun."""
    seconds: float = 0.0
    error: str = ""
    """The last line it said, where it failed."""

    @property
    def failed(self) -> bool:
        """Whether it did not come to its end."""
        return bool(self.error)


@dataclass
class _Process:
    """One that runs."""

    done: Done
    process: "subprocess.Popen[bytes]"
    log: Path
    began: float = field(default_factory=time.monotonic)


def state_of(planned: Planned, directory: Path) -> State:
    """How far a run is. One whose description is another now counts as not finished: train says what is wrong."""
    home = RunDirectory(directory)
    if not home.config_file.is_file():
        return "to do"
    try:
        before, run = load_run(home.config_file), Run.open(directory)
    except ManyhandsError:
        return "to continue"
    settled = _settled(planned.run)
    changed = [path for path in differences(before, planned.run) if path not in FREE and not path.startswith(settled)]
    return "finished" if run.ended and not changed else "to continue"


def _settled(asked: RunConfig) -> tuple[str, ...]:
    """Beginnings of the fields that a run itself fills in: what it was asked says nothing of them."""
    found = ["train.dtype"] if asked.train.dtype == "auto" else []
    found += ["model."] if not asked.describes_model else []
    found += ["tune.experts"] if asked.tune is not None and getattr(asked.tune, "experts", ()) is None else []
    return tuple(found)


def command(planned: Planned, directory: Path) -> list[str]:
    """What starts or continues it, behind `manyhands`."""
    return ["train", *planned.source, *planned.changes, "--out", str(directory)]


def sweep(
    planned: Sequence[Planned], home: Path, *, parallel: int = 1, say: Callable[[str], None] = lambda text: None
) -> list[Done]:
    """Train every run that is not finished under `home`, `parallel` at a time; a failed one does not stop the others.

    The processes share the cores: each is given its part unless OMP_NUM_THREADS says otherwise. Raises `Interrupted`
    on SIGINT and SIGTERM after the runs have saved, `ManyhandsError` if no process can be started.
    """
    every = [Done(each, home / each.name) for each in planned]
    waiting = [each for each in every if state_of(each.planned, each.directory) != "finished"]
    if len(waiting) < len(every):
        say(f"{len(every) - len(waiting)} of {len(every)} runs are finished")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // parallel)))
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    running: list[_Process] = []
    told = 0
    try:
        while running or (waiting and not asked):
            while waiting and len(running) < parallel and not asked:
                running.append(_start(waiting.pop(0), home, environment))
                say(f"{running[-1].done.planned.name}: started")
            time.sleep(_LOOK)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                _end(each)
                say(f"{each.done.planned.name}: {_became(each.done)}")
            for number in asked[told:]:  # each signal once: a second one lets train leave without saving
                for each in running:
                    each.process.send_signal(number)
            told = len(asked)
    finally:
        for each in running:  # only after an error of our own
            each.process.terminate()
            each.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        stopped = Interrupted(f"{signal.Signals(asked[0]).name}: the runs in {home} were saved; sweep again to go on")
        stopped.exit_code = 128 + asked[0]
        raise stopped
    return every


def _start(done: Done, home: Path, environment: dict[str, str]) -> _Process:
    """In a session of its own: a terminal's Ctrl-C reaches it once, through us."""
    log = home / "logs" / f"{done.planned.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "manyhands", *command(done.planned, done.directory), "--quiet"]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return _Process(done, process, log)


def _end(running: _Process) -> None:
    done = running.done
    done.exit_code, done.seconds = running.process.returncode, time.monotonic() - running.began
    if done.exit_code not in (0, NOT_KEPT):
        with open(running.log, "rb") as file:
            file.seek(max(0, running.log.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        code = done.exit_code
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        done.error = (lines[-1].removeprefix("manyhands: ") if lines else "it said nothing") + f" ({why})"


def _became(done: Done) -> str:
    """In one line."""
    if done.failed:
        return f"failed: {done.error}"
    try:
        run = Run.open(done.directory)
    except ManyhandsError as error:
        done.error = str(error)
        return f"failed: {done.error}"
    worth = ", not worth keeping by its verdict" if done.exit_code == NOT_KEPT else ""
    return f"{run.figure('last'):.3f} {run.unit}, {done.seconds:.0f} s{worth}"
