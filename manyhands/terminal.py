"""Text from a model, a file or a name, on its way to a terminal, which it must not steer."""

_KEPT = "\t\n"
_CONTROL = dict.fromkeys(code for code in [*range(32), *range(127, 160)] if chr(code) not in _KEPT)


def clean(text: str) -> str:
    """Without control characters but tab and line break: what a model wrote, as a person is to read it."""
    return text.translate(_CONTROL).encode("utf-8", "replace").decode("utf-8")


def shown(text: object) -> str:
    """With every control character, direction mark and half of a surrogate pair as its escape: names and messages.

    A file's name keeps its identity: `a\\x1b[2J.txt` is shown as `a\\\\x1b[2J.txt`.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode-escape").decode() for c in str(text))
