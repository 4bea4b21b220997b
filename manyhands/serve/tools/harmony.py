"""gpt-oss's answers: channels. `analysis` is thought, `final` is said, what has a recipient `functions.…` is a call.

A header, `<|start|>assistant<|channel|>commentary to=functions.name <|constrain|>json<|message|>`, then its text up to
`<|end|>`, `<|call|>`, `<|return|>` or the next header (openai/harmony's format).
"""

import re
from collections.abc import Callable
from typing import Any

from manyhands.serve.tools.calls import Call, Malformed, dumps, loads

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_HEADER = ("<|channel|>", "<|start|>", "to=")
_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")

Delta = dict[str, Any]


class Harmony:
    """One answer."""

    def __init__(self, deltas_of: Callable[[Call, int], list[Delta]]) -> None:
        self._deltas_of = deltas_of
        self._held = ""
        self._where = "start"
        self._channel = "final"
        self._to = ""
        self._body = ""
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
        held, self._held = self._held, ""
        if self._where == "header":
            return []
        return self._say(held) + self._end()

    def _next(self) -> list[Delta] | None:
        if not self._held:
            return None
        if self._where == "start":
            begin = self._held.lstrip()
            if not begin or any(mark.startswith(begin) and mark != begin for mark in _HEADER):
                return None
            self._where = "header" if begin.startswith(_HEADER) else "body"
        if self._where == "header":
            header, found, rest = self._held.partition(_MESSAGE)
            if not found:
                return None
            name, to = _NAME.search(header), _RECIPIENT.search(header)
            self._channel, self._to = name[1] if name else "final", to[1] if to else ""
            self._held, self._where = rest, "body"
            return []
        places = [at for mark in _ENDS if (at := self._held.find(mark)) >= 0]
        if places:
            text, self._held = self._held[: min(places)], self._held[min(places) :]
            found_now = self._say(text) + self._end()
            self._where = "header"
            for mark in ("<|end|>", "<|return|>", "<|call|>"):
                if self._held.startswith(mark):
                    self._held, self._where = self._held.removeprefix(mark), "between"
            return found_now
        if self._where == "between":
            begin = self._held.lstrip()
            if not begin:
                return None
            if any(mark.startswith(begin) for mark in _ENDS):
                return None
            self._where, self._channel, self._to = "body", "final", ""
        cut = self._cut()
        text, self._held = self._held[: len(self._held) - cut], self._held[len(self._held) - cut :]
        return self._say(text) if text else None

    def _cut(self) -> int:
        for length in range(min(len(self._held), 10), 0, -1):
            if any(mark.startswith(self._held[-length:]) for mark in _ENDS):
                return length
        return 0

    def _say(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._to:
            self._body += text
            return []
        return [{"reasoning_content" if self._channel == "analysis" else "content": text}]

    def _end(self) -> list[Delta]:
        """The channel has ended: what it called."""
        to, body = self._to, self._body
        self._to, self._body = "", ""
        if not to:
            return []
        try:
            arguments = loads(body.strip() or "{}")
            if not isinstance(arguments, dict):
                raise Malformed
            call = Call(to.removeprefix("functions."), dumps(arguments))
        except Malformed:
            return [{"content": body}]
        self.count += 1
        return self._deltas_of(call, self.count - 1)
