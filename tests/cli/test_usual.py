"""What people expect of a command line: completion, a version, help in sections, --json, tables that fit, NO_COLOR."""

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from manyhands import errors
from manyhands.cli import complete
from manyhands.cli.columns import print_table
from manyhands.cli.drawn import drawn
from manyhands.cli.examples import EXAMPLES, examples
from manyhands.cli.loudness import heard
from manyhands.cli.main import app
from manyhands.cli.sections import SECTIONS, VERBS, titles_of
from manyhands.terminal import styled

from ..small_runs import manyhands

PAGE = (Path(__file__).parent.parent.parent / "docs" / "command_line.md").read_text(encoding="utf-8")
SCREEN = 40
TALKING = {"chat", "serve"}


def commands() -> dict[str, Any]:
    """Every command that does something, `lab run` and its like too."""
    found: dict[str, Any] = {}

    def add(command: Any, before: str) -> None:
        for name, inner in command.commands.items():
            add(inner, f"{before}{name} ") if hasattr(inner, "commands") else found.update({before + name: inner})

    add(typer.main.get_command(app), "")
    return found


def flags(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}


def test_alone_it_shows_what_one_does_first() -> None:
    done = manyhands()
    assert done.returncode == 0 and done.stderr == ""
    shown = re.findall(r"^  manyhands (\w+)", done.stdout, re.MULTILINE)
    assert len(shown) == 5 and set(shown) <= set(commands()) and "Options" not in done.stdout


def test_version_names_kernels_and_torch() -> None:
    import torch

    done = manyhands("--version")
    assert (
        done.returncode == 0
        and "native expert kernels: " in done.stdout
        and f"torch {torch.__version__}" in done.stdout
    )


def test_help_over_a_screen_has_sections() -> None:
    found = commands()
    for name, command in found.items():
        lines = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="manyhands", terminal_width=80).stdout
        assert len(lines.splitlines()) <= SCREEN or name in SECTIONS, name
        titles = re.findall(r"^(\S.*):$", lines, re.MULTILINE)
        assert set(SECTIONS.get(name, {})) <= set(titles), name
        assert all(flag in lines for flag in flags(command)), name
    for name, sections in SECTIONS.items():
        words = [word for flags_ in sections.values() for word in flags_.split()]
        assert len(words) == len(set(words)) and set(words) <= flags(found[name]), name


def test_every_verb_has_its_section() -> None:
    assert set(titles_of(VERBS)) == {name.split()[0] for name in commands()}


def test_json_everywhere_but_where_one_talks() -> None:
    without = {name for name, command in commands().items() if "--json" not in flags(command)}
    assert without == TALKING | {"trace export"}  # which writes a file


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("manyhands tr", "train"),
        ("manyhands train --preset qui", "quickstart"),
        ("manyhands models mixtral-8x2", "mixtral-8x22b"),
        ("manyhands plan olmoe-t", "olmoe-tiny"),
        ("manyhands plan x --versus deepseek-v3", "deepseek-v3"),
        ("manyhands plan x --machine h1", "h100"),
        ("manyhands choose --machine her", "here"),
        ("manyhands lab run coll", "collapse"),
        ("manyhands check qui", "quickstart"),
        ("manyhands config num_exp", "num_experts"),
        ("manyhands config model.moe.rou", "model.moe.router"),
        ("manyhands train optim.l", "optim.lr="),
        ("manyhands convert a b --type q8", "q8_0"),
    ],
)
def test_completion(typed: str, offered: str) -> None:
    asked = {"_MANYHANDS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = CliRunner().invoke(app, [], prog_name="manyhands", env=asked)
    assert offered in done.stdout.split()


def test_every_verb_has_examples_that_are_commands() -> None:
    found = commands()
    assert set(EXAMPLES) == set(found)
    for name, command in found.items():
        shown = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="manyhands", terminal_width=80).stdout
        for line in examples(name):
            words = shlex.split(line.partition(" < ")[0])
            assert line in shown and words[: 1 + len(name.split())] == ["manyhands", *name.split()]
            command.make_context(name, words[1 + len(name.split()) :])


def test_names_complete_in_any_case() -> None:
    assert "mixtral-8x7b" in complete.systems("Mixtral") and complete.presets("nothing") == []


def test_exit_codes_are_those_of_the_errors() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    classes = [errors.ManyhandsError]
    for kind in classes:
        classes += kind.__subclasses__()
    codes = {kind.exit_code for kind in classes if kind.__module__ == errors.__name__}
    assert told == codes | {0, errors.exit_code_of(KeyboardInterrupt()), 141}


def test_a_table_leaves_out_before_it_cuts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    columns, row = ("name", ">size", "extra", "why"), ("n" * 10, "12", "e" * 10, "because of this")
    for room, lines in (
        (60, ["name        size  extra       why", "nnnnnnnnnn    12  eeeeeeeeee  because of this"]),
        (40, ["name        size  why", "nnnnnnnnnn    12  because of this"]),
        (20, ["name        size", "nnnnnnnnnn    12", "    because of this"]),
    ):
        monkeypatch.setenv("COLUMNS", str(room))
        with heard():
            print_table(columns, [row], spare=("extra",))
        told = capsys.readouterr()
        assert told.out.splitlines() == lines
        assert ("left out" in told.err) is (room < 60)


@pytest.mark.parametrize("arguments", [("models",), ("models", "--check"), ("models", "--by", "year"), ("lab",)])
def test_tables_fit_eighty_columns(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    done = manyhands(*arguments)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled(Terminal()) and not styled(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not styled(Terminal())


def test_a_picture_says_that_its_folder_is_new(tmp_path: Path) -> None:
    assert "was made" in drawn(tmp_path / "new" / "p.svg") and "made" not in drawn(tmp_path / "p.svg").removeprefix(
        f"\ndrawn: {tmp_path}"
    )
