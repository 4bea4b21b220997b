"""Write docs/cli.md: every verb with its arguments and options, as the command line itself describes them.

`python scripts/cli_reference.py`
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from manyhands.cli.loudness import everywhere
from manyhands.cli.main import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Every verb and option

What `manyhands VERB --help` says, for all verbs; `python scripts/cli_reference.py` writes this page. A verb
ends with 0 if it did what was asked, 2 if what it was given is wrong, 1 if the system refused;
[command_line.md](command_line.md#exit-codes) has the other codes. Every verb also takes `-q` (only the
result and warnings), `-v` (also what was read, what computes it, and what it took) and `--debug` (the traceback of an
error).
"""
_EXTRA = re.compile(r"\s*\[((?:[^\[\]]|\[[^\]]*\])*)\]$")
_TAG = re.compile(r"<([^<>]+)>")


def verbs(group: Any, path: str = "manyhands") -> Iterator[tuple[str, Any]]:
    """(what one types, command) of every verb and of the verbs inside it, in the order of --help."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from verbs(command, f"{path} {name}")


def rows(command: Any, path: str) -> list[str]:
    """Of each parameter its names, what it does, and its default and bounds."""
    context = command.context_class(command, info_name=path)
    found = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts or parameter in everywhere():
            continue
        names, told = record
        extra = _EXTRA.search(told)
        told, notes = (told[: extra.start()], extra[1]) if extra else (told, "")
        cells = [f"`{names}`", _TAG.sub(r"&lt;\1&gt;", " ".join(told.split())), f"`{notes}`" if notes else ""]
        found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for path, command in verbs(typer.main.get_command(app)):
        text = inspect.cleandoc(command.help or "").replace("\b\n", "")
        parts += [f"## `{path}`\n", _TAG.sub(r"`<\1>`", text) + "\n"]
        table = rows(command, path)
        if table:
            parts.append("\n".join(["| | | default, bounds |", "|---|---|---|", *table]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
