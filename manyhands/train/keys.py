"""Keys that a person presses while a run is shown: read as they come, without Return, and only while nobody else reads.

The terminal is in another mode meanwhile, and must be given back on every way out.
"""

import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

_MOST = 64  # bytes of one look: what was pasted into the terminal by mistake


class Keys:
    """`open`, then `pressed` from time to time, then `close`. Without such a terminal nothing ever is pressed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdin if stream is None else stream
        self._number: int | None = None
        self._before: list[Any] = []

    def open(self) -> None:
        """Read keys one by one, if standard input is a terminal that this process has the use of."""
        with suppress(ImportError, OSError, ValueError, AttributeError):  # Windows; no terminal; closed; None
            import termios
            import tty

            number = self._stream.fileno()
            if not os.isatty(number) or not _in_front(number):
                return
            before = termios.tcgetattr(number)
            tty.setcbreak(number, termios.TCSAFLUSH)  # Ctrl-C stays a signal; what was typed before is not meant
            self._number, self._before = number, before

    @property
    def open_now(self) -> bool:
        """Whether keys are read."""
        return self._number is not None

    def pressed(self) -> str:
        """What was pressed since the last look."""
        if self._number is None:
            return ""
        with suppress(OSError, ValueError):
            if _in_front(self._number) and select.select([self._number], [], [], 0)[0]:
                return os.read(self._number, _MOST).decode("utf-8", "replace")
        return ""

    def close(self) -> None:
        """Give the terminal back. May be called from a signal handler, and more than once."""
        number, self._number = self._number, None
        if number is None:
            return
        with suppress(Exception):
            import termios

            if _in_front(number):  # else the shell has its own mode, and asking for another would stop this process
                termios.tcsetattr(number, termios.TCSANOW, self._before)


def _in_front(number: int) -> bool:
    """Whether the terminal is this process's to read: a job in the background that reads it is stopped."""
    return os.tcgetpgrp(number) == os.getpgrp()
