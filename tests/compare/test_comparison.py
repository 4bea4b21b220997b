"""`manyhands compare` on real runs: what is grouped, what is said, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from manyhands.compare.comparison import Comparison, compare, decimals
from manyhands.compare.groups import grouped
from manyhands.compare.pages.side_by_side import render
from manyhands.compare.run import Run
from manyhands.compare.show import lines
from manyhands.compare.verdict import judge
from manyhands.errors import DataError, UserError
from manyhands.trace.documents import DocumentLosses
from manyhands.trace.journal import read_journal
from manyhands.train import loop

from ..small_runs import manyhands, small_run

ALL = [f"{name}-{seed}" for name in ("slow", "fast") for seed in (0, 1, 2)]


def texts(folder: Path, files: int = 24) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        words = " ".join(f"{'abcde'[(number + i) % 5] * 3} {i % 7}" for i in range(20 + number))
        (folder / f"{number:02d}.txt").write_text(f"the hands of {number} are many\n{words}\n" * 3)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configurations, three seeds each, and one that was validated on another text."""
    home, text = tmp_path_factory.mktemp("runs"), texts(tmp_path_factory.mktemp("texts"))
    changes = ["data.valid_fraction=0.3", "train.max_steps=8", "train.eval_every=2"]
    for name, rate in (("slow", 0.0003), ("fast", 0.003)):
        for seed in (0, 1, 2):
            run = small_run(text, f"optim.lr={rate}", f"train.seed={seed}", *changes)
            loop.train(home / f"{name}-{seed}", run, quiet=True)
    loop.train(home / "other", small_run(text, "data.seed=5", *changes, "train.max_steps=1"), quiet=True)
    return home


@pytest.fixture(scope="module")
def found(runs: Path) -> Comparison:
    return compare([runs / name for name in ALL])


def test_seeds_are_grouped_and_the_difference_named(found: Comparison) -> None:
    assert [arm.group.label for arm in found.arms] == ["A: lr 0.0003", "B: lr 0.003"]
    assert [arm.group.fields for arm in found.arms] == [{"optim.lr": 0.0003}, {"optim.lr": 0.003}]
    assert [[run.seed for run in arm.group.runs] for arm in found.arms] == [[0, 1, 2], [0, 1, 2]]
    [verdict], difference = found.verdicts, found.arms[1].beside_first
    assert difference is not None and difference.covers == "documents and seeds" and difference.shown
    assert verdict.startswith("B better than A by ") and "3 seeds each" in verdict and found.documents
    assert difference.value == pytest.approx(found.arms[1].mean - found.arms[0].mean)
    text = "\n".join(lines(found))
    judged = [run.name for arm in found.arms for run in arm.group.runs if judge(run.records, run.config).exit_code()]
    assert ("not worth keeping" in text) == bool(judged)
    assert "A: lr 0.0003" in text and "optim.lr" in text and "slow-0 (seed 0)" in text


def test_figures_are_the_journals_and_the_documents(runs: Path, found: Comparison) -> None:
    run = Run.open(runs / "fast-1")
    last = [r for r in read_journal(runs / "fast-1" / "journal.jsonl") if r["kind"] == "eval"][-1]
    assert run.figure("last") == last["valid_bits_per_byte"] == found.arms[1].figures[1]
    losses = run.at("last")
    assert run.losses is not None and losses is not None and losses.step == 8 == run.evals[-1]["step"]
    assert losses.sum / np.log(2) / run.losses.size_X.sum() == pytest.approx(run.figure("last"), rel=1e-6)
    assert run.cost["tokens"] == 8 * 4 * 32 and run.ended


