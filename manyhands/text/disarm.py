"""Messages that spell a special token, kept apart from the special tokens that the template writes.

A template pastes messages into its text, and `<|im_end|>` in a message looks there like the template's own: whoever
writes a message (or a web page that is quoted in one) could end the turn and speak as the system. So the special tokens
in messages are marked before rendering, the marks are found again in the rendered text, and what stands there is
encoded as the letters it is written with.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import Encoding

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters: Unicode keeps them for a program's own use. Written in a message beside a special token, they go."""
_OPEN_ESCAPED = r"\ufdd0"
_MARKS = re.compile(rf"[{_OPEN}{_CLOSE}]|\\ufdd[01]", re.IGNORECASE)
"""Also as a template's JSON may escape them."""


def pattern_of(special: Iterable[str]) -> re.Pattern[str]:
    """What finds any of the special tokens, the longest first."""
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token) or "(?!)")


def holds(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether a special token is spelled anywhere in messages (or tools, or documents)."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(holds(item, pattern) for item in value.values())
    return isinstance(value, Sequence) and any(holds(item, pattern) for item in value)


def mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """The same, with marks around each."""
    if isinstance(value, str):
        return pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", _MARKS.sub("", value))
    if isinstance(value, Mapping):
        return {name: mark(item, pattern) for name, item in value.items()}
    return [mark(item, pattern) for item in value] if isinstance(value, Sequence) else value


def unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without its marks, and the spans [start, end) that were marked.

    A template that cuts messages up can tear a pair apart; a mark without its partner covers the character that it
    stood at. A span is empty where a template took out what was in it.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    opened: int | None = None
    length = last = 0
    for found in _MARKS.finditer(text):
        pieces.append(text[last : found.start()])
        length += len(pieces[-1])
        last = found.end()
        if found[0].lower().endswith((_OPEN, _OPEN_ESCAPED)):
            if opened is not None:
                spans.append((opened, opened + 1))
            opened = length
        else:
            spans.append((length - 1 if opened is None else opened, length))
            opened = None
    if opened is not None:
        spans.append((opened, opened + 1))
    return "".join([*pieces, text[last:]]), spans


def spelled_out(
    encoding: Encoding,
    text: str,
    spans: Sequence[tuple[int, int]],
    special: frozenset[int],
    spell: Callable[[str], list[int]],
) -> list[int]:
    """The ids of `encoding`, which is that of `text`; special tokens that touch a span are `spell`ed as letters."""
    spell = cache(spell)
    ids: list[int] = []
    spans = sorted(spans)
    first = 0  # of the spans that end behind the token's beginning; there may be as many spans as tokens
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        touched = token_id in special and first < len(spans) and spans[first][0] < end
        ids += spell(text[start:end]) if touched else [token_id]
    return ids
