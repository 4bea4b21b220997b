"""Text that remembers, character by character, whether a chat template wrote it or it came with the messages.

`Text` is a `str` in everything a template can ask of it (`in`, `split`, `==`, slices, length). Beside its characters
stands one byte for each: OWN, the template's; FOREIGN, a message's; UNKNOWN, made by something that does not keep count
(a rare filter). What is not counted is never OWN, so an operation that is missing here can only make a special token
into letters, not letters into a special token. It runs in the process for templates and imports nothing of manyhands.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, Self, SupportsIndex

OWN, FOREIGN, UNKNOWN = b"\0", b"\1", b"\2"
MARKS = "\ufdd2\ufdd3"
"""Where what the model wrote begins and ends, in a text that is rendered with marks: no characters of any text."""
_SHADOW = 0x100000
"""Plane 16, private use: stands for arguments while Python formats them."""


class Text(str):
    """Characters, and where each comes from: `origin[i]` is that of `self[i]`."""

    __slots__ = ("origin",)
    origin: bytes

    def __new__(cls, text: object = "", origin: bytes | None = None) -> Self:
        """`text` with that origin; without one, that of `text` itself, or UNKNOWN."""
        self = super().__new__(cls, str.__str__(text) if isinstance(text, str) else str(text))
        self.origin = origin_of(text) if origin is None and isinstance(text, str) else origin or UNKNOWN * len(self)
        return self

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> Any:
        return Text, (str.__str__(self), self.origin)

    def __add__(self, other: str) -> "Text":
        return Text(str.__add__(self, other), self.origin + origin_of(other)) if isinstance(other, str) else self._no()

    def __radd__(self, other: str) -> "Text":
        return Text(str.__add__(other, self), origin_of(other) + self.origin) if isinstance(other, str) else self._no()

    @staticmethod
    def _no() -> Any:
        return NotImplemented

    def __mul__(self, times: SupportsIndex) -> "Text":
        return Text(str.__mul__(self, times), self.origin * index(times))

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> "Text":
        if isinstance(key, slice):
            return Text(str.__getitem__(self, key), self.origin[key])
        at = index(key)
        return Text(str.__getitem__(self, at), self.origin[at : at + 1 or None])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def _part(self, start: int, stop: int) -> "Text":
        return Text(str.__getitem__(self, slice(start, stop)), self.origin[start:stop])

    def _parts(self, pieces: Iterable[str]) -> "list[Text]":
        """`pieces` of this text, in order, each behind the one before: empty ones need no place."""
        found, at = [], 0
        for piece in pieces:
            start = str.find(self, piece, at)
            at = start + len(piece)
            found.append(self._part(start, at))
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[Text]":  # type: ignore[override]
        if sep is None:
            return self._parts(str.split(self, None, maxsplit))
        return self._between(str.split(self, sep, maxsplit), len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[Text]":  # type: ignore[override]
        pieces = str.rsplit(self, sep, maxsplit)
        if sep is not None:
            return self._between(pieces, len(sep))
        found: list[Text] = []
        end = len(self)
        for piece in reversed(pieces):  # from the right: white space is inside the first piece alone
            end = str.rfind(self, piece, 0, end)
            found.insert(0, self._part(end, end + len(piece)))
        return found

    def _between(self, pieces: Iterable[str], gap: int) -> "list[Text]":
        found, at = [], 0
        for piece in pieces:
            found.append(self._part(at, at + len(piece)))
            at += len(piece) + gap
        return found

    def splitlines(self, keepends: bool = False) -> "list[Text]":  # type: ignore[override]
        whole = self._between(str.splitlines(self, True), 0)
        return whole if keepends else self._between_lines(whole)

    @staticmethod
    def _between_lines(lines: "list[Text]") -> "list[Text]":
        return [line._part(0, len(str.splitlines(line)[0])) for line in lines]

    def partition(self, sep: str) -> "tuple[Text, Text, Text]":
        return tuple(self._between(str.partition(self, sep), 0))  # type: ignore[return-value]

    def rpartition(self, sep: str) -> "tuple[Text, Text, Text]":
        return tuple(self._between(str.rpartition(self, sep), 0))  # type: ignore[return-value]

    def lstrip(self, chars: str | None = None) -> "Text":
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> "Text":
        return self._part(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None) -> "Text":
        return self.rstrip(chars).lstrip(chars)

    def removeprefix(self, prefix: str) -> "Text":
        return self._part(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str) -> "Text":
        return self._part(0, len(str.removesuffix(self, suffix)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Text":
        if not old:
            limit = index(count)
            pieces: list[str] = []
            for i, character in enumerate([*self, ""]):
                pieces += [new, character] if limit < 0 or i < limit else [character]
            return join("", pieces)
        origins, at = [], 0
        for piece in str.split(self, old, count):
            origins.append(self.origin[at : at + len(piece)])
            at += len(piece) + len(old)
        return Text(str.replace(self, old, new, count), origin_of(new).join(origins))

    def join(self, parts: Iterable[str]) -> "Text":
        return join(self, parts)

    def _same_length(self, text: str) -> "Text":
        return Text(text, self.origin if len(text) == len(self) else None)

    def upper(self) -> "Text":
        return self._same_length(str.upper(self))

    def lower(self) -> "Text":
        return self._same_length(str.lower(self))

    def capitalize(self) -> "Text":
        return self._same_length(str.capitalize(self))

    def title(self) -> "Text":
        return self._same_length(str.title(self))

    def swapcase(self) -> "Text":
        return self._same_length(str.swapcase(self))

    def ljust(self, width: SupportsIndex, fillchar: str = " ") -> "Text":
        return self + Text(fillchar) * (index(width) - len(self))

    def rjust(self, width: SupportsIndex, fillchar: str = " ") -> "Text":
        return Text(fillchar) * (index(width) - len(self)) + self

    def __mod__(self, values: Any) -> "Text":
        return self._formatted(str.__mod__(self, values), lambda shadows: str.__mod__(self, shadows.of(values)))

    def formatted(self, vformat: Callable[..., str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Text":
        """`str.format` by jinja's careful formatter."""
        format = str.__str__(self)
        return self._formatted(
            vformat(format, tuple(args), kwargs),
            lambda shadows: vformat(
                format, tuple(map(shadows.of, args)), {name: shadows.of(value) for name, value in kwargs.items()}
            ),
        )

    def _formatted(self, shown: str, again: "Callable[[_Shadows], str]") -> "Text":
        """What was shown, with the origins that formatting shadows finds; UNKNOWN where it shows something else."""
        shadows = _Shadows()
        try:
            lifted = shadows.lift(again(shadows), OWN if not any(self.origin) else UNKNOWN)
        except (TypeError, ValueError, LookupError, AttributeError):
            return Text(shown, UNKNOWN * len(shown))
        return lifted if lifted == shown else Text(shown, UNKNOWN * len(shown))


