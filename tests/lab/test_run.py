"""Verdicts, exit codes, the table and the clock, with experiments made up here."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyhands.cli.main import app
from manyhands.errors import DataError
from manyhands.lab import run as lab_run
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Description, Figure, Outcome
from manyhands.lab.job import Clock, Job, Processors
from manyhands.lab.page import draw
from manyhands.lab.show import lines

from ..small_runs import manyhands

ABOUT = Description(
    question="Is it so?", published="2×", source="somebody", different="smaller", claims=(1,), minutes=1
)


def outcome(*held: bool | None) -> Outcome:
    criteria = tuple(Criterion(f"number {i}", "seen", each) for i, each in enumerate(held))
    figures = (Figure("loss", "dense", (1.0, 2.0)), Figure("loss", "sparse", (0.5, 0.7), published="0.6"))
    return Outcome((Arm("dense", 10, 10, 20.0), Arm("sparse", 100, 10, 20.0)), figures, criteria)


@pytest.mark.parametrize(
    ("held", "verdict", "passed"),
    [
        ((True, True), "reproduced", True),
        ((True, False), "reproduced in part", False),
        ((False,), "not reproduced", False),
        ((True, None), "reproduced", True),
        ((None,), "not judged", True),
        ((), "not judged", True),
    ],
)
def test_the_verdict_follows_from_the_criteria(held: tuple[bool | None, ...], verdict: str, passed: bool) -> None:
    assert (outcome(*held).verdict, outcome(*held).passed) == (verdict, passed)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    wanted: list[Outcome] = []
    monkeypatch.setattr(lab_run, "describe", lambda name: ABOUT)
    monkeypatch.setattr(lab_run, "find", lambda name: lambda job: wanted[0])
    monkeypatch.setattr("manyhands.lab.registry.describe", lambda name: ABOUT)
    return wanted


@pytest.mark.parametrize(("held", "code"), [(True, 0), (None, 0), (False, 4)])
def test_exit_4_says_that_a_criterion_failed(made_up: list[Outcome], held: bool | None, code: int) -> None:
    made_up.append(outcome(held))
    found = CliRunner().invoke(app, ["lab", "run", "made-up"])
    assert found.exit_code == code, found.output


def test_the_lines_have_mean_range_and_what_was_published(made_up: list[Outcome]) -> None:
    made_up.append(outcome(True, None))
    text = "\n".join(lines(lab_run.run_experiment("made-up", seeds=2)))
    assert "published: 2× (somebody)" in text
    assert "0.600" in text and "0.500 – 0.700" in text and "1 of 1 criteria hold, 1 not judged; 2 seeds" in text


def test_a_page_that_is_not_ours_stays(made_up: list[Outcome], tmp_path: Path) -> None:
    made_up.append(outcome(True))
    page = tmp_path / "mine.html"
    page.write_text("mine")
    found = CliRunner().invoke(app, ["lab", "run", "made-up", "--report", str(page)])
    assert found.exit_code and "not made by this program" in str(found.exception) and page.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        assert not CliRunner().invoke(app, ["lab", "run", "made-up", "--report", str(page)]).exit_code
    assert "Is it so?" in page.read_text()


def test_the_clock_knows_waiting_from_computing(tmp_path: Path) -> None:
    job = Job(False, (0,), tmp_path)
    with job.clock() as waited:
        time.sleep(0.05)
    assert waited.seconds >= 0.05 > waited.computing


@pytest.mark.parametrize(
    ("computing", "others", "quiet"), [(0.95, 1.0, True), (0.5, 1.0, False), (0.5, 0.05, True), (0.5, None, False)]
)
def test_times_count_where_nobody_else_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computing: float, others: float | None, quiet: bool
) -> None:
    monkeypatch.setattr(Processors, "others", lambda self: others)
    assert Job(False, (0,), tmp_path, clocks=[Clock(1.0, computing)]).quiet is quiet


def test_what_this_process_does_is_not_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([Processors(0.0, 5.0, 1.0), Processors(10.0, 17.0, 12.5), Processors(10.0, None, 12.5)])
    monkeypatch.setattr(Processors, "now", classmethod(lambda cls: next(times)))
    before = Processors.now()
    assert before.others() == pytest.approx(0.05) and before.others() is None


def test_data_that_an_experiment_does_not_take(made_up: list[Outcome], tmp_path: Path) -> None:
    made_up.append(outcome(True))
    found = CliRunner().invoke(app, ["lab", "run", "made-up", "--data", str(tmp_path)])
    assert found.exit_code and "takes none" in str(found.exception)


def test_one_that_cannot_be_run_does_not_lose_the_others(
    made_up: list[Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: list[signal.Signals] = []
    scratch: list[Path] = []

    def find(name: str) -> Callable[[Job], Outcome]:
        def run(job: Job) -> Outcome:
            if name == "bad":
                raise DataError("nothing to read")
            if name == "stopped":
                scratch.append(job.scratch)
                signal.raise_signal(ended[-1])
            return made_up[0]

        return run

    made_up.append(outcome(True))
    monkeypatch.setattr(lab_run, "find", find)
    page = tmp_path / "page.html"
    done = manyhands("lab", "run", "a", "bad", "b", "--json", "--report", str(page))
    assert [each["experiment"] for each in json.loads(done.stdout)] == ["a", "b"] and done.returncode == 2
    assert "bad: could not be run: nothing to read" in done.stderr
    assert "manyhands: 1 of 3 experiments could not be run: bad" in done.stderr and page.exists()
    alone = manyhands("lab", "run", "bad", "--json")
    assert (alone.returncode, alone.stdout, alone.stderr) == (2, "", "manyhands: nothing to read\n")
    for sent, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        ended.append(sent)
        stopped = manyhands("lab", "run", "a", "stopped", "b", "--json")
        assert stopped.returncode == code and [each["experiment"] for each in json.loads(stopped.stdout)] == ["a"]
        assert stopped.stderr == "manyhands: stopped in stopped: nothing of it is kept; run it again\n"
        assert not scratch[-1].exists()


def test_a_page_that_cannot_be_written_is_said_before_anything_runs(made_up: list[Outcome]) -> None:
    done = manyhands("lab", "run", "made-up", "--report", "/proc/no/page.html")  # nobody can make a file there
    assert (
        done.returncode == 2 and done.stdout == "" and done.stderr.startswith("manyhands: /proc/no/page.html: cannot")
    )


def test_a_baseline_is_named_in_a_chart_and_a_further_seed_is_not() -> None:
    x, y = [1.0, 2.0], [3.0, 4.0]
    curves = (Curve("model", x, y), Curve("model", x, y, faint=True), Curve("chance", x, y, faint=True))
    drawn = draw(Chart("t", "epoch", "error", curves))
    assert drawn.count("</b>model</span>") == 1 and drawn.count("</b>chance</span>") == 1
    assert [drawn.count(f'class="{style}" style="stroke') for style in ("line", "faint", "dashed")] == [1, 1, 1]
