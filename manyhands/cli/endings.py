"""How a call ends: a mistake is one line on standard error, and an exit code (docs/command_line.md has the table)."""

import contextlib
import os
import re
import sys
from typing import Any

import typer

from manyhands.config.nearest import suggest
from manyhands.errors import UserError

UsageMistake: Any = typer.BadParameter.__base__
"""What Typer raises for a command line that is none: click's own class, or that of the copy inside Typer."""


def usage(error: Any) -> UserError:
    """The same in our words: which verb, what is wrong, what it might have been, and where help is."""
    context = error.ctx
    path = "manyhands" if context is None else context.command_path
    where = "" if path == "manyhands" else path.removeprefix("manyhands ") + ": "
    return UserError(f"{where}{_said(error).rstrip('. ')} ({path} --help)")


def _said(error: Any) -> str:
    if (name := getattr(error, "option_name", None)) is not None and type(error).__name__ == "NoSuchOption":
        context = error.ctx
        known = sorted({o for p in context.command.get_params(context) for o in p.opts if o.startswith("--")})
        near = suggest(name, known)
        return f"there is no option {name}" + (f"; {near.replace(chr(39), '')}" if near.startswith("did") else "")
    text = " ".join(error.format_message().split())
    if text.startswith("Missing command"):
        return f"which command: {', '.join(error.ctx.command.commands)}?"
    if found := re.match(r"No such command '(.*?)'", text):
        near = suggest(found[1], sorted(error.ctx.command.commands))
        return f"there is no command {found[1]!r}; {near}"
    if found := re.match(r"Invalid value for '?(.*?)'?: (?:Value error, )?(.*)", text):
        return f"{found[1]}: {_near(found[2])}"
    return text[:1].lower() + text[1:]


def _near(message: str) -> str:
    """With the nearest of the values that a message lists."""
    if found := re.match(r"'(.*)' is not one of ('.*')", message):
        near = suggest(found[1], [word.strip("' ") for word in found[2].split(",")])
        return message.rstrip(".") + (f"; {near}" if near.startswith("did") else "")
    return message[:1].lower() + message[1:]


def refused(error: OSError) -> str:
    """What the system said no to: the disk, a file, a network."""
    if error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def open_streams() -> None:
    """Stand-ins for standard streams that were closed: a file opened later must not get their numbers."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def discard_output() -> None:
    """What is still to be written goes nowhere: the flush when Python ends must not fail too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
