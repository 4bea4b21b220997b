"""What a person sees while a model trains: a live view on a terminal, plain lines anywhere else.

Reads the journal's records. Nothing here may end a run, but a person who presses q twice: a display that fails is
turned off.
"""

import contextlib
import functools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from manyhands.format import compact, duration, number
from manyhands.terminal import shown
from manyhands.trace.strip import strip
from manyhands.train.live import LiveView

P = ParamSpec("P")
Record = dict[str, Any]

_LIVE_SECONDS = 0.2
_PLAIN_SECONDS = 5.0
_SPEED_WINDOW = 50  # steps over which the time left is estimated
_OTHER_LINES = 10  # lines of the live view that are not strips


def _harmless(method: "Callable[Concatenate[Screen, P], None]") -> "Callable[Concatenate[Screen, P], None]":
    """A failing display (closed pipe, odd terminal, odd record) goes dark; training goes on."""

    @functools.wraps(method)
    def guarded(self: "Screen", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.dark:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.dark = True
            self._close()
            logging.getLogger(__name__).warning("display turned off: %s: %s", type(error).__name__, error)

    return guarded


class _Console(Console):
    """rich ends the program when nobody reads its output any more; a training run goes on without."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # later prints, and the flush at exit, must not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise BrokenPipeError("nobody reads the output")


class Screen:
    """`with Screen(title, max_steps) as screen:` then hand it records as the journal returns them.

    quiet   show nothing.
    file    where to; a terminal gets the live view, anything else one line every few seconds.
    """

    def __init__(self, title: str, max_steps: int, quiet: bool = False, file: TextIO | None = None) -> None:
        self.dark = quiet
        self._title = title
        self._about = ""
        self._max_steps = max_steps
        self._last: Record | None = None
        self._last_eval: Record | None = None
        self._elapsed: deque[tuple[int, float]] = deque(maxlen=_SPEED_WINDOW)
        self._shown_at = float("-inf")
        self._shown: Record | None = None
        self._live: LiveView | None = None
        out = sys.stdout if file is None else file
        on_terminal = out.isatty()
        self._console = _Console(file=out, force_terminal=on_terminal, highlight=False, markup=False, emoji=False)
        self._ascii = self._console.options.ascii_only
        if on_terminal and not self._console.is_dumb_terminal:
            self._live = LiveView(self._console, self._view)
        self._progress = Progress(
            BarColumn(bar_width=None, complete_style="green", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=max_steps, left="")

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._close()

    @_harmless
    def start(self, record: Record) -> None:
        """Show what is being trained, from the journal's `start` record."""
        self._about = f"{compact(record['parameters'])} parameters"
        if record.get("sparse_layers"):
            self._about += (
                f", {compact(record['active_parameters'])} active per token"
                f"{self._dot}{record['num_experts']} experts, {record['num_experts_per_tok']} per token"
            )
        if "trained_parameters" in record:
            self._about += f"{self._dot}{compact(record['trained_parameters'])} of them trained"
        if self._live is None:
            self._console.print(self._about, soft_wrap=True)

    @_harmless
    def step(self, record: Record) -> None:
        """Show a `step` record."""
        self._last = record
        self._elapsed.append((record["step"], record["elapsed"]))
        now = time.monotonic()
        if self._live is not None:
            if now - self._shown_at >= _LIVE_SECONDS:
                self._shown_at = now
                self._live.refresh()
        elif now - self._shown_at >= _PLAIN_SECONDS or record["step"] >= self._max_steps:
            self._shown_at = now
            self._shown = record
            self._console.print(self._line(record), soft_wrap=True)

    @_harmless
    def eval(self, record: Record) -> None:
        """Show an `eval` record."""
        self._last_eval = record
        if self._live is not None:
            self._live.refresh()
        else:
            self._console.print(self._eval_line(record), soft_wrap=True)

    @_harmless
    def note(self, text: str) -> None:
        """Print a line that stays."""
        line = Text(shown(text))
        if self._live is not None:
            self._live.note(line)
        else:
            self._console.print(line, soft_wrap=True)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While `what` is done, which makes no steps, a live view goes on: it shows for how long."""
        with contextlib.nullcontext() if self.dark or self._live is None else self._live.busy(what, self._refresh):
            yield

    def give_back(self) -> None:
        """The terminal as it was, for who ends the process at once; from any thread."""
        if self._live is not None and not self.dark:
            self._live.give_back()

    @_harmless
    def set_max_steps(self, max_steps: int) -> None:
        """Change the number of steps the run will take."""
        self._max_steps = max_steps
        self._progress.update(self._task, total=max_steps)

    @property
    def _dot(self) -> str:
        return ", " if self._ascii else " · "

    @_harmless
    def _open(self) -> None:
        if self._live is None:
            self._console.print(shown(self._title))
        else:
            self._live.start()

    def _close(self) -> None:
        """Give the cursor and `sys.stdout` back, whatever state the display is in."""
        if self._live is not None:
            with contextlib.suppress(Exception):
                self._live.stop()

    @_harmless
    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    @_harmless
    def _finish(self) -> None:
        if self._live is None and self._last is not None and self._last is not self._shown:
            self._console.print(self._line(self._last), soft_wrap=True)

    def _seconds_left(self) -> float | None:
        if len(self._elapsed) < 2:
            return None
        (first, began), (last, ended) = self._elapsed[0], self._elapsed[-1]
        if last <= first or ended <= began:
            return None
        return max(0, self._max_steps - last) * (ended - began) / (last - first)

    def _left(self) -> str:
        seconds = self._seconds_left()
        return "" if seconds is None else f"{duration(seconds)} left"

    def _line(self, record: Record) -> str:
        parts = [
            f"step {record['step']}/{self._max_steps}",
            _epochs(record),
            f"loss {number(record['loss'])}",
            f"bpb {number(record.get('bits_per_byte'))}",
            f"{compact(record['tokens_per_s'])} tok/s",
            self._left(),
        ]
        if moe := record.get("moe"):
            worst = max((layer["max_vio"] for layer in moe.values() if layer["max_vio"] is not None), default=None)
            parts.append(f"maxvio {number(worst, 2)} dead {sum(layer['dead'] for layer in moe.values())}")
        if record.get("skipped"):
            parts.append("update skipped")
        return "  ".join(part for part in parts if part).replace("–", "-")

    def _eval_line(self, record: Record) -> str:
        return (
            f"validation at step {record['step']}:  loss {number(record['valid_loss'])}"
            f"  bits/byte {number(record['valid_bits_per_byte'])}  perplexity {number(record['valid_perplexity'], 2)}"
        ).replace("–", "-")

    def _view(self) -> list[RenderableType]:
        step = self._last["step"] if self._last else 0
        self._progress.update(self._task, completed=step, left=self._left())
        head = Text(shown(self._title), "bold", no_wrap=True, overflow="ellipsis")
        if self._about:
            head.append(f"{self._dot}{self._about}", "not bold dim")
        lines: list[RenderableType] = [head, self._progress.get_renderable()]
        if self._last is not None:
            lines.append(self._numbers(self._last))
            if self._last.get("moe"):
                lines.append(self._strips(self._last["moe"]))
        if self._last_eval is not None:
            lines.append(Text(self._eval_line(self._last_eval), "cyan"))
        return lines

    def _numbers(self, record: Record) -> Text:
        text = Text()
        for name, value in (
            ("loss", number(record["loss"])),
            ("bits/byte", number(record.get("bits_per_byte"))),
            ("tok/s", compact(record["tokens_per_s"])),
            ("lr", f"{record['lr']:.2e}"),
            ("norm", number(record.get("grad_norm"), 2)),
            *([("epoch", number(record["epochs"], 2))] if record.get("epochs") is not None else []),
        ):
            text.append(f"{'  ' if text else ''}{name} ", "dim").append(value.replace("–", "-"), "bold")
        if record.get("skipped"):
            text.append("  update skipped", "yellow")
        return text

    def _strips(self, moe: dict[str, Record]) -> RenderableType:
        """One row per sparse layer; the worst of them where the terminal is too low for all."""
        room = max(1, self._console.height - _OTHER_LINES)
        worst_first = sorted(moe, key=lambda layer: -(moe[layer]["max_vio"] or 0))
        table = Table.grid(padding=(0, 2))
        for layer in sorted(worst_first[:room], key=int):
            values = moe[layer]
            dead = values["dead"]
            table.add_row(
                Text(f"layer {layer}", "dim"),
                strip(values["load"], max(8, self._console.width - 40), self._ascii),
                Text(f"MaxVio {number(values['max_vio'], 2)}".replace("–", "-")),
                Text(f"dead {dead}", "red" if dead else "dim"),
            )
        hidden = len(moe) - room
        return Group(table, Text(f"and {hidden} calmer layers", "dim")) if hidden > 0 else table


def _epochs(record: Record) -> str:
    """How often the text was seen."""
    return "" if record.get("epochs") is None else f"epoch {number(record['epochs'], 2)}"