def test_documents_are_paired_whatever_their_order(runs: Path, found: Comparison, tmp_path: Path) -> None:
    """A run that read the same documents in another order gives the same interval."""
    paths = []
    for name in ALL:
        paths.append(shutil.copytree(runs / name, tmp_path / name))
    file = paths[4] / "documents.safetensors"
    kept = DocumentLosses.open(file)
    back = slice(None, None, -1)
    turned = DocumentLosses(
        type(kept.documents)(kept.documents.bytes_X[back].copy(), kept.documents.sha256_X[back].copy()),
        kept.targets_X[back].copy(),
        *(type(each)(each.step, each.nats_X[back].copy()) for each in (kept.last, kept.best)),
    )
    turned.save(file)
    again, before = compare(paths).arms[1].beside_first, found.arms[1].beside_first
    assert again is not None and before is not None and again.half == pytest.approx(before.half, rel=1e-9)


def test_what_says_nothing_of_each_other_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validated on other texts"):
        compare([runs / "slow-0", runs / "other"])
    shutil.copytree(runs / "slow-0", tmp_path / "copy")
    with pytest.raises(UserError, match="same configuration with the same seed"):
        compare([runs / "slow-0", tmp_path / "copy"])
    with pytest.raises(UserError, match="two runs or more"):
        compare([runs / "slow-0"])
    with pytest.raises(UserError, match="neither a run nor a folder of runs"):
        compare([texts(tmp_path / "plain")])
    (tmp_path / "copy" / "documents.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"documents\.safetensors"):
        Run.open(tmp_path / "copy")


def test_without_losses_by_document_seeds_alone(runs: Path, tmp_path: Path) -> None:
    """Runs of an earlier version: the same tokens, by their digest, and an interval over seeds."""
    for name in ALL:
        shutil.copytree(runs / name, tmp_path / name)
        (tmp_path / name / "documents.safetensors").unlink()
    found = compare([tmp_path / name for name in ALL])
    difference = found.arms[1].beside_first
    assert difference is not None and difference.covers == "seeds" and found.documents is None
    assert any("over seeds alone" in note for note in found.notes)
    prepared = tmp_path / "fast-0" / "data" / "data.json"
    content = json.loads(prepared.read_text())
    content["sha256"]["valid.npy"] = "0" * 64
    prepared.write_text(json.dumps(content))
    with pytest.raises(UserError, match="same text is not known"):
        compare([tmp_path])


def test_one_seed_each_says_what_is_not_known(runs: Path) -> None:
    found = compare([runs / "slow-0", runs / "fast-0"])
    difference = found.arms[1].beside_first
    assert difference is not None and difference.covers == "documents"
    assert any("another seed" in note for note in found.notes) and "1 seed each" in found.verdicts[0]
    assert len(grouped([Run.open(runs / "slow-0"), Run.open(runs / "slow-1")])) == 1


def test_the_command(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    some = [str(runs / name) for name in ALL]
    done = manyhands("compare", *some, "--at", "best", "--json", "--report", str(page))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["at"] == "best" and [c["letter"] for c in found["configurations"]] == ["A", "B"]
    assert found["configurations"][1]["difference"]["covers"] == "documents and seeds"
    text = page.read_text()
    assert text.count('class="plot') == 4 and "B better than A" in text and "http" not in text.split("</style>")[1]
    page.write_text("mine")
    done = manyhands("compare", *some, "--report", str(page))
    assert done.returncode == 2 and "was not made by this program" in done.stderr and page.read_text() == "mine"
    done = manyhands("compare", str(tmp_path / "nowhere"), some[0])
    assert done.returncode == 2 and "not a run's directory" in done.stderr and done.stderr.count("\n") == 1


def test_the_page_is_escaped(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "slow-0", tmp_path / "<b>x")
    page = render(compare([tmp_path / "<b>x", runs / "fast-0"]))
    assert "<b>x" not in page and "&lt;b&gt;x" in page


def test_decimals() -> None:
    """Two digits of the interval."""
    assert [decimals(half) for half in (0.0061, 0.043, 0.5, 3.0, 0.0, float("inf"))] == [4, 3, 2, 2, 3, 3]
