"""The training loop: prepare, resume, step, journal, save, stop, report.

A run lives in one directory and is described by one `RunConfig`. Starting it again continues it.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.compare.history import CALLBACK, HALTED
from manyhands.config import RunConfig
from manyhands.errors import ConfigError, Interrupted, TrainingHalted
from manyhands.generate.evaluate import Evaluation
from manyhands.models import AnyModel
from manyhands.parallel.group import joined
from manyhands.parallel.ranks import Ranks, largest_of
from manyhands.trace.journal import Journal
from manyhands.train.about import about
from manyhands.train.callbacks import Callback, Moment, tell
from manyhands.train.course import Course
from manyhands.train.data import RunData
from manyhands.train.finish import Summary, finish
from manyhands.train.keeping import name_best, owes_validation, save, stop_early, validate
from manyhands.train.looks import look, worth_steps
from manyhands.train.opening import announce, say_changes, where
from manyhands.train.preparing import Prepared, make_ready
from manyhands.train.recording import TRACES, StepTrace
from manyhands.train.schedule import learning_rate, no_faster_than_warmup
from manyhands.train.screen import Screen
from manyhands.train.seq2seq import task_of
from manyhands.train.session import Session, open_session
from manyhands.train.signals import StopSignals, agreed
from manyhands.train.speed import Speed
from manyhands.train.state import TrainState
from manyhands.train.step import StepResult, train_step
from manyhands.train.task import Task, epochs_of
from manyhands.train.trackers import open_journal

_TRACED = 200_000  # tokens that the report looks at after the last validation
_SAVING_SHARE = 20  # saving by time takes one part in so many of the time at most


@dataclass(slots=True)
class Trainer:
    """One session of a run: its fixed parts, and the state that moves."""

    directory: RunDirectory
    data: RunData
    state: TrainState
    course: Course
    journal: Journal
    screen: Screen
    dtype: torch.dtype
    task: Task
    ranks: Ranks
    trace: StepTrace
    speed: Speed
    saved_at: float = 0.0
    saving_took: float = 0.0
    had_ended: bool = False
    """Whether the run had come to its end, and goes on."""
    evaluation: Evaluation | None = None
    """Of the newest validation of this session."""
    callbacks: Sequence[Callback] = ()

    def fit(self, signals: StopSignals) -> None:
        """Step until the end or a signal. Raises `Interrupted` after saving, `TrainingHalted` from the guard."""
        state, course = self.state, self.course
        progress, guard = state.progress, state.guard
        self.saved_at = time.perf_counter()
        course.begin(self.closing_steps(), worth_steps(course.run, progress.max_steps, self.data.valid.info.num_tokens))
        if owes_validation(self):
            validate(self)
            name_best(self)
        if self.had_ended:
            progress.waited = 0
        stop_early(self)
        while progress.step < progress.max_steps:
            step_started = time.perf_counter()
            run, number, levels = course.now, progress.step + 1, guard.num_levels
            rate = learning_rate(progress.step, progress.max_steps, run.optim.lr, run.schedule)
            lr = no_faster_than_warmup(rate, progress.lr, run.optim.lr, progress.max_steps, run.schedule)
            batch = next(state.batches)
            waited = time.perf_counter() - step_started
            result = train_step(
                state.model, state.optimizers, guard, batch, run, number, lr, self.dtype, self.task, self.ranks,
                self.trace.seeing(number, run),
            )  # fmt: skip
            seconds, waited = largest_of([time.perf_counter() - step_started, waited], self.ranks)
            progress.step = number
            progress.lr = lr
            progress.tokens += result.count.tokens
            progress.elapsed += seconds
            course.look_at_clock()
            last = progress.step == progress.max_steps
            logged = progress.step % run.train.log_every == 0 or last or result.skipped
            record: dict[str, Any] = {}
            if logged or self.callbacks:
                record = self.record(result, lr, result.count.tokens / seconds) | {"data_wait": waited / seconds}
            if logged:
                self.screen.step(self.journal.write("step", step=progress.step, **record))
            if guard.num_levels > levels:
                self.screen.note(f"step {progress.step}: loss or gradient norm is at a new level; going on from there")
            course.settle(seconds)
            self.tell("on_step", record)
            self.between_steps(signals)
            course.look_at_clock()

    def tell(self, call: str, record: dict[str, Any]) -> None:
        """Make one of the callbacks' calls. What they raise stops the run, which is saved first."""
        if not self.callbacks:
            return

        def keep(what: str) -> str:
            if all(step != progress.step for step, _ in self.directory.checkpoints()):
                save(self)
            self.end(f"{CALLBACK}{what}")
            self.screen.note(what)
            return f"{what}: step {progress.step} is saved in {self.directory.path}; train again to go on from there"

        progress = self.state.progress
        tell(self.callbacks, call, Moment(progress.step, record, self.state.model, self.directory.path), keep)

    def closing_steps(self) -> float:
        """What comes after the last step, in steps: a forward pass is a third of one."""
        tokens, train = self.data.valid.info.num_tokens, self.course.run.train
        return (tokens + min(tokens, _TRACED)) / 3 / (train.sequence_length * train.batch_size)

    def between_steps(self, signals: StopSignals) -> None:
        """Save and validate when it is time; save and leave when a signal asked for it."""
        train, progress = self.course.run.train, self.state.progress
        asked = agreed(signals, self.ranks)
        if asked is not None:
            save(self)
            self.end(asked.name)
            said = f"{asked.name}: saved step {progress.step} in {self.directory.path}; run again to continue"
            stopped = Interrupted(said)
            stopped.exit_code = 128 + asked
            raise stopped
        if progress.step >= progress.max_steps:
            return
        better = False
        if train.eval_every and progress.step % train.eval_every == 0:
            validate(self)
            better = train.keep_best and progress.best_step == progress.step
            if stop_early(self):
                return
        look(self)
        by_steps = train.save_every and progress.step % train.save_every == 0
        wait = max(train.save_seconds, _SAVING_SHARE * self.saving_took)
        by_time = train.save_seconds and time.perf_counter() - self.saved_at >= wait
        if better or by_steps or any(largest_of([bool(by_time)], self.ranks)):
            save(self)

    def end(self, reason: str) -> None:
        """Say in the journal why the session ended."""
        progress = self.state.progress
        self.journal.write(
            "end",
            step=progress.step,
            reason=reason,
            elapsed=progress.elapsed,
            wall=progress.wall,
            max_steps=progress.max_steps,
        )

    def record(self, result: StepResult, lr: float, tokens_per_s: float) -> dict[str, Any]:
        """A `step` record of the journal."""
        layers = {str(layer): asdict(counter.summary()) for layer, counter in result.counters.items()}
        progress = self.state.progress
        return {
            "loss": result.loss,
            **self.task.figures(result.loss, self.data),
            "aux_loss": result.terms.get("aux_loss"),
            "terms": result.terms,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "epochs": epochs_of(self.state.batches),
            "tokens_per_s": tokens_per_s,
            **self.speed.figures(tokens_per_s),
            "elapsed": progress.elapsed,
            "wall": progress.wall,
            "skipped": result.skipped,
            "moe": layers,
        }


