"""Text from a model, a file or a name, on its way to a terminal, which it must not steer."""

import os
from typing import TextIO

_KEPT = "\t\n"
_TURNS = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # embeddings and overrides of the direction of writing
_CONTROL = dict.fromkeys(code for code in [*range(32), *range(127, 160), *_TURNS] if chr(code) not in _KEPT)


def clean(text: str) -> str:
    """Without control characters but tab and line break, and no direction turned: what a model wrote, to be read."""
    return text.translate(_CONTROL).encode("utf-8", "replace").decode("utf-8")


def shown(text: object) -> str:
    """With every control character, direction mark and half of a surrogate pair as its escape: names and messages.

    A file's name keeps its identity: `a\\x1b[2J.txt` is shown as `a\\\\x1b[2J.txt`.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode-escape").decode() for c in str(text))


def styled(stream: TextIO) -> bool:
    """Whether bold and colour may be written: to a terminal that knows them, and NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
