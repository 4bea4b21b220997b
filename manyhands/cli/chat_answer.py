"""An answer of `manyhands chat` as it comes: words and thoughts, or tokens with their experts."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from manyhands.terminal import clean

if TYPE_CHECKING:
    from manyhands.generate import Conversation, Step
    from manyhands.text import Tokenizer


def print_answer(conversation: "Conversation", steps: "Iterator[Step]", show_routing: bool) -> tuple[int, float | None]:
    """Print it as it comes; how many tokens it has, and what those after the first took."""
    number, reason, began = 0, None, 0.0
    answer, screen = conversation.reader(), _Screen()
    for step in steps:
        number, reason = number + 1, step.finish_reasons[0]
        began = began or time.monotonic()
        if show_routing:
            _print_routing(conversation.tokenizer, step)
        else:
            screen.show(answer.push(step.texts[0]))
    seconds = time.monotonic() - began if number else None
    if not show_routing:
        screen.show(answer.finish())
        print(flush=True)
    if reason == "length":
        full = number < conversation.sampling.max_new_tokens
        why = (
            "the context is full: /reset starts anew, or the next turn leaves out the oldest"
            if full
            else f"--max-new-tokens {number}"
        )
        print(f"[cut off: {why}]", file=sys.stderr)
    return number, seconds


class _Screen:
    """An answer as it comes: its words, and on a terminal its thoughts before them, dimmed."""

    def __init__(self) -> None:
        self._thinking = False
        self._terminal = sys.stdout.isatty()

    def show(self, pieces: list[tuple[bool, str]]) -> None:
        for thought, text in pieces:
            if thought and not self._terminal:
                continue
            text = clean(text)
            if not thought and self._thinking:
                print()
            self._thinking = thought
            print(f"\x1b[2m{text}\x1b[0m" if thought else text, end="", flush=True)


def _print_routing(tokenizer: "Tokenizer", step: "Step") -> None:
    from rich.console import Console

    from manyhands.generate.show_routing import routing_line

    token = step.token_ids[0]
    assert token is not None
    text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
    Console(highlight=False, soft_wrap=True).print(routing_line(text, step.routings[0]))
