"""docs/planning.md shows what the planner prints."""

import re
import shlex
from pathlib import Path

import pytest

from ..small_runs import manyhands

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n\$ manyhands ([^\n]+)\n(.+?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^manyhands (plan [^#\n]+)", PAGE, flags=re.MULTILINE)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(("command", "lines"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_the_page_shows_what_is_printed(command: str, lines: str) -> None:
    done = manyhands(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in lines.splitlines() if line not in printed] == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if "config.json" not in command])
def test_the_pages_commands_run(command: str) -> None:
    done = manyhands(*shlex.split(command))
    assert done.returncode == 0, done.stderr


def test_the_quoted_figures() -> None:
    """What is often quoted, and what the planner prints in its place."""
    for command, figures in (
        ("mixtral-8x7b --format int4", ("46.70 B", "12.88 B", "26.27 GB")),
        (
            "deepseek-v3",
            ("671.0 B", "37.55 B", "36.63 B", "35.70 B", "250.5 GFLOP", "1.342 TB", "673.2 GB", "604.0 GB"),
        ),
        ("kimi-k2.5", ("1.026 T", "32.86 B", "31.69 B", "30.51 B", "2.053 TB", "594.2 GB")),
        ("switch-c", ("1.795 B", "1.661 B")),
        ("llama-3.1-405b", ("2.473 TFLOP", "811.7 GB", "841.3 GFLOP")),
    ):
        printed = manyhands("plan", *command.split()).stdout
        assert [figure for figure in figures if figure not in printed] == []
