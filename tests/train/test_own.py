"""`mh.train`: a model, batches, a loss and callbacks of the caller's own; without, the same run as `loop.train`'s."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import manyhands as mh
from manyhands.compare.history import History
from manyhands.compare.verdict import judge
from manyhands.config.load import dump_run
from manyhands.errors import CheckpointError, ConfigError, DataError, Interrupted
from manyhands.models import build, init_weights
from manyhands.text import PackedBatches
from manyhands.trace.journal import read_journal
from manyhands.trace.origin import origin
from manyhands.train import finish, loop
from manyhands.train.own_task import OwnBatches, OwnTask
from manyhands.train.task import LanguageModelling

from ..small_runs import small_run, write_text
from .test_loop import StopAfter, weights_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), 250)


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, and without waiting for the disk."""
    monkeypatch.setattr(finish, "token_shares", lambda *args: (None, None))
    monkeypatch.setattr(finish, "write_report", lambda *args: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_journal(directory / "journal.jsonl") if record["kind"] == "step"]


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights_of(one), weights_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def language_loss(model: Any, ids: torch.Tensor) -> Any:
    out = model(ids[:, :-1])
    return F.cross_entropy(out.logits.flatten(0, 1).float(), ids[:, 1:].flatten()), out.routings


class Misspelt(mh.Callback):
    def on_stp(self, moment: mh.Moment) -> None:
        """Would never be called."""


class Watch(mh.Callback):
    """What was told, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_step(self, moment: mh.Moment) -> None:
        self.told.append((moment.step, moment.record["loss"]))

    def on_validation(self, moment: mh.Moment) -> None:
        self.told.append(("valid", moment.step))

    def on_end(self, moment: mh.Moment) -> None:
        self.told.append(("end", moment.step))


def test_what_is_ones_own_but_the_same_gives_the_same_run(text: Path, tmp_path: Path) -> None:
    """The run's own model, batches and loss, brought from outside, against the run that makes them."""
    run = small_run(text, "train.max_steps=4", "train.log_every=3", "train.eval_every=2", "train.dtype=float32")
    loop.train(tmp_path / "plain", run, quiet=True)
    seen: list[torch.Tensor] = []
    real = PackedBatches.__next__

    def watched(self: PackedBatches) -> torch.Tensor:
        seen.append(real(self))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedBatches, "__next__", watched)
        (tmp_path / "mine.yaml").write_text(dump_run(run))
        watch = Watch()
        mh.train(tmp_path / "mine.yaml", callbacks=[watch], out=tmp_path / "watched", quiet=True)
    assert same_weights(tmp_path / "plain", tmp_path / "watched"), "watching changes nothing"
    steps = [told for told in watch.told if isinstance(told[0], int)]
    assert [step for step, _ in steps] == [1, 2, 3, 4] and steps[2][1] == losses(tmp_path / "plain")[0]
    assert [told for told in watch.told if told[0] == "valid"] == [("valid", 2), ("valid", 4)]
    assert watch.told[-1] == ("end", 4)
    model = build(run.model, "auto")
    init_weights(model, run.train.seed)
    valid = [torch.zeros(2, 9, dtype=torch.int64)]
    mh.train(run, model, seen, language_loss, valid=valid, out=tmp_path / "own", quiet=True)
    history = History.of(read_journal(tmp_path / "own" / "journal.jsonl"), run)
    assert history.own == ["model", "batches", "valid", "loss"] and history.chance is None and history.tuned
    told = origin(history.start, history.steps, history.evals)
    assert told["brought by the caller"] == "model, batches, valid, loss"
    assert history.unigram is None and history.epochs is None, "of a text that it did not learn"
    ours, theirs = losses(tmp_path / "own"), losses(tmp_path / "plain")
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 2
    assert torch.equal(
        model.state_dict()["embed_tokens.weight"], weights_of(tmp_path / "own")["model.embed_tokens.weight"]
    )


