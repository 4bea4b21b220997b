"""A run as a verdict reads it: the records of its journal and, where it is known, its description.

n logged steps   E experts   K experts per token
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np

from manyhands.compare import limits
from manyhands.config import RunConfig
from manyhands.config.history import settings_at
from manyhands.trace.series import Floats, Record, column

_WINDOWS = 20


@dataclass(frozen=True, slots=True)
class Window:
    """Some neighbouring steps."""

    first: int
    last: int
    mean: float
    """Of their losses."""
    error: float
    """Its standard error."""


@dataclass(frozen=True, slots=True)
class History:
    """A run's records by kind, and what follows from them. Any part may be missing."""

    start: Record
    steps: Sequence[Record]
    evals: Sequence[Record]
    end: Record | None
    """Why it ended; None if a step came later, or nothing was said."""
    worth: Record | None
    stopped_early: bool
    """Whether it ended where validations no longer got better, as it was told to."""
    saved: frozenset[int]
    """Steps of which a checkpoint was written; older ones may be gone."""
    run: RunConfig | None
    """As it was at the end."""

    @classmethod
    def of(cls, records: Sequence[Record], run: RunConfig | None) -> "History":
        """From `read_journal`'s records and the run's description."""

        def kind(name: str) -> list[Record]:
            return [record for record in records if record["kind"] == name]

        steps = kind("step")
        last = steps[-1]["step"] if steps else 0
        starts, ends, worths = kind("start"), kind("end"), kind("worth")
        return cls(
            start=starts[-1] if starts else {},
            steps=steps,
            evals=kind("eval"),
            end=ends[-1] if ends and ends[-1]["step"] >= last else None,
            worth=worths[-1] if worths else None,
            stopped_early=any(record["step"] >= last for record in kind("early_stop")),
            saved=frozenset(record["step"] for record in kind("checkpoint")),
            run=None if run is None else settings_at(run, last),
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def planned(self) -> int | None:
        """Steps of the whole run; None if nothing says so."""
        if self.end is not None and self.end.get("max_steps"):
            return int(self.end["max_steps"])
        return None if self.run is None else self.run.train.max_steps

    @property
    def finished(self) -> bool:
        """Whether it came to its end by itself."""
        return self.end is not None and not self.stopped

    @property
    def stopped(self) -> bool:
        """Whether a signal, a guard or a callback ended it."""
        reason = "" if self.end is None else str(self.end.get("reason") or "")
        return reason.startswith(("SIG", HALTED, CALLBACK))

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step, with the best validation, stays for that."""
        return step in self.saved and (self.run is None or self.run.train.keep_best)

    @property
    def own(self) -> Sequence[str]:
        """What was the caller's own (`mh.train`): model, batches, valid, loss."""
        own: Sequence[str] = self.start.get("own") or ()
        return own

    @property
    def tuned(self) -> bool:
        """Whether it began with a model that had learnt already."""
        return "start" in self.start or "model" in self.own or (self.run is not None and self.run.start is not None)

    @property
    def router_is_trained(self) -> bool:
        """Whether the run could change who goes where."""
        if self.run is None:
            return True
        some = "layers.0.mlp.router.weight"
        wanted = [pattern for pattern in self.run.trainable if not pattern.startswith("!")] or ["*"]
        frozen = [pattern[1:] for pattern in self.run.trainable if pattern.startswith("!")]
        trained = any(fnmatch(some, pattern) for pattern in wanted) and not any(fnmatch(some, p) for p in frozen)
        return trained and not self.run.saves_changes

    @property
    def epochs(self) -> float | None:
        """How often the training text was read; None if that is not known."""
        if self.steps and (counted := any_number(self.steps[-1].get("epochs"))) is not None:
            return counted
        if "batches" in self.own:
            return None
        size = (self.start.get("data") or {}).get("train_tokens")
        tokens = self.steps[-1].get("tokens") if self.steps else None
        return tokens / size if size and tokens else None

    @property
    def num_experts_per_tok(self) -> int | None:
        """K; None of a dense model."""
        if self.start.get("num_experts_per_tok"):
            return int(self.start["num_experts_per_tok"])
        moe = None if self.run is None else self.run.model.moe
        return None if moe is None else moe.router.num_experts_per_tok

    @property
    def chance(self) -> float | None:
        """The loss of knowing nothing: ln V, or ln 2 of two answers one of which is better; None if not known."""
        if self.run is None or "loss" in self.own:
            return None
        if self.run.rows is not None and self.run.rows.dpo_beta is not None:
            return math.log(2)
        return math.log(self.run.model.vocab_size)

    @property
    def unigram(self) -> float | None:
        """The validation loss of knowing only how often each token occurs, if the run measured it."""
        if "batches" in self.own or "valid" in self.own:
            return None
        value = (self.start.get("data") or {}).get("unigram")
        return None if value is None else float(value)

    def losses(self) -> tuple[Floats, Floats]:
        """(steps [n], losses [n]) of the updates that were made, where the loss is a number."""
        loss, skipped = column(self.steps, "loss"), column(self.steps, "skipped") > 0
        good = np.isfinite(loss) & ~skipped
        return column(self.steps, "step")[good], loss[good]

    def windows(self) -> list[Window]:
        """The training loss in at most 20 stretches of five logged steps or more; none below twenty."""
        steps, losses = self.losses()
        count = min(_WINDOWS, len(losses) // 5)
        if count < 4:
            return []
        found = []
        for s, y in zip(np.array_split(steps, count), np.array_split(losses, count), strict=True):
            error = float(np.std(y, ddof=1)) / math.sqrt(len(y))
            found.append(Window(int(s[0]), int(s[-1]), float(y.mean()), error))
        return found


CALLBACK = "callback "
HALTED = "halted: "
"""How the reason begins when a guard ended the run."""


def rise(low: Window, high: Window) -> float:
    """How far `high` lies above `low`, as a share of it; 0 where that is little, or noise."""
    difference = high.mean - low.mean
    if difference < limits.LEAST_RISE or difference < limits.ERRORS * math.hypot(low.error, high.error):
        return 0.0
    return difference / low.mean if low.mean > 0 else math.inf


def any_number(value: Any) -> float | None:
    """`value` if it is a finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
