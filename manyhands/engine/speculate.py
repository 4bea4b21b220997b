"""Guessing what comes next: what followed when a request's last tokens stood in it before. Needs no torch.

Prompt lookup: https://github.com/apoorvumang/prompt-lookup-decoding. Guessed tokens run in one pass with the last one,
and count as far as each is the token that is drawn there.
"""

from collections.abc import Sequence

LONGEST = 3
"""Tokens at the end that are looked up, first so many, at last one."""
MOST_DRAFTED = 64
"""Logits of all of a draft are wanted at once: a row of them is as wide as the vocabulary."""


class Lookup:
    """One sequence, as far as it was read: where each run of up to `LONGEST` tokens ended last."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        """By such a run the position behind it, if there is a token."""

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return len(self._ids)

    def read(self, ids: Sequence[int]) -> None:
        """The sequence's next tokens."""
        for token in ids:
            end = len(self._ids)
            for first in range(max(0, end - LONGEST), end):
                self._next[tuple(self._ids[first:])] = end
            self._ids.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens: what followed the longest known end, at its latest place before.

        What followed reaches the end of the sequence and goes on in the draft itself: a text that repeats itself is
        taken to go on so. Nothing if even the last token is new.
        """
        if most <= 0:
            return []
        for size in range(min(LONGEST, len(self._ids)), 0, -1):
            at = self._next.get(tuple(self._ids[-size:]))
            if at is not None:
                found = self._ids[at : at + most]
                period = len(self._ids) - at
                while len(found) < most:
                    found.append(found[-period])
                return found
        return []
