"""What skips a step or ends a run: a value that is not finite, a spike. The weights change only if both say nothing."""

import math
import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from manyhands.config import GuardConfig
from manyhands.errors import TrainingHalted

_LEAST_OBSERVATIONS = 32
_ORDINARY = {"losses": 1.02, "grad_norms": 3.0}  # times the mean: a norm doubles in one update of 300, and is clipped
_BEYOND_LARGEST = 1.5  # times as far from the mean as the window's largest: some tails are longer than any deviation
_SAME_LEVEL = 2.0  # values within this factor are one level
_LEVEL_FACTOR = 8.0  # a level higher than this times the old one is a run that diverged


def first_non_finite(named_tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first floating-point tensor that holds NaN or Inf; None if all are finite.

    One sum per tensor and one transfer per device: NaN and Inf always survive a sum. A sum of finite values can
    overflow, so only `isfinite` over the values themselves accuses.
    """
    tensors = [(name, t.detach()) for name, t in named_tensors if t is not None and t.is_floating_point()]
    sums: dict[torch.device, list[Tensor]] = {}
    for _, tensor in tensors:
        sums.setdefault(tensor.device, []).append(tensor.sum().float())
    if all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values()):
        return None
    return next((name for name, tensor in tensors if not bool(tensor.isfinite().all())), None)


class SpikeGuard:
    """Skips an update whose loss or gradient norm stands far above the last ones (after OLMo-core).

    All in logarithms, since a gradient norm's tail is long: a value is a spike if it lies above the mean of the last
    `spike_window` values by `spike_sigma` standard deviations, by half as much again as the largest of them, and by
    2 % (loss) or a factor of 3 (norm). Only upwards: a fast fall of the loss is never a spike. Judging begins once
    32 values (or a full window, if that is shorter) are in. The window takes a spike in as if it had lain below the
    limit: one outlier does not hide the next, and a tail that is always there is learnt.

    A shift that lasts is no spike: after half of `max_skips` skipped updates in a row that agree within a factor of
    two, and are at most eight times the old mean, the window moves to the new level; once per window's length, for a
    run that diverges goes on rising.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_observed = 0
        self.num_skipped = 0
        self.num_consecutive = 0
        self.num_levels = 0
        """How often the window moved to a new level."""
        self._moved_at: int | None = None
        self._streak: list[dict[str, float]] = []
        self._windows: dict[str, deque[float]] = {name: deque(maxlen=config.spike_window) for name in _ORDINARY}

    def configure(self, config: GuardConfig) -> None:
        """Go on under other settings; a shorter window keeps its newest values."""
        self.config = config
        self._windows = {name: deque(window, config.spike_window) for name, window in self._windows.items()}

    def observe(self, loss: float, grad_norm: float) -> bool:
        """Take in one optimiser step's loss and gradient norm; True means: skip this update.

        Raises `TrainingHalted` at the `max_skips`-th skip in a row.
        """
        values = {"losses": float(loss), "grad_norms": float(grad_norm)}
        self.num_observed += 1
        limits = {name: self._limit(name) for name in values}
        if all(values[name] <= limits[name] for name in values):
            return self._accept(values)
        self._streak.append(values)
        if self._is_level():
            for name, window in self._windows.items():
                shift = math.log(max(1.0, min(v[name] for v in self._streak) / max(_mean(window), _TINY)))
                self._windows[name] = deque((math.exp(_log(v) + shift) for v in window), window.maxlen)
            self.num_levels += 1
            self._moved_at = self.num_observed
            return self._accept(values)
        self.num_skipped += 1
        self.num_consecutive += 1
        for name, value in values.items():
            if math.isfinite(value) and limits[name] < sys.float_info.max:
                mean = _mean(self._windows[name])
                inside = mean * (limits[name] / mean) ** (1 / _BEYOND_LARGEST) if mean > 0 else value
                self._windows[name].append(min(value, inside))
        if self.num_consecutive >= self.config.max_skips:
            before = self.num_observed - self.num_consecutive
            raise TrainingHalted(
                f"step {self.num_observed}: {self.num_consecutive} updates in a row were skipped as spikes "
                f"(loss {values['losses']:.4g}, limit {limits['losses']:.4g}; gradient norm "
                f"{values['grad_norms']:.4g}, limit {limits['grad_norms']:.4g}). The weights are those of step "
                f"{before}. Look at the data around step {before + 1}, or go on from the newest checkpoint with "
                f"`manyhands train --resume DIRECTORY` and a lower optim.lr, a longer schedule.warmup_steps, or "
                f"guard.spike_sigma=null, which turns this guard off"
            )
        return True

    def _accept(self, values: dict[str, float]) -> bool:
        self.num_consecutive = 0
        self._streak = []
        for name, value in values.items():
            self._windows[name].append(value)
        return False

    def _is_level(self) -> bool:
        """Whether the skipped updates in a row, with this one, are a new level rather than spikes."""
        if len(self._streak) < max(2, self.config.max_skips // 2):
            return False
        if self._moved_at is not None and self.num_observed - self._moved_at <= self.config.spike_window:
            return False
        for name, window in self._windows.items():
            found = [values[name] for values in self._streak]
            if not all(math.isfinite(value) for value in found):
                return False
            highest, level = max(found), max(_mean(window), _TINY)
            if highest > _SAME_LEVEL * min(found) or highest > _LEVEL_FACTOR * level:
                return False
        return True

    def _limit(self, name: str) -> float:
        """The largest value that is not a spike; NaN and Inf are above every limit."""
        window = self._windows[name]
        if self.config.spike_sigma is None or len(window) < min(_LEAST_OBSERVATIONS, self.config.spike_window):
            return sys.float_info.max
        logs = [_log(value) for value in window]
        mean = math.fsum(logs) / len(logs)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in logs) / len(logs))
        above = max(self.config.spike_sigma * std, _BEYOND_LARGEST * (max(logs) - mean), math.log(_ORDINARY[name]))
        return math.exp(min(mean + above, 700.0))

    def state_dict(self) -> dict[str, Any]:
        """The windows and the counts as plain JSON values; Python's JSON returns floats bit for bit."""
        return {
            **{name: list(window) for name, window in self._windows.items()},
            "num_observed": self.num_observed,
            "num_skipped": self.num_skipped,
            "num_consecutive": self.num_consecutive,
            "num_levels": self.num_levels,
            "moved_at": self._moved_at,
            "streak": [dict(values) for values in self._streak],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; a window shortened since then keeps its newest values."""
        self._windows = {name: deque(state[name], self.config.spike_window) for name in _ORDINARY}
        self.num_observed = state["num_observed"]
        self.num_skipped = state["num_skipped"]
        self.num_consecutive = state["num_consecutive"]
        self.num_levels = state.get("num_levels", 0)  # runs of before levels were learnt have none of these
        self._moved_at = state.get("moved_at")
        self._streak = [dict(values) for values in state.get("streak", [])]


_TINY = 1e-12


def _log(value: float) -> float:
    return math.log(max(value, _TINY))


def _mean(window: deque[float]) -> float:
    """The geometric mean; 0 of nothing."""
    return math.exp(math.fsum(map(_log, window)) / len(window)) if window else 0.0
