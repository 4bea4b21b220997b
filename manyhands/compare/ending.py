"""How a run ended, what it waited for, and what it skipped."""

import numpy as np

from manyhands.compare import limits
from manyhands.compare.finding import Finding
from manyhands.compare.history import HALTED, History
from manyhands.trace.series import column

_SETTLING = 5  # steps at the beginning whose waiting is not counted: files are opened, memory is touched


def findings(history: History) -> list[Finding]:
    """What the journal's ends, clocks and skips say."""
    return [finding for finding in (_ended(history), _short(history), _waited(history), _skipped(history)) if finding]


def _ended(history: History) -> Finding | None:
    step, planned = history.step, history.planned
    of = "" if planned is None else f" of {planned:,}"
    reason = "" if history.end is None else str(history.end.get("reason") or "")
    if reason.startswith(HALTED):
        return Finding(
            "halted",
            True,
            f"a guard ended the run at step {step:,}{of}: {reason.removeprefix(HALTED)}",
            "go on from the newest checkpoint with a lower optim.lr or a longer schedule.warmup_steps",
        )
    if history.finished:
        return None
    how = f"{reason} stopped it" if reason else "it was killed, or is still running"
    return Finding(
        "unfinished", True, f"the run has not ended: {how} at step {step:,}{of}", "manyhands train --resume goes on"
    )


def _short(history: History) -> Finding | None:
    if history.step >= limits.MIN_STEPS or not history.finished:
        return None
    return Finding(
        "short",
        False,
        f"{history.step} steps are too few to judge what was learnt, or the balance",
        f"from {limits.MIN_STEPS} steps on they are judged",
        history.step,
        limits.MIN_STEPS,
    )


def _waited(history: History) -> Finding | None:
    steps = [step for step in history.steps if step["step"] > _SETTLING]
    waits = column(steps, "data_wait")
    waits = waits[np.isfinite(waits)]
    if not len(waits) or history.step < limits.MIN_STEPS:
        return None
    share = float(waits.mean())
    if share < limits.WAITING:
        return None
    return Finding(
        "data_wait",
        False,
        f"{share:.0%} of the steps' time was spent waiting for data",
        "make batches faster: a faster disk, the text prepared beforehand, or less work in your own batches",
        share,
        limits.WAITING,
    )


def _skipped(history: History) -> Finding | None:
    count = sum(bool(step.get("skipped")) for step in history.steps)
    share = count / max(1, history.step)
    if history.step < limits.MIN_STEPS or share < limits.SKIPPED:
        return None
    fault = share >= limits.SKIPPED_FAULT
    return Finding(
        "skipped",
        fault,
        f"{count} of {history.step:,} updates were skipped as spikes",
        "lower optim.lr or lengthen schedule.warmup_steps; look at the data of these steps (report.html lists them)",
        share,
        limits.SKIPPED_FAULT if fault else limits.SKIPPED,
    )
