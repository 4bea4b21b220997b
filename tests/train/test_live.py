"""The terminal of a run: another size, keys, what takes long, and that it is given back."""

import io
import os
import pty
import select
import signal
import termios
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from manyhands.train import keys, live
from manyhands.train.live import LiveView
from manyhands.train.screen import Screen
from manyhands.train.signals import StopSignals


@pytest.fixture
def view() -> Iterator[LiveView]:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=20, legacy_windows=False)
    found = LiveView(console, lambda: [Text("the figures")])
    found.start()
    yield found
    found.stop()


def drawn(view: LiveView) -> str:
    """What was written since the last look."""
    file = view._console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    file.seek(0)
    file.truncate()
    return text


def test_another_size_begins_a_new_screen(view: LiveView) -> None:
    view.note(Text("a remark"))
    view.refresh()
    assert "\x1b[2J" not in drawn(view)
    view._console.size = (30, 20)  # type: ignore[assignment]
    view.refresh()
    _, clear, after = drawn(view).partition("\x1b[2J")
    assert clear and after.index("a remark") < after.index("the figures")
    view.refresh()
    assert "\x1b[2J" not in drawn(view)


def test_keys_are_obeyed(view: LiveView, monkeypatch: pytest.MonkeyPatch) -> None:
    """q twice within seconds asks for what Ctrl-C does, once; another key, or time, takes it back."""
    asked: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(keys.Keys, "open_now", property(lambda self: True))
    typed: list[str] = []
    monkeypatch.setattr(keys.Keys, "pressed", lambda self: typed.pop() if typed else "")

    def press(key: str, later: float = 0.0) -> str:
        clock[0] += later
        typed.append(key)
        view.refresh()
        return drawn(view)

    try:
        assert "q: save and stop" in press("")
        assert "MaxVio: by how much" in press("?") and "MaxVio" not in press("?")
        assert "q again" in press("q") and "q: save and stop" in press("x")
        assert "q again" in press("q") and "q again" in press("q", later=6.0) and not asked
        assert "stopping" in press("q", later=1.0) and asked == [signal.SIGINT]
        assert "stopping" in press("qq") and len(asked) == 1
    finally:
        signal.signal(signal.SIGINT, handler)


def test_what_takes_long_is_shown(view: LiveView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_BUSY_SECONDS", 0.001)
    seen = threading.Event()

    def refresh() -> None:
        view.refresh()
        seen.set()

    with view.busy("validating", refresh):
        assert seen.wait(10)
    assert "validating, 0s" in drawn(view)
    view.refresh()
    assert "validating" not in drawn(view)


def test_a_screen_that_is_no_terminal_is_never_busy() -> None:
    out = io.StringIO()
    before = threading.active_count()
    with Screen("t", 10, file=out) as screen, screen.busy("validating"):
        assert threading.active_count() == before
    screen.give_back()
    assert "validating" not in out.getvalue()


def test_the_terminal_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr(keys, "_in_front", lambda number: True)  # it is not this process's controlling terminal
    before = termios.tcgetattr(theirs)
    with open(theirs, encoding="utf-8") as stream:
        found = keys.Keys(stream)
        assert found.pressed() == ""
        os.write(ours, b"qq\n")  # typed before: not meant for this
        assert select.select([theirs], [], [], 10)[0]  # it has arrived
        found.open()
        assert not termios.tcgetattr(theirs)[3] & (termios.ICANON | termios.ECHO) and found.pressed() == ""
        assert termios.tcgetattr(theirs)[3] & termios.ISIG  # Ctrl-C stays a signal
        os.write(ours, b"q?")
        assert select.select([theirs], [], [], 10)[0]
        assert found.pressed() == "q?"
        found.close()
        found.close()
        assert termios.tcgetattr(theirs) == before and found.pressed() == ""
        monkeypatch.setattr(keys, "_in_front", lambda number: False)
        found.open()
        assert not found.open_now and termios.tcgetattr(theirs) == before
    os.close(ours)


def test_the_second_signal_gives_it_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        done.append(code)
        raise Ended

    monkeypatch.setattr("manyhands.train.signals.os._exit", end)
    signals = StopSignals()
    signals.leaving = lambda: done.append("given back")
    signals._note(signal.SIGTERM, None)
    with pytest.raises(Ended):
        signals._note(signal.SIGTERM, None)
    assert done == ["given back", 128 + signal.SIGTERM]
