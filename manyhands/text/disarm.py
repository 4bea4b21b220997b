"""Special tokens that a message spells, told from those that the template writes.

A template pastes messages into its text, and `<|im_end|>` in a message looks there like the template's own: whoever
writes a message (or a web page that is quoted in one) could end the turn and speak as the system. So the rendered text
comes with the origin of each character (`origin.py`), and a special token that is not the template's is encoded as the
letters it is written with.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import Encoding

from manyhands.text.origin import FOREIGN, OWN, UNKNOWN

_WORD = re.compile(r"\w+")


def pattern_of(special: Iterable[str]) -> re.Pattern[str]:
    """What finds any of the special tokens, the longest first."""
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token) or "(?!)")


def holds(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether a special token is spelled anywhere in messages (or tools, or documents)."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(holds(item, pattern) for pair in value.items() for item in pair)
    return isinstance(value, Sequence) and any(holds(item, pattern) for item in value)


def spelled_out(
    encoding: Encoding,
    text: str,
    origin: bytes,
    special: Mapping[int, str],
    spell: Callable[[str], list[int]],
) -> list[list[int]]:
    """For each token of `encoding`, which is that of `text`, itself; or `spell`ed, if special and not the template's.

    `origin` has a byte for each character, `special` the text of each special token.
    """
    spell = cache(spell)
    ids: list[list[int]] = []
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        own = token_id not in special or _own(text, origin, start, end, special[token_id])
        ids.append([token_id] if own else spell(text[start:end]))
    return ids


def spells(origin: bytes, unknown_is_own: bool) -> bytes:
    """`origin` without UNKNOWN: as the template's own where no message spells a special token, as foreign else."""
    return origin.replace(UNKNOWN, OWN if unknown_is_own else FOREIGN)


def _own(text: str, origin: bytes, start: int, end: int, name: str) -> bool:
    """Whether the template wrote the token, or made it of a word, as `<|{{ role }}|>` does."""
    at = text.find(name, start, end)  # a token may take the white space beside it along
    first, last = (start, end) if at < 0 else (at, at + len(name))
    kinds = origin[first:last]
    if FOREIGN not in kinds:
        return True
    if OWN not in (kinds[:1], kinds[-1:]):
        return False
    return _WORD.fullmatch("".join(c for c, kind in zip(text[first:last], kinds, strict=True) if kind)) is not None
