"""What the model wrote in a conversation: the bodies of `{% generation %}` blocks, found by marks around them.

The process for templates writes U+FDD2 and U+FDD3 (`origin.MARKS`), characters of no text, around each block. They go
where the text goes: through `{% set %}` blocks, macros and filters, where a tracker that counts the characters written
so far, as in transformers, says a place that is not the block's. Whoever asks takes the marks out of the messages
first, and compares with the text without marks: a template that looks at what it wrote (`trim`) would be changed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from manyhands.text.origin import MARKS

Span = tuple[int, int]
"""Characters, or tokens: the first, and the one behind the last."""
_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DELETED = dict.fromkeys(map(ord, MARKS))


def has_blocks(template: str) -> bool:
    """Whether a template says what the model wrote."""
    return _BLOCK.search(template) is not None and not any(mark in template for mark in MARKS)


def without_marks(value: Any) -> Any:
    """Messages, tools, documents, with no mark in any text."""
    if isinstance(value, str):
        return value.translate(_DELETED)
    if isinstance(value, Mapping):
        return {without_marks(name): without_marks(item) for name, item in value.items()}
    return [without_marks(item) for item in value] if isinstance(value, list | tuple) else value


def read_marks(marked: str) -> tuple[str, list[Span]] | None:
    """The text without marks, and where the outermost blocks are in it; None if marks were lost on the way."""
    begin, end = tuple(MARKS)
    pieces: list[str] = []
    spans: list[Span] = []
    at = depth = start = 0
    for piece in re.split(f"([{MARKS}])", marked):
        if piece == begin:
            start = start if depth else at
            depth += 1
        elif piece == end:
            depth -= 1
            if depth < 0:
                return None
            if not depth:
                spans.append((start, at))
        else:
            pieces.append(piece)
            at += len(piece)
    return None if depth else ("".join(pieces), spans)


def touching(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, by its characters, whether it is of a span: from the first that touches one to the last.

    Both in order. Tokens without a character of their own belong to what surrounds them.
    """
    inside = [False] * len(offsets)
    first = 0
    for start, stop in spans:
        if start == stop:
            continue
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        last, token = first, first
        while token < len(offsets) and offsets[token][0] < stop:
            token += 1
            if offsets[token - 1][1] > offsets[token - 1][0]:
                last = token
        inside[first:last] = [True] * (last - first)
    return inside
