"""docs/coming_from.md: every command of ours in it is one that the command line takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from manyhands.cli.main import app

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(manyhands [^`]+)`", PAGE)))


MISUSED: Any = typer.BadParameter.__base__
"""click's UsageError, or that of the copy that newer typers bring."""


def parse(command: str) -> None:
    """Parse the verb's arguments; nothing is run."""
    _, verb, *arguments = shlex.split(command)
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_parses(command: str) -> None:
    parse(command)


def test_what_is_wrong_does_not() -> None:
    for wrong in ("manyhands chat MODEL --modelfile x", "manyhands serve MODEL --port many", "manyhands generate"):
        with pytest.raises(MISUSED):
            parse(wrong)
    with pytest.raises(KeyError):
        parse("manyhands pull MODEL")


def test_each_tool_has_its_table_and_its_sources() -> None:
    """A section for each, with commands of theirs and ours, what is missing, and where theirs are documented."""
    parts = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert list(parts)[:5] == ["transformers", "mlx-lm", "LitGPT", "llama.cpp", "ollama"]
    for name in list(parts)[:5]:
        assert "| theirs | ours |" in parts[name] and "Not here: " in parts[name], name
        assert "https://" in parts[name].split("Sources: ")[1], name
