"""`manyhands report`: pages and verdicts of runs that ended, were killed, or of which only a journal is left."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from manyhands.compare.read import read_run
from manyhands.errors import DataError
from manyhands.train.about import unigram_loss

from ..small_runs import SMALL, manyhands, write_text


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps."""
    folder = tmp_path_factory.mktemp("ended")
    text = write_text(folder)
    changes = [*SMALL, "train.max_steps=6"]
    done = manyhands(
        "train", "--preset", "tiny", "--out", str(folder / "run"), "--data", str(text), "--quiet", *changes
    )
    assert done.returncode == 0 and "verdict: too short to judge" in done.stdout, done.stderr
    return folder / "run"


def killed(ended: Path, folder: Path) -> Path:
    """The same, as if it had been killed at its fourth step."""
    shutil.copytree(ended, folder / "killed")
    lines = (ended / "journal.jsonl").read_text().splitlines()
    whole = [line for line in lines if json.loads(line)["step"] < 4 and json.loads(line)["kind"] in ("start", "step")]
    (folder / "killed" / "journal.jsonl").write_text("\n".join(whole) + '\n{"kind":"step","st')
    (folder / "killed" / "report.html").unlink()
    return folder / "killed"


def test_the_page_says_where_the_run_came_from(ended: Path) -> None:
    page = (ended / "report.html").read_text()
    for said in ("<td>command</td>", "<td>machine</td>", "<td>versions</td>", "PyTorch", "<td>epochs</td>", "text.txt"):
        assert said in page, said
    assert "<td>model.<wbr>hidden_<wbr>size</td><td>32</td>" in page and "Verdict: too short to judge" in page
    assert "<td>optim.grad_clip</td>" not in page  # the default


def test_a_killed_run_has_a_page(ended: Path, tmp_path: Path) -> None:
    run = killed(ended, tmp_path)
    done = manyhands("report", str(run))
    assert done.returncode == 4 and "it was killed, or is still running at step 3 of 6" in done.stdout
    assert "Verdict: not worth keeping" in (run / "report.html").read_text()
    again = manyhands("report", str(run), "--json")  # a page of its own is replaced
    [told] = json.loads(again.stdout)
    assert told["verdict"]["findings"][0]["kind"] == "unfinished" and again.returncode == 4


def test_what_the_run_alone_can_draw_stays(ended: Path, tmp_path: Path) -> None:
    before = (ended / "report.html").read_bytes()
    done = manyhands("report", str(ended))
    assert done.returncode == 0 and "its page stays" in done.stdout and (ended / "report.html").read_bytes() == before
    assert manyhands("report", str(ended), "--strict").returncode == 4  # too short is a remark
    assert manyhands("report", str(ended), "--out", str(tmp_path / "page.html")).returncode == 0
    assert "Verdict" in (tmp_path / "page.html").read_text()


def test_a_journal_alone_and_a_description_of_another_version(ended: Path, tmp_path: Path) -> None:
    alone = shutil.copy(ended / "journal.jsonl", tmp_path / "journal.jsonl")
    assert manyhands("report", str(alone)).returncode == 0
    assert "there is no run.yaml" in (tmp_path / "report.html").read_text()
    (tmp_path / "run.yaml").write_text("train: {of_tomorrow: 1}\n")
    assert manyhands("report", str(tmp_path)).returncode == 0
    assert "this version cannot read run.yaml" in (tmp_path / "report.html").read_text()


def test_what_is_no_run_is_refused_in_a_line(ended: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    for arguments, said in (
        ([str(tmp_path)], "holds neither journal.jsonl nor run.yaml"),
        ([str(tmp_path / "nothing")], "does not exist"),
        ([str(ended), "--out", str(tmp_path / "page.html")], "was not made by this program"),
        ([str(ended), str(ended), "--out", str(tmp_path / "x.html")], "two runs or more"),
        ([str(ended), str(killed(ended, tmp_path / "k")), "--out", str(tmp_path / "page.html")], "was not made by"),
    ):
        done = manyhands("report", *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done
    assert (tmp_path / "page.html").read_text() == "mine" and not (tmp_path / "x.html").exists()


def test_several_runs_have_a_page_more_and_say_why_not(ended: Path, tmp_path: Path) -> None:
    home = tmp_path / "runs"
    for name in ("a", "b", "same"):
        shutil.copytree(ended, home / name)
    settings = home / "b" / "run.yaml"
    text = settings.read_text()
    settings.write_text(re.sub(r"(?m)^(  lr: ).*$", r"\g<1>0.5", text, count=1))
    assert settings.read_text() != text
    done = manyhands("report", str(home / "a"), str(home / "b" / "journal.jsonl"), "--json")
    assert done.returncode == 0 and not done.stderr, done
    first, second = json.loads(done.stdout)
    assert first["side_by_side"] == second["side_by_side"] == str(home / "compare.html")
    page = (home / "compare.html").read_text()
    assert "lr 0.5" in page and page.count('class="plot') >= 2 and "2 configurations, side by side" in page
    again = manyhands("report", str(home / "a"), str(home / "b"), "--out", str(tmp_path / "both.html"))
    assert again.returncode == 0 and f"side by side: {tmp_path / 'both.html'}" in again.stdout
    (home / "compare.html").unlink()
    unlike = manyhands("report", str(home / "a"), str(home / "same"))
    assert unlike.returncode == 0 and unlike.stdout.count("verdict:") == 2 and not (home / "compare.html").exists()
    assert "not side by side:" in unlike.stderr and "same configuration with the same seed" in unlike.stderr


@pytest.mark.parametrize(
    "line",
    [
        '{"kind":"step","step":1,"loss":"low"}',
        '{"kind":"step","step":1,"moe":[1]}',
        '{"kind":"step","step":1,"moe":{"1":{"load":[]}}}',
        '{"kind":"step","step":1,"moe":{"x":{"load":[1.0]}}}',
        '{"kind":"step","step":1,"moe":{"1":{"load":[1.0],"max_vio":"a"}}}',
        '{"kind":"eval","step":1,"valid_loss":[]}',
        '{"kind":"start","step":0,"data":3}',
        '{"kind":"start","step":0,"data":{"unigram":"x"}}',
    ],
)
def test_a_journal_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"record 1 \(\w+ at step [01]\)"):
        read_run(tmp_path)


def test_the_unigram_is_the_entropy_of_what_occurs() -> None:
    ids = np.array([0] * 30_000 + [1] * 10_000, dtype=np.uint16)
    assert unigram_loss(ids, ids, 2) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-3)
    never_seen = unigram_loss(ids, np.array([2], dtype=np.uint16), 3)
    assert never_seen == pytest.approx(math.log(40_003))
