"""Signals that ask a run to stop: noted, agreed on by all ranks, obeyed between two steps."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from manyhands.errors import Interrupted
from manyhands.parallel.ranks import Ranks, largest_of

_GRACE_SECONDS = 2.0  # for a native call to end before a signal ends the process without clean-up


class StopSignals:
    """Inside the block the first SIGTERM or SIGINT is noted in `requested`; the second ends the process at once.

    The exit code of that is 128 + the signal's number. Python runs handlers between two of its own instructions, so a
    long native call would delay them: a thread that waits for the signals' numbers on a pipe does not wait for it.
    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.speaks: Callable[[int], bool] = lambda exit_code: True
        """Asked before a message that this process ends with: of several that end, one says why."""
        self.leaving: Callable[[], None] = lambda: None
        """Called before the process ends at once, from any thread: the terminal is given back."""
        self._before: dict[signal.Signals, Any] = {}
        self._preparing = False
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._wakeup = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True)
            self._thread.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._pipe is not None and self._thread is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # ends the thread
            self._thread.join()
            os.close(self._pipe[0])
            self._pipe = self._thread = None

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """While there is nothing to save: the first signal raises `Interrupted`, within seconds whatever is running."""
        self._preparing = True
        try:
            yield
        finally:
            self._preparing = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            self.leaving()
            os._exit(128 + number)  # not SystemExit: `finally` blocks could take as long as the save that hangs
        self.requested = signal.Signals(number)
        if self._preparing:
            self._preparing = False
            raise _nothing_saved(self.requested)

    def _watch(self, pipe: int) -> None:
        """The same for a main thread that is in a native call."""
        seen = 0
        while arrived := os.read(pipe, 1):
            number = arrived[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            seen += 1
            if seen > 1:
                self.leaving()
                os._exit(128 + number)
            if self._preparing and not select.select([pipe], [], [], _GRACE_SECONDS)[0] and self._preparing:
                self.leaving()
                if self.speaks(128 + number):
                    print(f"manyhands: {_nothing_saved(signal.Signals(number))}", file=sys.stderr, flush=True)
                os._exit(128 + number)


def _nothing_saved(number: signal.Signals) -> Interrupted:
    stopped = Interrupted(f"{number.name} before the first step: nothing was trained; start again")
    stopped.exit_code = 128 + number
    return stopped


def agreed(signals: StopSignals, ranks: Ranks) -> signal.Signals | None:
    """The signal that any rank was sent; all of them get the same answer, so that all stop after the same step."""
    [number] = largest_of([float(signals.requested or 0)], ranks)
    return signal.Signals(int(number)) if number else None
