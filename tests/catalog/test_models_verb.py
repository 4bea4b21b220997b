"""`manyhands models`."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from manyhands.catalog import names
from manyhands.cli.main import app
from manyhands.errors import CheckFailed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", *arguments])


def test_the_table_has_every_system_and_marks_what_is_not_known() -> None:
    lines = run().stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names()
    by_name = {line.split()[0]: line for line in lines}
    assert "~1.8T?" in by_name["gpt-4"] and "16?, top 2?" in by_name["gpt-4"]
    assert "not disclosed" in by_name["claude"]
    assert "16.8B*" in by_name["ling-lite"]
    assert "256 + 1, top 8" in by_name["deepseek-v3"]
    assert all(line == line.rstrip() for line in lines)


def test_sparse_dense_and_the_orders() -> None:
    def listed(*arguments: str) -> list[str]:
        return [line.split()[0] for line in run(*arguments).stdout.splitlines()[1:]]

    sparse, dense = listed("--sparse"), listed("--dense")
    assert "mixtral-8x7b" in sparse and "llama-2-70b" in dense and not set(sparse) & set(dense)
    assert set(names()) - set(sparse) - set(dense) == {"claude", "gpt-4"}
    assert listed("--sort", "total")[0] == "switch-c"
    assert listed("--sort", "active", "--sparse")[:2] == ["glam-64b-64e", "grok-1"]
    released = listed("--sort", "released")
    assert released[0] == "composer-2" and released[-1] == "jacobs-1991"


def test_json() -> None:
    systems = {system["id"]: system for system in json.loads(run("--json").stdout)}
    v3 = systems["deepseek-v3"]
    assert v3["computed"]["total"] == 671_026_404_352
    assert v3["mixture"] == {"experts": 256, "shared": 1, "experts_per_token": 8}
    assert v3["figures"][0] | {"explanation": ""} == {
        "what": "total",
        "printed": "671B",
        "value": 671e9,
        "unit": "parameters",
        "kind": "published",
        "source": "https://github.com/deepseek-ai/DeepSeek-V3/blob/06dbd30/README.md",
        "tolerance": 0.0005,
        "explanation": "",
    }
    assert "computed" not in systems["gpt-4"]


def test_check() -> None:
    result = run("--check")
    assert result.exit_code == 0, result.stdout
    assert "0 off" not in result.stdout and " off" not in result.stdout.splitlines()[-1]
    rows = json.loads(run("--check", "--json", "--dense").stdout)
    assert {row["verdict"] for row in rows} <= {"rounds to it", "cut to it", "within", "explained"}
    assert {row["id"] for row in rows} <= {line.split()[0] for line in run("--dense").stdout.splitlines()}


def test_check_fails_with_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from manyhands.plan import published

    rows = [replace(row, verdict="off") for row in published.compare_all()[:1]]
    monkeypatch.setattr(published, "compare_all", lambda: rows)
    result = run("--check")
    assert isinstance(result.exception, CheckFailed) and result.exception.exit_code == 4
    assert rows[0].id in str(result.exception)


def test_a_terminal_gets_a_fitted_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from manyhands.cli import models

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    models.models(name=None, sparse=False, dense=True, sort="name", check=False, json_output=False)
    out = capsys.readouterr().out
    assert "llama-3.1-405b" in out and "deepseek" not in out


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--json"]])
def test_nothing_imports_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['manyhands', 'models', *{arguments!r}]\n"
        "from manyhands.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", names())
def test_one_system_with_every_source(name: str) -> None:
    """Everything in its file is printed, in 80 columns but for addresses that are longer."""
    from manyhands.catalog import load

    entry, text = load(name), run(name).stdout
    said = " ".join(text.split())
    sources = {*entry.sources, *(figure.source for figure in entry.figures)}
    assert all(" ".join(source.split()) in said for source in sources)
    assert all(" ".join(note.split()) in said for note in entry.notes)
    assert all(figure.printed is None or figure.printed in said for figure in entry.figures)
    assert all(len(line) <= 80 or "https://" in line for line in text.splitlines())


def test_prices_and_what_is_not_disclosed() -> None:
    said = " ".join(run("Composer-2").stdout.split())
    assert "price, 10^6 tokens in: 0.50 USD/million tokens (reported) https://learnaiforge.com" in said
    assert "price, 10^6 tokens out: 2.50 USD/million tokens" in said and "made from kimi-k2.5" in said
    assert "total: not disclosed" in said


def test_systems_by_year() -> None:
    """Counts of the whole table, however it is divided."""
    years = {row["year"]: row for row in json.loads(run("--by", "year", "--json").stdout)}
    assert sum(row["systems"] for row in years.values()) == len(names())
    sparse = [line.split()[0] for line in run("--sparse").stdout.splitlines()[1:]]
    assert sum(row["sparse"] for row in years.values()) == len(sparse)
    assert years[2020]["experts_per_token"] == {"2": 6} and years[1991]["dense"] == 1
    assert years[1991]["experts_per_token"] == {}  # a soft mixture visits all of its experts: not sparse
    printed = run("--by", "year", "--sparse").stdout
    assert "1991" not in printed and "2: 6" in printed
    for other in (["deepseek-v3"], ["--check"], ["--sort", "total"]):
        assert "--by year" in str(run("--by", "year", *other).exception)


def test_one_system_as_json_is_its_row() -> None:
    assert json.loads(run("deepseek-v3", "--json").stdout) in json.loads(run("--json").stdout)
    assert {row["id"] for row in json.loads(run("deepseek-v3", "--check", "--json").stdout)} == {"deepseek-v3"}


def test_a_name_that_is_not_there_and_options_of_the_table() -> None:
    assert "the nearest: deepseek-v3" in str(run("deepsek-v3").exception)
    assert "leave NAME out" in str(run("deepseek-v3", "--sparse").exception)


def test_plan_and_models_know_one_context() -> None:
    """That it was released for; every decoder has one, in k of 1024 in both."""
    from manyhands.catalog import load
    from manyhands.errors import ConfigError
    from manyhands.plan.report.ask import short
    from manyhands.plan.subject import read_subject

    rows = {line.split()[0]: line for line in run().stdout.splitlines()}
    for name in names():
        entry = load(name)
        try:
            sizes = read_subject(name).sizes
        except ConfigError:
            continue  # nothing is planned for it
        if sizes is not None:
            assert entry.context is not None and sizes.positions == entry.context
            assert f" {short(entry.context)} " in f"{rows[name]} "


def test_thousands_of_positions_are_1024() -> None:
    from manyhands.plan.report.ask import short

    assert [short(n) for n in (4096, 131_072, 163_840, 1 << 20, 10 << 20)] == ["4k", "128k", "160k", "1M", "10M"]
    assert short(200_000) == "200,000"
