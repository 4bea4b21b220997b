"""The training loop: prepare, resume, step, journal, save, stop, report.

A run lives in one directory and is described by one `RunConfig`. Starting it again continues it.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from manyhands.checkpoint.runs import BEST, LAST, RunDirectory
from manyhands.compare.history import CALLBACK, HALTED
from manyhands.config import RunConfig
from manyhands.config.history import settings_at
from manyhands.config.load import dump_run, parse_run
from manyhands.config.tune import EsftTuning
from manyhands.errors import ConfigError, Interrupted, TrainingHalted
from manyhands.files import write_atomic
from manyhands.generate.evaluate import Evaluation
from manyhands.models import AnyModel
from manyhands.parallel.group import joined, mesh_of
from manyhands.parallel.ranks import Alone, Ranks, after_first, first, largest_of
from manyhands.trace.documents import keep_losses
from manyhands.trace.journal import Journal, Unwritten
from manyhands.train.about import about
from manyhands.train.callbacks import Callback, Moment, tell
from manyhands.train.course import Course
from manyhands.train.data import RunData
from manyhands.train.experts import choose_experts
from manyhands.train.finish import Summary, finish
from manyhands.train.fresh import fresh_state
from manyhands.train.looks import look, say_sample, worth_steps
from manyhands.train.opening import announce, say_changes, where
from manyhands.train.preferences import with_reference
from manyhands.train.recording import TRACES, StepTrace
from manyhands.train.row_data import prepare
from manyhands.train.schedule import learning_rate, no_faster_than_warmup
from manyhands.train.screen import Screen
from manyhands.train.seq2seq import task_of
from manyhands.train.session import Session, open_session
from manyhands.train.signals import StopSignals, agreed
from manyhands.train.speed import Speed
from manyhands.train.state import TrainState
from manyhands.train.step import StepResult, train_step
from manyhands.train.task import Task, epochs_of
from manyhands.train.trackers import open_tracker

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
        if self.owes_validation():
            self.validate()
            self.keep()
        if self.had_ended:
            progress.waited = 0
        self.stop_early()
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
                self.save()
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
            self.save()
            self.end(asked.name)
            said = f"{asked.name}: saved step {progress.step} in {self.directory.path}; run again to continue"
            stopped = Interrupted(said)
            stopped.exit_code = 128 + asked
            raise stopped
        if progress.step >= progress.max_steps:
            return
        better = False
        if train.eval_every and progress.step % train.eval_every == 0:
            self.validate()
            better = train.keep_best and progress.best_step == progress.step
            if self.stop_early():
                return
        look(self)
        by_steps = train.save_every and progress.step % train.save_every == 0
        wait = max(train.save_seconds, _SAVING_SHARE * self.saving_took)
        by_time = train.save_seconds and time.perf_counter() - self.saved_at >= wait
        if better or by_steps or any(largest_of([bool(by_time)], self.ranks)):
            self.save()

    def owes_validation(self) -> bool:
        """Whether what the run goes on from was saved before it was judged: at a signal, or at the end."""
        progress, every = self.state.progress, self.course.run.train.eval_every
        due = self.had_ended or (every and progress.step % every == 0)
        return bool(progress.step and due and progress.validated < progress.step)

    def stop_early(self) -> bool:
        """End the run at this step if validations have not got better for long enough."""
        progress, patience = self.state.progress, self.course.now.train.early_stop
        if patience is None or progress.waited < patience:
            return False
        self.course.end_here()
        self.journal.write(
            "early_stop",
            step=progress.step,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            patience=patience,
        )
        best = "" if progress.best_step is None else f"; the best was at step {progress.best_step}"
        self.screen.note(f"step {progress.step}: stopped early, after {patience} validations that were no better{best}")
        return True

    def validate(self) -> Evaluation:
        """The task's validation; recorded and shown, and compared with the best."""
        with self.screen.busy("validating"):
            result = self.evaluation = self.task.validate(
                self.state.model, self.data, self.course.run, self.dtype, self.ranks
            )
        record = self.journal.write(
            "eval",
            step=self.state.progress.step,
            valid_loss=result.loss,
            valid_bits_per_byte=result.bits_per_byte,
            valid_perplexity=result.perplexity,
            tokens=result.tokens,
        )
        self.screen.eval(record)
        if self.ranks.rank == 0:
            keep_losses(self.directory.documents_file, self.data.documents, record["step"], result.documents)
        say_sample(self)
        self.state.progress.judge(result.loss)
        self.tell("on_validation", record)
        return result

    def save(self) -> Path:
        """Write a checkpoint and delete those that are too old."""
        began = time.perf_counter()
        path = self.directory.checkpoint_path(self.state.progress.step)
        with self.screen.busy("saving"):
            self.state.save(path, self.data.tokenizer_path, self.ranks)
        self.journal.write("checkpoint", step=self.state.progress.step, path=str(path.relative_to(self.directory.path)))
        self.keep()
        self.saved_at = time.perf_counter()
        self.saving_took = self.saved_at - began
        return path

    def keep(self) -> None:
        """Give the best and the newest checkpoint their names, and delete those that are too old."""
        if self.ranks.rank:
            return
        train, best, complete = self.course.run.train, self.state.progress.best_step, self.directory.checkpoints()
        there = train.keep_best and any(step == best for step, _ in complete)
        if complete:
            self.directory.name(LAST, complete[-1][0])
        if there or not train.keep_best:
            self.directory.name(BEST, best if there else None)
        self.directory.retain(train.keep_checkpoints, {best} if there and best is not None else ())

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
                given = Given(model, callbacks, own)
                trainer, evaluation = _fit(
                    directory, session, task or task_of(session.run), ranks, signals, screen, given
                )
            return finish(
                directory, trainer.course.run, trainer.data, trainer.state.model, evaluation, trainer.dtype, ranks
            )


