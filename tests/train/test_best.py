"""The best and the last checkpoint, early stop, epochs: kept, named, said, and the same after an interruption."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.checkpoint.find import find
from manyhands.checkpoint.runs import RunDirectory
from manyhands.config.load import load_run
from manyhands.errors import CheckpointError, ConfigError, Interrupted, UserError
from manyhands.generate.evaluate import Evaluation, trained_length
from manyhands.trace.journal import read_journal
from manyhands.train import finish, loop
from manyhands.train.task import LanguageModelling

from ..small_runs import SMALL, manyhands, small_run, write_text
from .test_going_on import assert_repeats, go_on
from .test_loop import StopAfter, state_of, weights_of

LOSSES = [3.0, 2.0, 2.5, 2.1, 2.2, 2.3, 2.4, 1.0]  # at steps 2, 4, 6, …: best at 4, until the eighth


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), 250)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], list[float]]:
    """Validations that say what they are told to: how the run gets on is not what is tested here."""

    def say(losses: Sequence[float]) -> list[float]:
        left = list(losses)

        def validate(self: Any, model: Any, data: Any, run: Any, dtype: Any, ranks: Any = None) -> Evaluation:
            loss = left.pop(0)
            return Evaluation(loss, math.exp(loss), loss, 100, {})

        monkeypatch.setattr(LanguageModelling, "validate", validate)
        return left

    return say


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, and without waiting for the disk."""
    monkeypatch.setattr(finish, "token_shares", lambda *args: (None, None))
    monkeypatch.setattr(finish, "write_report", lambda *args: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def steps_kept(directory: Path) -> list[int]:
    return [step for step, _ in RunDirectory(directory).checkpoints()]


def named(directory: Path, name: str) -> str:
    return os.readlink(directory / name)


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(directory / "journal.jsonl") if record["kind"] == kind]


def test_best_and_last_are_kept_and_named(text: Path, tmp_path: Path, judged: Any) -> None:
    judged(LOSSES[:7])
    run = small_run(text, "train.max_steps=14", "train.eval_every=2", "train.save_every=2", "train.keep_checkpoints=2")
    done = loop.train(tmp_path / "run", run, quiet=True)
    assert steps_kept(tmp_path / "run") == [4, 12, 14]
    assert named(tmp_path / "run", "best") == "checkpoints/step-00000004"
    assert named(tmp_path / "run", "last") == "checkpoints/step-00000014"
    assert done.best is not None and (done.best.step, done.best.valid_loss) == (4, 2.0)
    assert done.best.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000004"
    assert "best:       2.000 bits per byte, perplexity 7.39, at step 4: " in "\n".join(done.lines())
    for name, step in (("best", 4), ("last", 14), ("12", 12), ("", 14)):
        assert find(tmp_path / "run" / name).name == f"step-{step:08d}"
    assert trained_length(tmp_path / "run" / "best") == trained_length(tmp_path / "run" / "12") == 32
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 6; it has 4, 12, 14$"):
        find(tmp_path / "run" / "6")


def test_the_end_may_be_the_best(text: Path, tmp_path: Path, judged: Any) -> None:
    judged(LOSSES[:8])
    run = small_run(text, "train.max_steps=16", "train.eval_every=2", "train.keep_checkpoints=1")
    done = loop.train(tmp_path / "run", run, quiet=True)
    assert steps_kept(tmp_path / "run") == [16] and done.best is None
    assert named(tmp_path / "run", "best") == named(tmp_path / "run", "last")


def test_without_keep_best_nothing_more_is_saved(text: Path, tmp_path: Path, judged: Any) -> None:
    judged(LOSSES[:4])
    changes = ["train.max_steps=8", "train.eval_every=2", "train.keep_best=false", "train.keep_checkpoints=1"]
    done = loop.train(tmp_path / "run", small_run(text, *changes), quiet=True)
    assert steps_kept(tmp_path / "run") == [8] and not os.path.lexists(tmp_path / "run" / "best")
    assert done.best is not None and done.best.checkpoint is None and "at step 4: not kept" in "\n".join(done.lines())


def test_what_a_person_put_there_stays(text: Path, tmp_path: Path, caplog: Any) -> None:
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=2"), quiet=True)
    (tmp_path / "run" / "best").unlink()
    (tmp_path / "run" / "best").write_text("mine")
    go_on(tmp_path / "run", "train.max_steps=4", "train.eval_every=1")
    assert (tmp_path / "run" / "best").read_text() == "mine" and "not this program's" in caplog.text
    (tmp_path / "run" / "last").unlink()
    (tmp_path / "run" / "last").symlink_to("/etc")
    assert find(tmp_path / "run" / "last").name == "step-00000004", "by the steps, not by where a link leads"
    go_on(tmp_path / "run", "train.max_steps=5")
    assert named(tmp_path / "run", "last") == "/etc"


def test_early_stop_ends_the_run_and_the_file_repeats_it(text: Path, tmp_path: Path, judged: Any) -> None:
    left = judged(LOSSES)
    run = small_run(text, "train.max_steps=40", "train.eval_every=2", "train.early_stop=3")
    done = loop.train(tmp_path / "run", run, quiet=True)
    assert done.steps == 10 and done.stopped_early == 3 and len(left) == 3, "the last validation is not made twice"
    assert "stopped early: no better validation in 3 (train.early_stop)" in done.lines()
    [said] = records(tmp_path / "run", "early_stop")
    assert (said["step"], said["best_step"], said["best_loss"], said["patience"]) == (10, 4, 2.0, 3)
    assert records(tmp_path / "run", "end")[-1]["max_steps"] == 10
    assert steps_kept(tmp_path / "run")[-1] == 10 and done.best is not None and done.best.step == 4
    judged([2.2])
    assert go_on(tmp_path / "run").steps == 10  # the same again: there is nothing left
    judged([2.2] * 4 + [9.0])
    assert_repeats(tmp_path / "run", tmp_path / "again")


