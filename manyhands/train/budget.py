"""A time budget as a number of steps.

The schedule needs the number of steps, the user has seconds. So the budget is turned into steps once a few are
measured. A busy machine may lie at that moment: the estimate is looked at again as the run goes on, and corrected when
the run would end a tenth of the budget too early or too late. Every number of steps is written into the run's history:
a resumed or repeated run takes the same.
"""

import json
from pathlib import Path
from statistics import median

from manyhands.config import RunConfig
from manyhands.config.history import record
from manyhands.files import STATE

_WINDOW = 12  # steps measured for one estimate
_WARMUP = 4  # of the first of them: allocations, caches
_FAR = 0.1  # share of the budget: look after this much time even if few steps are done, and correct beyond it


class Budget:
    """Seconds for everything from the first step to the last validation.

    closing_steps   what comes after the last step (validation, the report), counted in steps.
    look_steps      what more comes then in a long run, and in a short one no more than a fortieth of its time.
    """

    def __init__(self, seconds: float, planned: bool, closing_steps: float, look_steps: float = 0.0) -> None:
        self.seconds = seconds
        self.planned = planned
        self._closing_steps, self._look_steps = closing_steps, look_steps
        self._times: list[float] = []

    def steps(self, seconds: float, *, step: int, max_steps: int, trained: float, wall: float) -> int | None:
        """The new total of steps, or None to leave it, after `step` took `seconds`.

        trained, wall   seconds in steps, and in everything, since the run began.
        """
        self._times.append(seconds)
        enough = len(self._times) >= _WINDOW or sum(self._times) >= _FAR * self.seconds
        if not enough and not (self.planned and step + 1 >= max_steps):  # the last look before the end
            return None
        times = self._times if self.planned else self._times[min(_WARMUP, len(self._times) - 1) :]
        self._times = []
        typical = median(times)
        last = self.end(step, typical, trained, wall)
        predicted = (max_steps - step) * typical * _overhead(trained, wall)
        right = (last - step) * typical * _overhead(trained, wall)
        if self.planned and abs(predicted - right) <= _FAR * self.seconds:
            return None
        self.planned = True
        return last

    def end(self, step: int, typical: float, trained: float, wall: float) -> int:
        """The step that ends when the budget does, at `typical` seconds each."""
        looks = min(self._look_steps * typical, self.seconds / 40)
        left = self.seconds - wall - self._closing_steps * typical - looks
        return step + max(0, int(left / (typical * _overhead(trained, wall))))


def _overhead(trained: float, wall: float) -> float:
    """How much longer everything takes than the steps alone: validation and saving along the way."""
    return max(1.0, wall / trained) if trained > 0 else 1.0


def planned(run: RunConfig) -> bool:
    """Whether `train.max_seconds`, as it is now, has been turned into steps."""
    for change in reversed(run.history):
        if "train.max_steps" in change.set and change.step:
            return True
        if "train.max_seconds" in change.set:
            return False
    return False


def with_plan(run: RunConfig, checkpoint: Path | None) -> RunConfig:
    """`run` with the steps its budget was turned into, if they stand in a checkpoint only (as up to version 0.1)."""
    if checkpoint is None or run.train.max_seconds is None or run.history:
        return run
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if not state.get("planned"):
        return run
    changes = {"train.max_steps": (run.train.max_steps, state["max_steps"])}
    return run.model_copy(update={"history": record((), max(1, state["step"]), changes)})
