"""Tokens to text while they arrive: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from manyhands.text import StreamDecoder


class TextStream:
    """The text of one sequence, piece by piece.

    A stop string may begin in one token and end in another, so text that could be the beginning of one is held
    back until it is decided. The pieces together are the text up to the stop string that is complete first (the
    longest, if several end there), or all of it.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string was found. Nothing may be pushed after it."""
        self.found: str | None = None
        """Which."""
        self._decoder = decoder
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this token made certain; often a word, sometimes nothing."""
        return self._advance(self._decoder.push(token_id))

    def finish(self) -> str:
        """What was held back, when no more tokens come. An unfinished character is U+FFFD."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _advance(self, new: str) -> str:
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            end, at = min(found)
            self.found = text[at:end]
            self._held = ""
            return text[:at]
        safe = len(text) - self._undecided(text)
        self._held = text[safe:]
        return text[:safe]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
