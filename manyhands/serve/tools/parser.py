"""An answer's text, parted into what is said, what is thought and what is called, while it comes.

    parser = parser_of(template, prompt_end, schemas)
    for delta in parser.feed(text): …       # {"content": …}, {"reasoning_content": …} or {"tool_calls": […]}
    for delta in parser.finish(): …

However the text is cut, the deltas put together are the same. What looks like a call and is none is said as it stands;
nothing raises. A call comes in two deltas, its name and its arguments, when all of it is there.
"""

import secrets
from typing import Any

from manyhands.serve.tools.calls import Call, Malformed, Schemas
from manyhands.serve.tools.formats import HARMONY, Format, format_of
from manyhands.serve.tools.harmony import Harmony
from manyhands.text.answer import Answer

Delta = dict[str, Any]


class Calls:
    """Content only: what of it is calls in one format."""

    def __init__(self, format: Format, schemas: Schemas) -> None:
        self._format, self._schemas = format, schemas
        self._held = ""
        self._mark: str | None = None  # the mark that opened the block we are in
        self._begun = False
        self._fresh = True  # at the beginning or after a call: blanks in front of a call are not said
        self.count = 0

    def feed(self, text: str) -> list[Delta]:
        """What became certain."""
        self._held += text
        found: list[Delta] = []
        while (more := self._next()) is not None:
            found += more
        return found

    def finish(self) -> list[Delta]:
        """What was held back."""
        found: list[Delta] = []
        if self._mark is not None:
            found = self._block(self._held, "")
        elif self._held and (self._held.strip() or not self.count):
            found = [{"content": self._held}]
        self._held = ""
        return found

    def _next(self) -> list[Delta] | None:
        """The next of what is held, or None where more must come first."""
        if not self._held:
            return None
        return self._in_text() if self._mark is None else self._in_block()

    def _in_text(self) -> list[Delta] | None:
        if self._format.bare and not self._begun:
            begin = self._held.lstrip()
            if not begin:
                return None
            self._begun = True
            if begin.startswith("{"):
                self._mark = ""
                return []
        self._begun = True
        places = [(at, mark) for mark in self._format.opens if (at := self._held.find(mark)) >= 0]
        if places:
            at, self._mark = min(places)
            said, self._held = self._held[:at], self._held[at + len(self._mark) :]
            return [{"content": said}] if said and (said.strip() or not self._fresh) else []
        cut = held_back(self._held, self._format.opens)
        said = self._held[: len(self._held) - cut]
        if not said or (self._fresh and not said.strip()):
            return None
        self._held, self._fresh = self._held[len(said) :], False
        return [{"content": said}]

    def _in_block(self) -> list[Delta] | None:
        opens, closes = self._format.opens, self._format.closes
        ends = (closes[opens.index(self._mark)],) if closes and self._mark in opens else opens
        places = [(at, mark) for mark in ends if (at := self._held.find(mark)) >= 0]
        if not places:
            return None
        at, mark = min(places)
        body = self._held[:at]
        close = mark if self._format.closes else ""
        self._held = self._held[at + len(close) :]
        return self._block(body, close)

    def _block(self, body: str, close: str) -> list[Delta]:
        """A block that has ended."""
        mark, self._mark = self._mark or "", None
        try:
            text = mark + body + close if mark == "<function=" else body
            calls = self._format.read(text, self._schemas)
        except Malformed:
            said = mark + body + close
            return [{"content": said}] if said else []
        found: list[Delta] = []
        self._fresh = True
        for call in calls:
            found += deltas_of(call, self.count)
            self.count += 1
        return found


class Parts:
    """Thought and word of a whole answer, and calls in the words."""

    def __init__(self, template: str, prompt_end: str, calls: Calls | None) -> None:
        self._answer, self._calls = Answer(template, prompt_end), calls

    def feed(self, text: str) -> list[Delta]:
        """What became certain."""
        return self._deltas(self._answer.push(text))

    def finish(self) -> list[Delta]:
        """What was held back."""
        found = self._deltas([piece for piece in self._answer.finish() if piece[1]])
        return found + (self._calls.finish() if self._calls is not None else [])

    def _deltas(self, pieces: list[tuple[bool, str]]) -> list[Delta]:
        found: list[Delta] = []
        for thought, text in pieces:
            if thought:
                found.append({"reasoning_content": text})
            elif self._calls is None:
                found.append({"content": text})
            else:
                found += self._calls.feed(text)
        return found


def parser_of(template: str, prompt_end: str, schemas: Schemas | None) -> "Parts | Harmony":
    """For a model of this chat template. `schemas` None: no tools were offered, and nothing is a call."""
    if schemas is None:
        return Parts(template, prompt_end, None)
    format = format_of(template)
    if format is HARMONY:
        return Harmony(deltas_of)
    return Parts(template, prompt_end, Calls(format, schemas))


def deltas_of(call: Call, index: int) -> list[Delta]:
    """Its name, then its arguments."""
    id = call.id or f"call_{secrets.token_hex(12)}"
    begin = {"index": index, "id": id, "type": "function", "function": {"name": call.name, "arguments": ""}}
    return [
        {"tool_calls": [begin]},
        {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]},
    ]


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a mark begins with."""
    longest = max(map(len, marks), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
