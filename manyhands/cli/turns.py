"""What a person says in `manyhands chat`: a line, a block between three quotes, or a pasted text, is one turn."""

import contextlib
import difflib
import select
import sys
from collections.abc import Callable, Collection, Iterator

QUOTES = '"""'
_PASTED = 0.03
"""Seconds in which the next line of a pasted text is there; nobody types as fast."""
_BRACKETS = ("\x1b[200~", "\x1b[201~")
"""What terminals put around a pasted text where nobody takes it away."""


def turns(interactive: bool) -> Iterator[str]:
    """Each turn's text, without empty ones."""
    read = _typed if interactive else _piped
    while True:
        try:
            text = _block(read)
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n[Ctrl-D or /exit ends]", file=sys.stderr)
            continue
        if text:
            yield text


def command(text: str, known: dict[str, str], wanting: Collection[str] = ()) -> tuple[str, str] | None:
    """The command that `text` is and what stands behind it, or None for a message.

    A command is a slash and a word; those of `wanting` take something behind them, the others nothing. One of several
    lines is one if it is known and takes something. Raises `ValueError` with what to say for one that there is not.
    """
    word = text.split(maxsplit=1)[0]
    if word in wanting:
        return word, text.removeprefix(word).strip()
    if "\n" in text or not word.startswith("/") or not word[1:].isalpha():
        return None
    if word in known and text == word:
        return word, ""
    if word in known:
        raise ValueError(f"{word} takes nothing behind it")
    near = difflib.get_close_matches(word.lower(), known, 1)
    raise ValueError(
        f"there is no command {word}; "
        + (f"did you mean {near[0]}? " if near else "")
        + "/help shows them; //… says something that begins with a slash"
    )


def _block(read: Callable[[str], str]) -> str:
    """One line, or the lines between two of three quotes."""
    text = read("> ").strip()
    if not text.startswith(QUOTES):
        return text
    text = text.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + read(". ")
        except EOFError:
            break
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def _piped(_prompt: str) -> str:
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\r\n")


def _typed(prompt: str) -> str:
    """A line, and the lines that come with it when it is pasted."""
    with contextlib.suppress(ImportError):
        import readline  # gives input() a history, an editor and pasted lines in one

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")
    lines = [input(prompt)]
    while select.select([sys.stdin], [], [], _PASTED)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    text = "\n".join(lines)
    for bracket in _BRACKETS:
        text = text.replace(bracket, "")
    return text.replace("\r\n", "\n").replace("\r", "\n")
