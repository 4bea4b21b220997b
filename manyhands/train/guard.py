"""What stops or skips a step: a signal, a value that is not finite, a spike.

The loop asks in this order, and changes weights only if all three say nothing: `first_non_finite` of loss and
gradients, `SpikeGuard.observe`, and between steps `StopSignals.requested`.
"""

import math
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from manyhands.config import GuardConfig
from manyhands.errors import TrainingHalted

_LEAST_OBSERVATIONS = 32
_STD_FLOOR = 1e-3  # of the mean: in a flat window the last digits are noise, not spikes


class StopSignals:
    """Inside the block the first SIGTERM or SIGINT is noted in `requested`; the second ends the process at once.

    The exit code of that is 128 + the signal's number. Outside the main thread, where Python delivers no signals,
    it does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)  # not SystemExit: `finally` blocks could take as long as the save that hangs
        self.requested = signal.Signals(number)


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
    """Skips an update whose loss or gradient norm stands far above the last accepted ones (as OLMo-core does).

    A value is a spike if it exceeds mean + `spike_sigma` · standard deviation of the last `spike_window` accepted
    values. Only upwards: a fast fall of the loss is never a spike. Judging begins once 32 values (or a full window,
    if that is shorter) are in. The window never takes in a spike, so one outlier does not hide the next.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_observed = 0
        self.num_skipped = 0
        self.num_consecutive = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._grad_norms: deque[float] = deque(maxlen=config.spike_window)

    def observe(self, loss: float, grad_norm: float) -> bool:
        """Take in one optimiser step's loss and gradient norm; True means: skip this update.

        Raises `TrainingHalted` at the `max_skips`-th skip in a row.
        """
        loss, grad_norm = float(loss), float(grad_norm)
        self.num_observed += 1
        loss_limit, norm_limit = self._limit(self._losses), self._limit(self._grad_norms)
        if loss <= loss_limit and grad_norm <= norm_limit:
            self.num_consecutive = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            return False
        self.num_skipped += 1
        self.num_consecutive += 1
        if self.num_consecutive >= self.config.max_skips:
            raise TrainingHalted(
                f"step {self.num_observed}: {self.num_consecutive} updates in a row were skipped as spikes "
                f"(loss {loss:.4g}, limit {loss_limit:.4g}; gradient norm {grad_norm:.4g}, limit {norm_limit:.4g}). "
                f"The weights are those of step {self.num_observed - self.num_consecutive}. Lower optim.lr, raise "
                f"schedule.warmup_steps, or look at the data around step "
                f"{self.num_observed - self.num_consecutive + 1}; then start the run again, and it resumes from its "
                f"newest checkpoint (guard.spike_sigma = null turns this guard off)"
            )
        return True

    def _limit(self, values: deque[float]) -> float:
        """The largest value that is not a spike; NaN and Inf are above every limit."""
        if self.config.spike_sigma is None or len(values) < min(_LEAST_OBSERVATIONS, self.config.spike_window):
            return sys.float_info.max
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return mean + self.config.spike_sigma * max(std, _STD_FLOOR * abs(mean))

    def state_dict(self) -> dict[str, Any]:
        """The window and the counts as plain JSON values; Python's JSON returns floats bit for bit."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "num_observed": self.num_observed,
            "num_skipped": self.num_skipped,
            "num_consecutive": self.num_consecutive,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; a window shortened since then keeps its newest values."""
        self._losses = deque(state["losses"], maxlen=self.config.spike_window)
        self._grad_norms = deque(state["grad_norms"], maxlen=self.config.spike_window)
        self.num_observed = state["num_observed"]
        self.num_skipped = state["num_skipped"]
        self.num_consecutive = state["num_consecutive"]
