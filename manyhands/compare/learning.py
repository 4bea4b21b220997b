"""What the losses say: whether the run diverged, learnt by heart, learnt next to nothing, or was not done.

All comparisons are of means over stretches of steps (`History.windows`) with their standard errors, or of validations.
"""

import math
from itertools import pairwise

from manyhands.checkpoint.runs import BEST
from manyhands.compare import limits
from manyhands.compare.finding import Finding
from manyhands.compare.history import History, Window, any_number, rise


def findings(history: History) -> list[Finding]:
    """Of a run that was long enough; the first cause found hides what follows from it."""
    if history.step < limits.MIN_STEPS:
        return []
    windows = history.windows()
    if diverged := _diverged(history, windows):
        return [diverged]
    found = [_chance(history, windows), _overfit(history, windows), _rose(windows)]
    kept = [finding for finding in found if finding]
    if not kept and (falling := _still_falling(history)):
        kept.append(falling)
    return kept


def _diverged(history: History, windows: list[Window]) -> Finding | None:
    if not windows:
        return None
    last, best = windows[-1], min(windows, key=lambda window: window.mean)
    risen = rise(best, last)
    if risen < limits.DIVERGED:
        return None
    return Finding(
        "diverged",
        True,
        f"the training loss was lowest around step {best.last:,} ({best.mean:.3f}) and {last.mean:.3f} at the end",
        f"lower optim.lr{_rate(history)}, lengthen schedule.warmup_steps, or go on from a checkpoint before it rose",
        risen,
        limits.DIVERGED,
    )


def _rose(windows: list[Window]) -> Finding | None:
    """A rise that was made good: the rate was too high for a time."""
    if not windows:
        return None
    risen, before, top = _risen(windows)
    if risen < limits.ROSE:
        return None
    return Finding(
        "rate_high",
        False,
        f"the training loss rose from {before.mean:.3f} to {top.mean:.3f} around step {top.first:,} and fell again",
        "the learning rate was too high there: lower optim.lr or lengthen schedule.warmup_steps",
        risen,
        limits.ROSE,
    )


def _risen(windows: list[Window]) -> tuple[float, Window, Window]:
    """The largest rise above what the loss had been before: the share, from where, to where."""
    low = before = top = windows[0]
    risen = 0.0
    for window in windows[1:]:
        if (found := rise(low, window)) > risen:
            risen, before, top = found, low, window
        low = min(low, window, key=lambda one: one.mean)
    return risen, before, top


def _chance(history: History, windows: list[Window]) -> Finding | None:
    """Worse than knowing nothing; or hardly better than knowing how often each token occurs."""
    loss = _last_valid(history)
    if loss is None or history.chance is None:
        return None
    if loss >= history.chance:
        before = "guessing" if history.chance == math.log(2) else "guessing each token alike"
        return Finding(
            "chance",
            True,
            f"the validation loss is {loss:.3f}, and {before} has {history.chance:.3f}",
            f"lower optim.lr{_rate(history)}"
            if history.tuned or _unsteady(windows, history.chance)
            else f"raise optim.lr{_rate(history)}, train for longer, or look at the data",
            loss,
            history.chance,
        )
    if history.tuned or history.step < limits.MIN_STEPS_RATE or history.run is None or history.run.rows is not None:
        return None
    base, least, name = (
        (history.chance, limits.LITTLE_UNIFORM, "guessing each token alike")
        if history.unigram is None
        else (history.unigram, limits.LITTLE, "knowing only how often each token occurs")
    )
    gain = 1 - loss / base
    learnt = 1 - windows[-1].mean / base if windows else gain  # by heart, perhaps: that is another fault
    if max(gain, learnt) >= least:
        return None
    says = f"after {history.step:,} steps the validation loss is {loss:.3f}, and {name} gives {base:.3f}"
    if _unsteady(windows, history.chance):
        return Finding(
            "rate_high", True, says, f"the learning rate is too high: lower optim.lr{_rate(history)}", gain, least
        )
    return Finding(
        "rate_low",
        True,
        says,
        f"the learning rate is too low for so few steps: raise optim.lr{_rate(history)}, or train for longer",
        gain,
        least,
    )