class Counting:
    """Batches that know where they are."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> torch.Tensor:
        self.number += 1
        return torch.randint(250, (4, 17), generator=torch.Generator().manual_seed(self.number))

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def test_ones_own_run_resumes_bit_for_bit_and_not_without_what_it_had(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(text, "train.max_steps=6", "train.micro_batch_size=2")
    listed = [next(batches) for batches in [Counting()] for _ in range(4)]
    for name, make in (("knows", Counting), ("again", lambda: listed)):
        mh.train(run, batches=make(), out=tmp_path / name, quiet=True)
        with monkeypatch.context() as patch:
            StopAfter(patch, 5)  # in the second round of the list
            with pytest.raises(Interrupted):
                mh.train(run, batches=make(), out=tmp_path / f"{name}-parts", quiet=True)
        mh.train(tmp_path / f"{name}-parts", batches=make(), quiet=True)
        assert losses(tmp_path / f"{name}-parts") == losses(tmp_path / name)
        assert same_weights(tmp_path / f"{name}-parts", tmp_path / name)
    with pytest.raises(CheckpointError, match=r"trained with the caller's own batches, and .* run\.yaml says alone"):
        loop.train(tmp_path / "knows", run, quiet=True)
    with pytest.raises(CheckpointError, match="one in other batches"):
        mh.train(tmp_path / "knows", batches=listed, quiet=True)


class Fails(mh.Callback):
    def on_step(self, moment: mh.Moment) -> None:
        if moment.step == 3:
            raise ZeroDivisionError("mine")


def test_a_callback_that_fails_stops_the_run_saved(text: Path, tmp_path: Path) -> None:
    run = small_run(text, "train.max_steps=5", "train.eval_every=3")
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        mh.train(run, callbacks=[Fails()], out=tmp_path / "run", quiet=True)
    [note] = raised.value.__notes__
    assert note.startswith("Fails.on_step at step 3 raised ZeroDivisionError: step 3 is saved in ")
    ends = [r["reason"] for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "end"]
    assert ends == ["callback Fails.on_step at step 3 raised ZeroDivisionError"]
    found = judge(read_journal(tmp_path / "run" / "journal.jsonl"), run)
    assert [finding.kind for finding in found.findings if finding.fault] == ["unfinished"]
    mh.train(tmp_path / "run", quiet=True)
    loop.train(tmp_path / "whole", run, quiet=True)
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_what_does_not_fit_is_said_before_anything_is_made(text: Path, tmp_path: Path) -> None:
    run, out = small_run(text), tmp_path / "run"
    half = build(run.model, "auto").to(torch.bfloat16)
    for arguments, why in (
        ({"run": run}, "out: say in which directory"),
        ({"run": "quickstrat"}, r"no preset \(.*quickstart"),
        ({"run": run, "callbacks": [Watch], "out": out}, r"Watch is a class: make one of it"),
        ({"run": run, "callbacks": [print], "out": out}, "has no on_step"),
        ({"run": run, "callbacks": [Misspelt()], "out": out}, "Misspelt.on_stp is never called"),
        ({"run": run, "model": torch.nn.Linear(2, 2), "out": out}, "Linear is no model of this package"),
        ({"run": run, "model": half, "out": out}, "is bfloat16; weights are trained in float32"),
        ({"run": run, "batches": [], "loss": language_loss, "out": out}, "say on which batches validation judges it"),
        ({"run": run, "model": build(small_run(text, "model.hidden_size=48").model, "auto"), "out": out}, "its config"),
    ):
        with pytest.raises(ConfigError, match=why):
            mh.train(**arguments)  # type: ignore[arg-type]
    assert not out.exists()


def test_batches_and_losses_that_are_none(text: Path) -> None:
    task, model = LanguageModelling(), build(small_run(text).model, "auto")
    for batch in (torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64), {"ids": torch.zeros(2, 5)}, "text"):
        with pytest.raises(DataError, match=r"they are token ids \[B, S \+ 1\], int64"):
            OwnTask(task, [batch]).count(batch)
    with pytest.raises(DataError, match=r"token ids up to 300; model.vocab_size = 300"):
        OwnTask(task, [0]).loss(model, torch.full((1, 4), 300), None)  # type: ignore[arg-type]
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for bad, why in (
        (lambda model, batch: 3.0, "gave float"),
        (lambda model, batch: torch.zeros(2), r"shape \[2\]"),
        (lambda model, batch: torch.zeros(()), r"no routing of layer 1; return \(mean, out.routings\)"),
    ):
        with pytest.raises(DataError, match=why):
            OwnTask(task, [ids], own_loss=bad).loss(model, ids, None)  # type: ignore[arg-type]
    own = OwnTask(task, [ids], own_loss=language_loss)
    for ragged in ((torch.zeros(2), torch.zeros(3)), (), {"name": "x"}):
        with pytest.raises(DataError, match="all with as many rows"):
            own.split(ragged, 1)
    parts = own.split({"x": torch.arange(4), "y": torch.zeros(4, 2), "name": "kept"}, 3)
    assert [len(part["x"]) for part in parts] == [3, 1] and parts[0]["name"] == "kept"
    assert [len(part[1]) for part in own.split((torch.zeros(4), torch.zeros(4, 2)), 2)] == [2, 2]


def test_batches_that_end() -> None:
    def once() -> Iterator[int]:
        yield from (1, 2)

    batches = OwnBatches(once())
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(DataError, match="ended after 2; give a list or a DataLoader"):
        next(batches)
    with pytest.raises(DataError, match="are none"):
        next(OwnBatches([]))
    again = OwnBatches([1, 2])
    assert [next(again) for _ in range(5)] == [1, 2, 1, 2, 1]


round_again = OwnBatches([1, 2])
