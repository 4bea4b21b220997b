"""A run that goes on: what may change, that the change is recorded, and that run.yaml repeats the run."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config.history import differences, settings_at
from manyhands.config.load import dump_run, load_run, parse_run
from manyhands.errors import ConfigError, TrainingHalted
from manyhands.trace.journal import read_journal
from manyhands.train import loop
from manyhands.train.guard import SpikeGuard

from ..small_runs import small_run, steps_of_a_second, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def steps_of(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_journal(directory / "journal.jsonl") if record["kind"] == "step"]


def model_of(directory: Path) -> dict[str, torch.Tensor]:
    newest = RunDirectory(directory).newest_valid()
    assert newest is not None
    return load_tensors(newest[1] / "model.safetensors")


def go_on(directory: Path, *changes: str) -> Any:
    return loop.train(directory, load_run(directory / "run.yaml", changes), quiet=True)


def assert_repeats(directory: Path, again: Path, *changes: str) -> None:
    loop.train(again, load_run(directory / "run.yaml", changes), quiet=True)
    assert [r["loss"] for r in steps_of(again)] == [r["loss"] for r in steps_of(directory)]
    assert [r["lr"] for r in steps_of(again)] == [r["lr"] for r in steps_of(directory)]
    one, other = model_of(directory), model_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_more_steps_go_on_without_a_jump_and_the_file_repeats_it(text: Path, tmp_path: Path) -> None:
    run = small_run(text, "train.max_steps=10", "schedule.warmup_steps=5")
    loop.train(tmp_path / "run", run, quiet=True)
    assert go_on(tmp_path / "run", "train.max_steps=20").steps == 20
    rates = [record["lr"] for record in steps_of(tmp_path / "run")]
    assert max(after - before for before, after in itertools.pairwise(rates)) <= run.optim.lr / 5 * 1.0001
    assert max(rates[10:]) > rates[9] and rates[-1] < max(rates[10:])  # it learns again, and falls again
    change = next(r for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "change")
    assert change["step"] == 10 and change["changes"] == {"train.max_steps": {"before": 10, "after": 20}}
    assert_repeats(tmp_path / "run", tmp_path / "again")


def test_constant_then_decay_is_the_run_that_was_planned_so(text: Path, tmp_path: Path) -> None:
    """Extended at a constant rate, and then let fall: bit for bit the run of that length."""
    warm = ["schedule.warmup_steps=2", "schedule.kind=wsd"]
    loop.train(tmp_path / "run", small_run(text, *warm, "train.max_steps=3", "schedule.decay_fraction=0"), quiet=True)
    go_on(tmp_path / "run", "train.max_steps=4")
    go_on(tmp_path / "run", "train.max_steps=8", "schedule.decay_fraction=0.5")
    loop.train(tmp_path / "at-once", small_run(text, *warm, "train.max_steps=8"), quiet=True)
    for name in ("lr", "loss"):
        assert [r[name] for r in steps_of(tmp_path / "run")] == [r[name] for r in steps_of(tmp_path / "at-once")]
    one, other = model_of(tmp_path / "run"), model_of(tmp_path / "at-once")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_settings_may_change_and_the_file_repeats_it(text: Path, tmp_path: Path) -> None:
    run = small_run(text, "train.max_steps=4", "schedule.warmup_steps=2")
    loop.train(tmp_path / "run", run, quiet=True)
    first = ["optim.lr=0.002", "optim.betas=[0.8, 0.9]", "guard.spike_sigma=null", "balance.bias_update_rate=0.05"]
    go_on(tmp_path / "run", "train.max_steps=8", *first)
    go_on(tmp_path / "run", "train.max_steps=11", "schedule.kind=cosine", "optim.weight_decay=0.2")
    saved = load_run(tmp_path / "run" / "run.yaml")
    assert [change.step for change in saved.history] == [0, 4, 8]
    assert settings_at(saved, 3).optim == run.optim and settings_at(saved, 4).optim.lr == 0.002
    assert settings_at(saved, 11).train.max_steps == 11 and parse_run(dump_run(saved), "") == saved
    assert_repeats(tmp_path / "run", tmp_path / "again")
    loop.train(tmp_path / "new", load_run(tmp_path / "run" / "run.yaml", ["history=[]"]), quiet=True)
    assert [r["lr"] for r in steps_of(tmp_path / "new")] != [r["lr"] for r in steps_of(tmp_path / "run")]


def test_a_stopped_run_takes_the_advice_of_its_guard(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = small_run(text, "train.max_steps=60", "train.save_every=4", "guard.max_skips=3")
    real = loop.train_step

    def spiked(model: torch.nn.Module, *args: Any) -> Any:
        handle = model.get_parameter("norm.weight").register_hook(lambda grad: grad + 1e4 * args[4])
        try:
            return real(model, *args) if args[4] >= 40 else plain(model, handle, *args)
        finally:
            handle.remove()

    def plain(model: torch.nn.Module, handle: Any, *args: Any) -> Any:
        handle.remove()
        return real(model, *args)

    monkeypatch.setattr(loop, "train_step", spiked)
    with pytest.raises(TrainingHalted, match=r"--resume .* guard\.spike_sigma=null"):
        loop.train(tmp_path / "run", run, quiet=True)
    assert go_on(tmp_path / "run", "optim.lr=0.001", "guard.spike_sigma=null", "train.max_steps=44").steps == 44


def test_a_time_budget_can_be_extended_and_its_file_repeats_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_of_a_second(monkeypatch)
    run = small_run(text, "train.max_seconds=20", "train.max_steps=50000")
    planned = loop.train(tmp_path / "run", run, quiet=True).steps
    assert 12 < planned <= 20
    assert loop.train(tmp_path / "run", run, quiet=True).steps == planned  # the same command again: finished
    assert_repeats(tmp_path / "run", tmp_path / "again")
    longer = go_on(tmp_path / "run", "train.max_seconds=30").steps
    assert planned < longer <= 30
    assert go_on(tmp_path / "run", f"train.max_steps={longer + 3}").steps == longer + 3
    saved = load_run(tmp_path / "run" / "run.yaml")
    assert saved.train.max_seconds is None and settings_at(saved, longer + 3).train.max_steps == longer + 3


def test_a_plan_made_before_histories_is_kept(text: Path, tmp_path: Path) -> None:
    run = small_run(text, "train.max_steps=6")
    loop.train(tmp_path / "run", run, quiet=True)
    newest = RunDirectory(tmp_path / "run").newest_valid()
    assert newest is not None
    from manyhands.train.budget import with_plan

    state = json.loads((newest[1] / "state.json").read_text())
    (newest[1] / "state.json").write_text(json.dumps(state | {"planned": True, "max_steps": 31}))
    old = run.model_copy(update={"train": run.train.model_copy(update={"max_seconds": 9.0})})
    assert settings_at(with_plan(old, newest[1]), 6).train.max_steps == 31


def test_what_makes_it_another_run_is_refused_by_name(text: Path, tmp_path: Path) -> None:
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=2"), quiet=True)
    before = (tmp_path / "run" / "run.yaml").read_text()
    for change in ("data.seed=3", "model.moe.router.num_experts=4", "optim.router_optim=muon", "train.dtype=bfloat16"):
        with pytest.raises(ConfigError, match=r"another run: its (data\.seed|model\.moe|optim\.|train\.dtype)"):
            go_on(tmp_path / "run", change)
    assert (tmp_path / "run" / "run.yaml").read_text() == before
    for bad in ("{step: 1, set: {model.hidden_size: 3}}", "{step: 1, set: {optim.lr: -1}}", "{step: 1, set: {no: 1}}"):
        with pytest.raises(ConfigError, match=r"history|optim"):
            small_run(text, f"history=[{bad}]")


def test_every_field_is_either_the_run_itself_or_recorded_or_free(text: Path) -> None:
    """A new field must be put on one of the lists, or be a setting that the step reads."""
    from manyhands.config.history import FREE, SAME

    run = small_run(text)
    whole = ("start", "trainable", "rows", "tune")
    assert set(whole) <= set(SAME)
    sections = [section for section in type(run).model_fields if section not in ("history", *whole)]
    fields = [f"{section}.{name}" for section in sections for name in type(getattr(run, section)).model_fields]
    recorded = [path for path in fields if path not in FREE and not path.startswith(SAME)]
    assert {path.partition(".")[0] for path in recorded} == {"balance", "optim", "schedule", "guard", "train"}
    assert [path for path in recorded if path.startswith("train.")] == [
        "train.max_steps",
        "train.max_seconds",
        "train.micro_batch_size",
        "train.early_stop",
    ]
    assert differences(run, run) == {}


def test_the_rate_of_the_last_step_is_remembered(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "no_faster_than_warmup", lambda *args: 0.00123)
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=2"), quiet=True)
    seen: list[float] = []
    monkeypatch.setattr(loop, "no_faster_than_warmup", lambda rate, before, *rest: seen.append(before) or rate)
    go_on(tmp_path / "run", "train.max_steps=3")
    assert seen[0] == 0.00123


def test_a_repeated_run_changes_its_guard_on_the_way(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=2"), quiet=True)
    go_on(tmp_path / "run", "train.max_steps=3", "guard.max_skips=3")
    seen: list[int] = []
    monkeypatch.setattr(SpikeGuard, "observe", lambda self, *pair: seen.append(self.config.max_skips))
    loop.train(tmp_path / "again", load_run(tmp_path / "run" / "run.yaml"), quiet=True)
    assert seen == [10, 10, 3]