def _unsteady(windows: list[Window], chance: float) -> bool:
    """Whether the loss, once some was learnt, stood still or rose on its way, rather than fall slowly."""
    if not windows:
        return False
    ups = sum(later.mean >= earlier.mean for earlier, later in pairwise(windows))
    learnt = 1 - min(window.mean for window in windows) / chance
    stood = learnt >= limits.MOVED and ups >= limits.STOOD * (len(windows) - 1)
    return stood or _risen(windows)[0] > 0


def _overfit(history: History, windows: list[Window]) -> Finding | None:
    valid = [
        (int(record["step"]), loss)
        for record in history.evals
        if record["step"] and (loss := any_number(record.get("valid_loss"))) is not None
    ]
    epochs = "" if history.epochs is None else f", after {history.epochs:.1f} epochs"
    more = "more text, fewer steps or a smaller model"
    if len(valid) >= 3:
        best_step, best = min(valid, key=lambda found: found[1])
        _, last = valid[-1]
        worse = last / best - 1 if best > 0 else 0.0
        if worse < limits.OVERFIT_REMARK or last - best < 0.1 * limits.LEAST_RISE:
            return None
        fault = worse >= limits.OVERFIT and not history.stopped_early
        return Finding(
            "overfit",
            fault,
            f"validation was best at step {best_step:,} of {history.step:,} (loss {best:.3f}) and is {worse:.1%} worse "
            f"at the end ({last:.3f}){epochs}, while training went on",
            f"{_best(history, best_step)}; {_earlier_end(history)}{more}",
            worse,
            limits.OVERFIT if fault else limits.OVERFIT_REMARK,
        )
    if not valid or not windows or history.epochs is None or history.epochs < limits.GAP_EPOCHS:
        return None
    loss, trained = valid[-1][1], windows[-1].mean
    gap = loss / trained - 1 if trained > 0 else 0.0
    if gap < limits.GAP:
        return None
    return Finding(
        "overfit",
        True,
        f"the loss is {trained:.3f} on the training text and {loss:.3f} on validation{epochs}: it is learnt by heart",
        f"{more}; with train.eval_every RUN/{BEST} is the model before it began, and train.early_stop ends a run there",
        gap,
        limits.GAP,
    )


def _best(history: History, step: int) -> str:
    """Where the model of the best validation is to be had."""
    if history.keeps(step):
        return f"take RUN/{BEST}, the model of step {step:,}"
    return f"the model of step {step:,} would be the one to take, and was not kept (train.keep_best keeps RUN/{BEST})"


def _earlier_end(history: History) -> str:
    """The option that ends a run before it gets worse, unless it was set."""
    if history.run is None or history.run.train.early_stop is not None:
        return ""
    return "train.early_stop=3 ends a run where validation no longer gets better; "


def _still_falling(history: History) -> Finding | None:
    _, losses = history.losses()
    tenth = len(losses) // 10
    if tenth < 5 or not history.finished:
        return None
    before, last = losses[-2 * tenth : -tenth], losses[-tenth:]
    fall = float(1 - last.mean() / before.mean()) if before.mean() > 0 else 0.0
    error = float((before.var(ddof=1) / tenth + last.var(ddof=1) / tenth) ** 0.5)
    if fall < limits.STILL_FALLING or before.mean() - last.mean() < limits.ERRORS / 2 * error:
        return None
    return Finding(
        "still_falling",
        False,
        f"the training loss fell by {fall:.1%} in the last tenth of the steps",
        "more steps would help: a larger train.max_steps or train.max_seconds",
        fall,
        limits.STILL_FALLING,
    )


def _last_valid(history: History) -> float | None:
    return any_number(history.evals[-1].get("valid_loss")) if history.evals else None


def _rate(history: History) -> str:
    return "" if history.run is None else f" ({history.run.optim.lr:g})"
