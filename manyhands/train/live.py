"""The terminal a run is shown on: drawn again when it gets another size, its keys obeyed, given back at the end.

Refreshed when told to, and from a thread only while something is done that makes no steps.
"""

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from manyhands.format import duration
from manyhands.train.keys import Keys

_BUSY_SECONDS = 0.5  # between two looks at the clock
_AGAIN_SECONDS = 5.0  # in which q is to be pressed again
_NOTES = 50
_HINT = "q: save and stop   ?: what the figures are"
_SURE = "q again: save and stop; the run can be continued"
_STOPPING = "stopping: what was trained is saved first"
_HELP = (
    "bits/byte: the loss per byte of text, whatever the tokenizer; norm: the gradient's; MaxVio: by how much the "
    "busiest expert is above its share, 0 is even; dead: experts that got no token; a strip has a cell for each "
    "expert, the fuller the more tokens"
)


class LiveView:
    """`start`, `refresh` as often as there is something new, `stop`. `draw` gives the lines of the view."""

    def __init__(self, console: Console, draw: Callable[[], list[RenderableType]]) -> None:
        self._console, self._draw = console, draw
        self._live = Live(console=console, auto_refresh=False)
        self._size = console.size
        self._lock = threading.RLock()
        self._keys = Keys()
        self._notes: deque[Text] = deque(maxlen=_NOTES)
        self._doing: tuple[str, float] | None = None
        self._asked_at = float("-inf")
        self._help = self._stopping = self._running = False

    def start(self) -> None:
        """Take the terminal."""
        self._live.start()
        self._keys.open()
        self._running = True

    def refresh(self) -> None:
        """Draw the view as it is now; anew, with the notes above it, if the terminal's size is another: it was torn."""
        with self._lock:
            self._obey(self._keys.pressed())
            if (size := self._console.size) != self._size:
                self._size = size
                self._live.stop()
                self._console.clear()
                for note in self._notes:
                    self._console.print(note, soft_wrap=True)
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(Group(*self._draw(), *self._below()), refresh=True)

    def note(self, text: Text) -> None:
        """A line that stays, above the view."""
        with self._lock:
            self._notes.append(text)
            self._console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def busy(self, what: str, refresh: Callable[[], None]) -> Iterator[None]:
        """While `what` is done, show for how long; `refresh` is called meanwhile, in a thread."""

        def look() -> None:
            while not ended.wait(_BUSY_SECONDS):
                refresh()

        ended, before = threading.Event(), self._doing
        self._doing = what, time.monotonic()
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._doing = before

    def stop(self) -> None:
        """Draw the view a last time, without what is for keys, and give the terminal back."""
        self._keys.close()
        if not self._running:
            return
        self._running = False
        with self._lock:
            self._help, self._doing = False, None
            with contextlib.suppress(Exception):
                self._live.update(Group(*self._draw()), refresh=True)
            self._live.stop()

    def give_back(self) -> None:
        """The terminal as it was, for who ends the process at once; from any thread, and from a signal's handler."""
        self._keys.close()
        with contextlib.suppress(Exception):
            os.write(self._console.file.fileno(), b"\x1b[?25h")  # the cursor is seen again

    def _obey(self, keys: str) -> None:
        """Do as a person asks who pressed `keys`."""
        for key in keys:
            now = time.monotonic()
            if key == "?":
                self._help = not self._help
            if key not in "qQ":
                self._asked_at = float("-inf")
            elif now - self._asked_at > _AGAIN_SECONDS:
                self._asked_at = now
            elif not self._stopping:
                self._stopping = True
                signal.raise_signal(signal.SIGINT)  # as Ctrl-C, which saves; another would end it at once

    def _below(self) -> Iterator[Text]:
        """Under the view: what is done at the moment, and what keys there are."""
        now = time.monotonic()
        if self._doing is not None:
            what, since = self._doing
            yield Text(f"{what}, {duration(now - since)}", "yellow")
        if self._help:
            yield Text(_HELP, "dim")
        if self._stopping:
            yield Text(_STOPPING, "yellow")
        elif self._keys.open_now:
            sure = now - self._asked_at <= _AGAIN_SECONDS
            yield Text(_SURE if sure else _HINT, "yellow" if sure else "dim", no_wrap=True, overflow="ellipsis")