class _Shadows:
    """Arguments of a format as characters that stand for theirs, one for one: what comes out says what came from where.

    What does not fit into plane 16 comes out as it is.
    """

    def __init__(self) -> None:
        self.text, self.origin = "", b""

    def of(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if isinstance(value, Mapping):
            return {name: self.of(item) for name, item in value.items()}
        if not isinstance(value, str) or len(self.text) + len(value) > 0xFFF0:
            return value
        first = _SHADOW + len(self.text)
        self.text, self.origin = str.__add__(self.text, value), self.origin + origin_of(value)
        return "".join(map(chr, range(first, first + len(value))))

    def lift(self, shown: str, otherwise: bytes) -> Text:
        characters, origins = [], []
        for character in shown:
            at = ord(character) - _SHADOW
            inside = 0 <= at < len(self.text)
            characters.append(str.__getitem__(self.text, at) if inside else character)
            origins.append(self.origin[at : at + 1] if inside else otherwise)
        return Text("".join(characters), b"".join(origins))


def origin_of(text: str) -> bytes:
    """Of each character."""
    return text.origin if isinstance(text, Text) else UNKNOWN * len(text)


def own(text: str) -> Text:
    """What the template wrote."""
    return Text(text, OWN * len(text))


def foreign(value: Any) -> Any:
    """Messages, tools, documents: every text in them is FOREIGN."""
    if isinstance(value, str):
        return Text(value, FOREIGN * len(value))
    if isinstance(value, dict):
        return {foreign(name): foreign(item) for name, item in value.items()}
    return [foreign(item) for item in value] if isinstance(value, list) else value


def join(between: str, parts: Iterable[str]) -> Text:
    """`between.join(parts)`."""
    pieces = list(parts)
    return Text(str.join(between, pieces), origin_of(between).join(map(origin_of, pieces)))
