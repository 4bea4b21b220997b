"""A run's trace: each n-th step, what the steps before and after were is as without it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manyhands.errors import ConfigError, StorageError
from manyhands.models import build
from manyhands.moe import Routing
from manyhands.trace.journal import read_journal
from manyhands.trace.part import Phase
from manyhands.trace.recorder import Recorder
from manyhands.trace.recording import Trace
from manyhands.train import loop
from manyhands.train.recording import StepTrace

from ..small_runs import small_run, write_text
from ..thread_ranks import ThreadRanks, on_ranks
from ..trace.traces import routing


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def losses(directory: Path) -> list[float]:
    return [r["loss"] for r in read_journal(directory / "journal.jsonl") if r["kind"] == "step"]


def traces(directory: Path) -> list[Path]:
    return sorted((directory / "traces").iterdir())


def test_each_second_step(tmp_path: Path, text: Path) -> None:
    loop.train(tmp_path / "plain", small_run(text, "train.max_steps=6"), quiet=True)
    run = small_run(text, "train.max_steps=6", "trace.every=2")
    loop.train(tmp_path / "traced", run, quiet=True)
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "traces").exists()
    (path,) = traces(tmp_path / "traced")
    trace = Trace.open(path)
    assert path.name == "step-000002" and trace.complete and trace.manifest.every == 2
    steps = list(trace.steps())
    micros = run.train.batch_size // (run.train.micro_batch_size or run.train.batch_size)
    assert [int(step.step[0]) for step in steps] == [s * micros + i for s in (2, 4, 6) for i in range(micros)]
    tokens = run.train.batch_size * run.train.sequence_length
    assert len(trace) == 3 * tokens and all(set(step.phase) == {Phase.TRAINING} for step in steps)
    assert steps[0].position[: run.train.sequence_length].tolist() == list(range(run.train.sequence_length))
    assert len(np.unique(np.concatenate([step.sequence for step in steps]))) == 3 * run.train.batch_size
    counted = {r["step"]: r["moe"] for r in read_journal(tmp_path / "traced" / "journal.jsonl") if r["kind"] == "step"}
    for at, layer in enumerate(trace.manifest.layers):  # the journal counted the same routing
        ids = np.concatenate([step.expert_ids[:, at] for step in steps if int(step.step[0]) // micros == 4])
        load = np.bincount(ids.ravel(), minlength=trace.manifest.num_experts)[: trace.manifest.num_experts]
        assert load.max() / load.mean() - 1 == pytest.approx(counted[4][str(layer)]["max_vio"], abs=1e-5)


def test_experts_that_choose_and_pairs_that_overflow(tmp_path: Path, text: Path) -> None:
    how = "train.max_steps=1", "trace.every=1"
    choice = "model.moe.router.select=expert_choice", "model.moe.router.bias=false"
    loop.train(tmp_path / "a", small_run(text, *how, *choice), quiet=True)
    loop.train(tmp_path / "b", small_run(text, *how, "model.moe.router.capacity_factor=0.5"), quiet=True)
    (chosen,), (capped,) = traces(tmp_path / "a"), traces(tmp_path / "b")
    manifest = Trace.open(chosen).manifest
    (part,) = Trace.open(chosen).whole()
    assert manifest.num_experts_per_tok == manifest.num_experts
    per_expert = np.bincount(part.expert_ids[:, 0].ravel(), minlength=256)[: manifest.num_experts]
    assert len(set(per_expert)) == 1 and per_expert[0] > 0  # each expert took as many as the others
    (part,) = Trace.open(capped).whole()
    assert part.kept is not None and 0 < part.kept.mean() < 1


def test_a_disk_that_refuses_ends_the_trace_and_not_the_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StorageError("cannot write it: No space left on device")

    monkeypatch.setattr(Recorder, "add_arrays", refuse)
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=3", "trace.every=1"), quiet=True)
    assert len(losses(tmp_path / "run")) == 3


def test_a_resumed_session_has_a_trace_of_its_own(tmp_path: Path, text: Path) -> None:
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=2", "trace.every=1"), quiet=True)
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=4", "trace.every=2"), quiet=True)
    assert [path.name for path in traces(tmp_path / "run")] == ["step-000001", "step-000004"]


def test_settings_are_checked(text: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace\.max_bytes = 5"):
        small_run(text, "trace.max_bytes=5")


def test_layers_share_what_the_others_are_told_of(tmp_path: Path, text: Path) -> None:
    """One mask of padding for two sparse layers, on two ranks: rank 0 writes the rows of both, layer by layer."""
    run = small_run(text, "trace.every=1", "model.num_hidden_layers=3", "train.batch_size=2")
    model, S = build(run.model), run.train.sequence_length
    layers, router, mask = run.model.sparse_layers, run.model.moe.router, torch.ones(S).bool()

    def routed(seed: int) -> Routing:
        return replace(routing(S, router.num_experts, router.num_experts_per_tok, seed), token_mask=mask)

    passes = [{layer: routed(10 * rank + layer) for layer in layers} for rank in range(2)]
    assert len(layers) > 1

    def work(ranks: ThreadRanks) -> None:
        with StepTrace(tmp_path, model, None, lambda note: None, ranks) as trace:
            seen = trace.seeing(1, run)
            assert seen is not None
            seen(torch.zeros(1, S + 1, dtype=torch.int64), passes[ranks.rank])

    on_ranks(2, work)
    (part,) = Trace.open(tmp_path / "step-000001").whole()
    for at, layer in enumerate(layers):
        told = torch.cat([one[layer].expert_ids for one in passes])
        assert part.expert_ids[:, at].tolist() == told.tolist()