def test_a_run_that_stopped_early_may_go_on(text: Path, tmp_path: Path, judged: Any) -> None:
    judged([1.0, 2.0] + [3.0] * 20)
    run = small_run(text, "train.max_steps=20", "train.eval_every=2", "train.early_stop=1")
    assert loop.train(tmp_path / "run", run, quiet=True).steps == 4
    with_more = go_on(tmp_path / "run", "train.early_stop=2")
    assert with_more.steps == 8, "two more validations, from where it goes on"
    assert go_on(tmp_path / "run", "train.early_stop=null").steps == 20
    rates = [record["lr"] for record in records(tmp_path / "run", "step")]
    assert len(rates) == 20
    judged([3.0] * 20)
    assert_repeats(tmp_path / "run", tmp_path / "again")
    assert named(tmp_path / "run", "best") == "checkpoints/step-00000002"


def test_a_longer_run_than_the_one_that_stopped_early(text: Path, tmp_path: Path, judged: Any) -> None:
    judged([1.0] + [2.0] * 20)
    run = small_run(text, "train.max_steps=20", "train.eval_every=2", "train.early_stop=2")
    assert loop.train(tmp_path / "run", run, quiet=True).steps == 6
    assert go_on(tmp_path / "run", "train.max_steps=30").steps == 10
    judged([2.0] * 20)
    assert_repeats(tmp_path / "run", tmp_path / "again")


def test_an_interrupted_run_stops_and_keeps_as_an_undisturbed_one(
    text: Path, tmp_path: Path, judged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the signal came before the validation that was due at the same step."""
    run = small_run(text, "train.max_steps=40", "train.eval_every=2", "train.early_stop=3")
    judged(LOSSES)
    loop.train(tmp_path / "whole", run, quiet=True)
    for after in (4, 10):
        judged(LOSSES)
        with monkeypatch.context() as patch:
            StopAfter(patch, after)
            with pytest.raises(Interrupted):
                loop.train(tmp_path / f"{after}", run, quiet=True)
        loop.train(tmp_path / f"{after}", run, quiet=True)
        assert named(tmp_path / f"{after}", "best") == named(tmp_path / "whole", "best")
        one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / f"{after}")
        assert all(torch.equal(one[name], other[name]) for name in one)
        for name in ("step", "max_steps", "best", "waited", "validated"):
            assert state_of(tmp_path / f"{after}")[name] == state_of(tmp_path / "whole")[name]


def test_a_loss_that_is_no_number_is_never_the_best(text: Path, tmp_path: Path, judged: Any) -> None:
    judged([math.nan, math.nan, math.nan])
    run = small_run(text, "train.max_steps=40", "train.eval_every=2", "train.early_stop=2")
    done = loop.train(tmp_path / "run", run, quiet=True)
    assert done.steps == 4 and done.best is None and not os.path.lexists(tmp_path / "run" / "best")
    assert records(tmp_path / "run", "early_stop")[0]["best_step"] is None


def test_early_stop_without_validations_is_refused(text: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.early_stop = 2 counts validations: set train\.eval_every"):
        small_run(text, "train.early_stop=2")


def test_epochs_are_said(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = loop.train(tmp_path / "run", small_run(text, "train.max_steps=20"))
    seen = [record["epochs"] for record in records(tmp_path / "run", "step")]
    assert seen == sorted(seen) and done.epochs == seen[-1] > 1
    state = json.loads((tmp_path / "run" / "last" / "state.json").read_text())["batches"]
    assert state["epoch"] == int(seen[-1])
    assert f"({seen[-1]:.2f} epochs)" in done.lines()[0]
    assert "step 20/20  epoch " in capsys.readouterr().out


def test_the_command_line_takes_one_of_a_runs_checkpoints(text: Path, tmp_path: Path) -> None:
    changes = [*SMALL, f"data.sources=['{text}']", "train.max_steps=6", "train.save_every=2"]
    assert manyhands("train", "--preset", "tiny", "--out", str(tmp_path / "run"), *changes).returncode == 0
    run = str(tmp_path / "run")
    told = manyhands("convert", run, str(tmp_path / "four"), "--checkpoint", "4", "--no-agreement")
    assert told.returncode == 0, told.stderr
    said = manyhands("eval", run, "--data", str(text), "--checkpoint", "best", "--max-batches", "1", "--json")
    assert said.returncode == 0 and json.loads(said.stdout)["model"] == f"{run}/best"
    said = manyhands("generate", run, "--checkpoint", "last", "--prompt", "line", "--max-new-tokens", "2")
    assert said.returncode == 0 and said.stdout.startswith("line")
    for which, why in (
        ("first", "it is best, last, or the step of one"),
        ("3", "no checkpoint of step 3; it has 4, 6"),
    ):
        bad = manyhands("generate", run, "--checkpoint", which, "--prompt", "line")
        assert bad.returncode in (1, 2) and why in bad.stderr and "Traceback" not in bad.stderr
    bad = manyhands("eval", str(tmp_path / "four"), "--data", str(text), "--checkpoint", "best")
    assert bad.returncode == 2 and "is no run's directory" in bad.stderr
    from manyhands.checkpoint.runs import checkpoint_of

    with pytest.raises(UserError):
        checkpoint_of(tmp_path, "best")
    assert load_run(tmp_path / "run" / "run.yaml").train.keep_best