class Given(NamedTuple):
    """What a caller brings beside a task."""

    model: AnyModel | None = None
    callbacks: Sequence[Callback] = ()
    own: tuple[str, ...] = ()


def _fit(
    directory: RunDirectory,
    session: Session,
    task: Task,
    ranks: Ranks,
    signals: StopSignals,
    screen: Screen,
    given: Given,
) -> tuple[Trainer, Evaluation]:
    """Prepare what is missing, train to the end, and evaluate."""
    step, start = session.step, session.start

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
    now = settings_at(run, step)
    state = fresh_state(now, data, task, ranks, session.base, mesh_of(ranks, run.parallel.ep), given.model)
    state.own = given.own
    wrote = ranks.size if session.newest is None else state.load(session.newest, ranks, run.train.seed)
    progress = state.progress
    had_ended = 0 < progress.step >= progress.max_steps
    progress.max_steps = now.train.max_steps
    screen.set_max_steps(progress.max_steps)
    traced = StepTrace(directory.path / TRACES, state.model, data.tokenizer_path, screen.note, ranks)
    with _journal(directory, run, progress.step, ranks) as journal, traced:
        dtype: torch.dtype = getattr(torch, run.train.dtype)
        course = Course(run, now, directory, state, journal, screen, ranks)
        speed = Speed.of(run, dtype, state.model.embed_tokens.weight.device, ranks)
        if "batches" in given.own or "loss" in given.own:  # whose tokens need not be what the planner counts
            speed = replace(speed, flops_per_token=None)
        trainer = Trainer(directory, data, state, course, journal, screen, dtype, task, ranks, traced, speed)
        trainer.had_ended, trainer.callbacks = had_ended, given.callbacks
        told = about(run, data, state.model.embed_tokens.weight.device.type)
        announce(run, state, journal, screen, dtype, start, ranks.size, wrote, told)
        if session.newest is not None:
            say_changes(session.before or run, now, session.changes, progress, journal, screen)
            screen.note(where(progress, run))
        if run.tune is not None and not progress.step:
            trainer.validate()
        finished = course.ended
        if not finished:
            try:
                trainer.fit(signals)
            except TrainingHalted as halted:
                trainer.end(f"{HALTED}{halted}")
                raise
            trainer.save()
        judged = trainer.evaluation if progress.validated == progress.step else None
        evaluation = judged or trainer.validate()
        if progress.best_step == progress.step:
            trainer.keep()
        look(trainer, last=True)
        if not finished:
            course.look_at_clock()
            trainer.end("finished")
            trainer.tell("on_end", {"reason": "finished", "step": progress.step, "elapsed": progress.elapsed})
    return trainer, evaluation


def _journal(directory: RunDirectory, run: RunConfig, step: int, ranks: Ranks) -> Journal:
    """Rank 0's, which its trackers follow."""
    if ranks.rank:
        return Unwritten()
    description = run.model_dump(mode="json")
    trackers = [open_tracker(name, directory.path, step, description) for name in run.train.trackers]
    return Journal(directory.journal_file, trackers)
