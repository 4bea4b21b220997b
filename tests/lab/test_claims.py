"""What the two introductions claim: every figure is computed, every command exists, and the page is what is printed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from manyhands.cli.main import app
from manyhands.config import parse
from manyhands.errors import CheckFailed, ConfigError, DataError
from manyhands.lab import claims_show
from manyhands.lab.claims import Claim, Finding, answer, chosen, findings, letter_of, read_claims
from manyhands.lab.registry import describe, names

CLAIMS = list(read_claims().all())
COMMANDS = sorted({command for claim in CLAIMS for command in claim.commands})
COMPUTED = [command for command in COMMANDS if command.split()[0] in ("plan", "models", "lab")]
EXPERIMENTS = {name for claim in CLAIMS for name in claim.experiments}
PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
LINES = {"A": 118, "B": 85}
"""Of the two documents."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["lab", "claims", *arguments])


def test_every_row_is_answered() -> None:
    assert [claim.id for claim in sorted(CLAIMS, key=lambda claim: claim.id)] == list(range(1, 81))
    for claim in CLAIMS:
        assert all(1 <= line <= LINES[letter] for letter, lines in claim.where.items() for line in lines), claim.id
        assert claim.commands or claim.experiments or claim.source, claim.id
        assert not claim.says.endswith(".") and claim.so.endswith("."), claim.id


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.figures], ids=lambda claim: str(claim.id))
def test_its_figures_are_what_its_verdict_needs(claim: Claim) -> None:
    found = findings(claim)
    assert [(finding.figure.label, finding.value) for finding in found if not finding.holds] == []
    assert "{" not in answer(claim, found)


def test_a_wrong_claim_shows_what_is_wrong() -> None:
    """A figure of it disagrees with the document, or a source does."""
    for claim in CLAIMS:
        if claim.verdict == "false":
            disagrees = any(not figure.agrees for figure in claim.figures)
            assert disagrees or claim.source, claim.id


def test_lists_that_the_document_lost_are_marked_and_not_made_up() -> None:
    assert {line for claim in CLAIMS for line in claim.lost.get("B", ())} == {31, 32, 62, 71}
    assert claims_show.LOST in run("--only", "59").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_verb_and_its_flags(command: str) -> None:
    verb, *arguments = shlex.split(command)
    found: Any = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    while hasattr(found, "commands"):
        found = found.commands[arguments.pop(0)]
    flags = {name for parameter in found.params for name in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= flags


@pytest.mark.parametrize("command", COMPUTED)
def test_what_is_computed_is_printed(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no machine is remembered
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0 and result.stdout, result.exception


def test_every_experiment_that_is_named_is_there() -> None:
    assert set(names()) == EXPERIMENTS


@pytest.mark.parametrize("name", names())
def test_an_experiment_answers_the_claims_that_name_it(name: str) -> None:
    assert set(describe(name).claims) == {claim.id for claim in CLAIMS if name in claim.experiments}


def test_every_experiment_has_a_place_to_read_about_it() -> None:
    headings = re.findall(r"^### (.+)$", (PAGE.parent / "lab.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(headings) >= EXPERIMENTS


def test_the_page_is_what_is_printed() -> None:
    """`manyhands lab claims --markdown > docs/claims.md`"""
    assert PAGE.read_text(encoding="utf-8") == run("--markdown").stdout


def test_check_prints_every_figure_and_ends_well() -> None:
    result = run("--check")
    count = sum(len(claim.figures) for claim in CLAIMS)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == count + 3
    assert f"{count} figures, {count} as their claims need them" in result.stdout and "OFF" not in result.stdout


def test_a_figure_that_is_off_ends_in_4(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.lab import quantities

    monkeypatch.setitem(quantities.QUANTITIES, "total", lambda name: 2.0)
    result = run("--check", "--only", "45")
    assert isinstance(result.exception, CheckFailed) and result.exception.exit_code == 4
    assert "OFF: within 0.1 %" in result.stdout and "claim 45" in str(result.exception)


@pytest.mark.parametrize(
    ("value", "change", "holds"),
    [
        (104.0, {}, True),
        (106.0, {}, False),
        (94.0, {}, False),
        (106.0, {"agrees": False}, True),
        (104.0, {"agrees": False}, False),
        (104.0, {"at_least": 104.0, "at_most": 104.0}, True),
        (104.0, {"at_least": 104.1}, False),
        (104.0, {"at_most": 103.9}, False),
    ],
)
def test_what_a_figure_must_be(value: float, change: dict[str, Any], holds: bool) -> None:
    figure = CLAIMS[0].figures[0].model_copy(update={"printed": "100", "tolerance": 0.05, **change})
    assert Finding(figure, value).holds == holds
    assert Finding(figure, value).difference == pytest.approx(value / 100 - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"so": "It is {much}."}, "'much', which is none of its figures"),
        ({"commands": (), "experiments": (), "source": None}, "no command, no experiment and no source"),
        ({"verdict": "wrong"}, "verdict"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_claim_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    right = CLAIMS[0].model_dump()
    with pytest.raises(ConfigError, match=message):
        parse(Claim, right | change, "here")


def test_a_true_claim_cannot_disagree() -> None:
    claim = next(claim for claim in CLAIMS if any(not figure.agrees for figure in claim.figures))
    with pytest.raises(ConfigError, match="disagrees with the document"):
        parse(Claim, claim.model_dump() | {"verdict": "true"}, "here")


def test_choosing() -> None:
    def ids(**how: str) -> list[int]:
        return [claim.id for _, claims in chosen(**how) for claim in claims]

    assert ids(word="69") == [69] and ids(word="composer") == [43]
    a, b = ids(document="a"), ids(document="Mixture-of-Experts (MoE)")
    assert {*a, *b} | {62} == set(range(1, 81)) and 21 in b and 21 not in a
    assert letter_of("What is mixture-of-experts (MoE) in AI?") == "A" and letter_of("in AI") == "A"
    with pytest.raises(DataError, match=r"--document C: expected A \(What Is"):
        letter_of("C")
    with pytest.raises(DataError, match="--only xyzzy"):
        chosen(word="xyzzy")


def test_json_has_the_text_and_the_figures() -> None:
    rows = {row["id"]: row for row in json.loads(run("--json").stdout)}
    assert len(rows) == 80
    first = rows[1]["figures"][0]
    assert first["expression"] == 'total("kimi-k2.5")' and first["said"] == 1e12 and first["holds"] is True
    assert rows[1]["so"].startswith("Kimi K2.5 has 1.026 T parameters")


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    lines = run().stdout.splitlines()
    assert all(len(line) <= 70 for line in lines if "https://" not in line and "$ manyhands" not in line)
    assert lines[-1] == "80 claims: " + ", ".join(
        f"{sum(c.verdict == v for c in CLAIMS)} {v}" for v in ("true", "caveat", "false", "unverifiable")
    )


def test_one_line_per_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = run("--brief").stdout.splitlines()
    assert len(lines) == 80 + 2 * len(read_claims().group) + 1 and all(len(line) <= 60 for line in lines)
    assert "69  false         Switch-C has 1.57 trillion parameters" in "\n".join(lines)
    assert "leave --brief out" in str(run("--brief", "--check").exception)


def test_markdown_alone() -> None:
    assert "--markdown prints the whole page" in str(run("--markdown", "--check").exception)


def test_nothing_imports_torch_and_all_takes_seconds() -> None:
    code = (
        "import sys, time\n"
        "sys.argv = ['manyhands', 'lab', 'claims', '--check']\n"
        "from manyhands.cli.main import main\n"
        "before = time.process_time()\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() - before < 5\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
