"""A run's settings as they change on the way: at the steps of its history, and as its time budget says."""

import time
from dataclasses import dataclass

from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.config.history import record, settings_at
from manyhands.config.load import dump_run
from manyhands.files import write_atomic
from manyhands.parallel.ranks import Ranks, first, largest_of
from manyhands.trace.journal import Journal
from manyhands.train.budget import Budget, planned
from manyhands.train.optim import build_optimizers
from manyhands.train.screen import Screen
from manyhands.train.state import TrainState


@dataclass(slots=True)
class Course:
    """Which settings hold at the step where the run is; what changes them is written down."""

    run: RunConfig
    now: RunConfig
    """`run` as it is at this step."""
    directory: RunDirectory
    state: TrainState
    journal: Journal
    screen: Screen
    ranks: Ranks
    budget: Budget | None = None
    origin: float = 0.0
    """When the run would have begun, had it been done in one go."""

    def begin(self, closing_steps: float, look_steps: float) -> None:
        """Start the clock, and plan from the speed so far if the budget was changed in a run that is under way.

        `closing_steps` and `look_steps` are what comes after the last step, counted in steps: see `Budget`.
        """
        progress = self.state.progress
        self.origin = time.perf_counter() - progress.wall
        if self.run.train.max_seconds is None:
            return
        self.budget = Budget(self.run.train.max_seconds, planned(self.run), closing_steps, look_steps)
        if progress.step and progress.elapsed > 0 and not self.budget.planned:
            typical = progress.elapsed / progress.step
            self._plan(self.budget.end(progress.step, typical, progress.elapsed, progress.wall))

    def look_at_clock(self) -> None:
        """Take in the time since the run began, saving and validation with it: the slowest rank's."""
        [self.state.progress.wall] = largest_of([time.perf_counter() - self.origin], self.ranks)

    def settle(self, seconds: float) -> None:
        """Take in what changes at this step: the run's history, and what the time budget says."""
        progress = self.state.progress
        if any(change.step == progress.step for change in self.run.history):
            self._apply(settings_at(self.run, progress.step))
        if self.budget is None or any(change.step > progress.step for change in self.run.history):
            return
        total = self.budget.steps(
            seconds, step=progress.step, max_steps=progress.max_steps, trained=progress.elapsed, wall=progress.wall
        )
        if total is not None:
            self._plan(total)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train: no step, and no changed time budget that has yet to be turned into some."""
        open_budget = self.run.train.max_seconds is not None and not planned(self.run)
        return self.state.progress.step >= self.state.progress.max_steps and not open_budget

    def end_here(self) -> None:
        """This step is the last."""
        self._set_steps(self.state.progress.step)

    def _plan(self, total: int) -> None:
        """The time budget gives `total` steps: also in the journal and on the screen."""
        progress, budget = self.state.progress, self.budget
        assert budget is not None
        progress.planned = True
        self._set_steps(total)
        self.journal.write("plan", step=progress.step, max_steps=total, max_seconds=budget.seconds, wall=progress.wall)
        self.screen.note(f"step {progress.step}: {total} steps fit into {budget.seconds:.0f} s")

    def _set_steps(self, total: int) -> None:
        """From here on the run has `total` steps: in its history."""
        progress = self.state.progress
        changes = {"train.max_steps": (progress.max_steps, total)}
        self.run = self.run.model_copy(update={"history": record(self.run.history, progress.step, changes)})
        first(self.ranks, lambda: write_atomic(self.directory.config_file, dump_run(self.run)))
        self._apply(settings_at(self.run, progress.step))

    def _apply(self, now: RunConfig) -> None:
        """Go on under these settings."""
        if now.optim != self.now.optim:
            state = self.state.optimizers.state_dict()
            self.state.optimizers = build_optimizers(self.state.model, now.optim)
            self.state.optimizers.load_state_dict(state)
        if now.guard != self.now.guard:
            self.state.guard.configure(now.guard)
        self.now = now
        self.state.progress.max_steps = now.train.max_steps
        self.screen.set_max_steps(now.train.max_steps)
