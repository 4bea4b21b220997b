"""The learning rate as a pure function of the step."""

import math

from manyhands.config.run import ScheduleConfig


def learning_rate(step: int, max_steps: int, lr: float, config: ScheduleConfig) -> float:
    """The rate of step `step` (from 0) of a run of `max_steps`.

    Warm-up rises linearly: step s has (s + 1)/warmup_steps of `lr`, so that the first step is not lost and the last
    step of the warm-up has all of it. A warm-up longer than the run is shortened to the run. Then
    cosine: falls from `lr`, along half a cosine, to `min_ratio`·lr;
    wsd: stays at `lr`, then falls linearly over the last `decay_fraction` of all steps (arXiv 2404.06395).
    The floor belongs to step `max_steps`, one past the last: with min_ratio = 0 no step of the run has rate 0.
    """
    warmup = min(config.warmup_steps, max_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    start = warmup
    if config.kind == "wsd":
        start = max(warmup, max_steps - round(config.decay_fraction * max_steps))
    if step >= max_steps:
        done = 1.0
    else:
        done = max(0, step - start) / max(1, max_steps - start)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    return lr * (config.min_ratio + (1 - config.min_ratio) * left)


def no_faster_than_warmup(
    rate: float, before: float | None, lr: float, max_steps: int, config: ScheduleConfig
) -> float:
    """`rate`, but above the last step's rate, `before`, by no more than the warm-up rises in one step.

    The schedule itself never rises faster. A run that goes on with more steps, or another `lr`, would jump.
    """
    warmup = min(config.warmup_steps, max_steps)
    if before is None or warmup == 0:
        return rate
    return min(rate, before + (1 + 1e-9) * lr / warmup)  # the margin: rounding must not touch a warm-up