def train(
    path: Path,
    run: RunConfig,
    *,
    quiet: bool = False,
    task: Task | None = None,
    ranks: Ranks | None = None,
    model: AnyModel | None = None,
    callbacks: Sequence[Callback] = (),
    own: tuple[str, ...] = (),
) -> Summary:
    """Start or continue the run in directory `path`; returns when it is finished. `task` None: `task_of(run)`.

    `model`, `callbacks` and what of the task is the caller's `own` (by name): see `own.train`, for people.

    `ranks` are the processes that train it together, each of which calls this alike; None: those that torchrun has
    started with this one. Rank 0 has the directory, the journal and the screen; the others read there.

    Raises `UserError` if the directory holds anything but a run, `ConfigError` if it holds another run, `RunLocked`
    if a process is using it, `Interrupted` (after saving) on SIGTERM or SIGINT, `TrainingHalted` from the guards,
    `StorageError` if the disk is full; `EndedElsewhere` where another rank raised one of these, and `ProcessLost` where
    one died.
    """
    if ranks is None:
        with joined(run.train.device) as found:
            return train(path, run, quiet=quiet, task=task, ranks=found, model=model, callbacks=callbacks, own=own)
    if ranks.size > 1 and (own or callbacks):
        raise ConfigError(
            f"{own[0] if own else 'callbacks'} of your own are for one process, and here are {ranks.size}"
        )
    directory = RunDirectory(path)
    with ExitStack() as held:
        session = open_session(directory, run, ranks, held)
        with StopSignals() as signals:
            signals.speaks = lambda exit_code: ranks.first_to_fail(exit_code) is None
            with Screen(str(path), run.train.max_steps, quiet or ranks.rank > 0) as screen:
                signals.leaving = screen.give_back
                task = task or task_of(session.run)
                ready = make_ready(directory, session, task, ranks, signals, screen, model, own)
                trainer, evaluation = _to_the_end(directory, session, ready, task, ranks, signals, screen, callbacks)
            return finish(
                directory, trainer.course.run, trainer.data, trainer.state.model, evaluation, trainer.dtype, ranks
            )


def _to_the_end(
    directory: RunDirectory,
    session: Session,
    ready: Prepared,
    task: Task,
    ranks: Ranks,
    signals: StopSignals,
    screen: Screen,
    callbacks: Sequence[Callback],
) -> tuple[Trainer, Evaluation]:
    """Train to the end, and evaluate."""
    run, data, state, progress = ready.run, ready.data, ready.state, ready.state.progress
    device = state.model.embed_tokens.weight.device
    screen.set_max_steps(progress.max_steps)
    traced = StepTrace(directory.path / TRACES, state.model, data.tokenizer_path, screen.note, ranks)
    with open_journal(directory, run, progress.step, ranks) as journal, traced:
        dtype: torch.dtype = getattr(torch, run.train.dtype)
        course = Course(run, ready.now, directory, state, journal, screen, ranks)
        speed = Speed.of(run, dtype, device, ranks)
        if "batches" in state.own or "loss" in state.own:  # whose tokens need not be what the planner counts
            speed = replace(speed, flops_per_token=None)
        trainer = Trainer(directory, data, state, course, journal, screen, dtype, task, ranks, traced, speed)
        trainer.had_ended, trainer.callbacks = ready.had_ended, callbacks
        told = about(run, data, device.type)
        announce(run, state, journal, screen, dtype, session.start, ranks.size, ready.processes, told)
        if session.newest is not None:
            say_changes(session.before or run, ready.now, session.changes, progress, journal, screen)
            screen.note(where(progress, run))
        if run.tune is not None and not progress.step:
            validate(trainer)
        finished = course.ended
        if not finished:
            try:
                trainer.fit(signals)
            except TrainingHalted as halted:
                trainer.end(f"{HALTED}{halted}")
                raise
            save(trainer)
        judged = trainer.evaluation if progress.validated == progress.step else None
        evaluation = judged or validate(trainer)
        if progress.best_step == progress.step:
            name_best(trainer)
        look(trainer, last=True)
        if not finished:
            course.look_at_clock()
            trainer.end("finished")
            trainer.tell("on_end", {"reason": "finished", "step": progress.step, "elapsed": progress.elapsed})
    return trainer, evaluation
