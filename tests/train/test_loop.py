"""A run: resume is bit-equal, a signal saves, NaN and spikes change nothing, a second process is refused."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config import RunConfig
from manyhands.errors import ConfigError, Interrupted, RunLocked, TrainingHalted
from manyhands.text import Tokenizer
from manyhands.trace.documents import DocumentLosses
from manyhands.trace.journal import read_journal
from manyhands.train import loop, step, task
from manyhands.train.guard import SpikeGuard
from manyhands.train.signals import StopSignals

from ..small_runs import SMALL, small_run, steps_of_a_second, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    newest = RunDirectory(directory).newest_valid()
    assert newest is not None
    files = [newest[1] / f"{name}.safetensors" for name in ("model", "optimizer", "rng")]
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_tensors(file).items()}


TIMES = ("elapsed", "wall")


def state_of(directory: Path) -> dict[str, Any]:
    newest = RunDirectory(directory).newest_valid()
    assert newest is not None
    state: dict[str, Any] = json.loads((newest[1] / "state.json").read_text())
    return state


class StopAfter(StopSignals):
    """Asks to stop once this many steps are done, as a signal would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        super().__init__()
        real, done = loop.train_step, 0

        def counted(*args: object) -> step.StepResult:
            nonlocal done
            done += 1
            if done == after:
                self.requested = signal.SIGTERM
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "train_step", counted)
        monkeypatch.setattr(loop, "StopSignals", lambda: self)


VARIANTS = {
    "muon, loss-free bias": [],
    "adamw, noisy router": [
        "optim.name=adamw",
        "model.moe.router.score=softmax",
        "model.moe.router.bias=false",
        "model.moe.router.noisy=true",
        "balance.load_coef=0.1",
        "balance.importance_coef=0.1",
    ],
    "accumulation, jitter, random second": [
        "train.micro_batch_size=1",
        "model.moe.router.jitter=0.01",
        "model.moe.router.random_second=true",
        "model.moe.router.capacity_factor=1.25",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_equal(variant: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimiser, random generators, losses and balance bias, through more than one epoch."""
    run = small_run(text, "train.max_steps=40", "train.save_every=10", *VARIANTS[variant])
    whole = loop.train(tmp_path / "whole", run, quiet=True)
    with monkeypatch.context() as patch:
        StopAfter(patch, 17)
        with pytest.raises(Interrupted, match="step 17") as interrupted:
            loop.train(tmp_path / "parts", run, quiet=True)
        assert interrupted.value.exit_code == 143
    torch.manual_seed(99)  # whatever the global generator was, resuming must not care
    parts = loop.train(tmp_path / "parts", run, quiet=True)
    assert parts.valid_loss == whole.valid_loss
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    ours, theirs = (DocumentLosses.open(tmp_path / name / "documents.safetensors") for name in ("whole", "parts"))
    assert ours.last.step == 40 and np.array_equal(ours.last.nats_X, theirs.last.nats_X)
    assert ours.last.sum / math.log(2) / ours.documents.bytes_X.sum() == pytest.approx(whole.valid_bits_per_byte)
    journals = [read_journal(tmp_path / name / "journal.jsonl") for name in ("whole", "parts")]
    losses = [[r["loss"] for r in records if r["kind"] == "step"] for records in journals]
    assert len(losses[0]) == 40 and losses[0] == losses[1]
    one_state, other_state = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert {k: v for k, v in one_state.items() if k not in TIMES} == {
        k: v for k, v in other_state.items() if k not in TIMES
    }
    assert len(one_state["guard"]["losses"]) == 40
    for clock in TIMES:  # a resumed run's time goes on
        seconds = [r[clock] for r in journals[1] if r["kind"] == "step"]
        assert all(after > before for before, after in itertools.pairwise(seconds))
        assert other_state[clock] >= seconds[-1] > seconds[16] > 0


def test_another_run_is_refused_but_more_steps_are_not(text: Path, tmp_path: Path) -> None:
    loop.train(tmp_path / "run", small_run(text, "train.max_steps=4"), quiet=True)
    for change in ("train.seed=1", "model.hidden_size=48", "optim.name=adamw", "train.batch_size=8"):
        with pytest.raises(ConfigError, match=change.partition("=")[0]):
            loop.train(tmp_path / "run", small_run(text, change), quiet=True)
    assert loop.train(tmp_path / "run", small_run(text, "train.max_steps=6"), quiet=True).steps == 6


def test_a_second_process_is_refused(text: Path, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(RunLocked, match=str(os.getpid())):
        loop.train(tmp_path / "run", small_run(text), quiet=True)


def test_sigterm_saves_and_exits_143(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "manyhands", "train", "--preset", "tiny", "--out", str(tmp_path / "run")]
    changes = [*SMALL, f"data.sources=['{text}']", "train.max_steps=100000"]
    process = subprocess.Popen(
        [*command, *changes],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    journal = tmp_path / "run" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and '"kind":"step"' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert b"SIGTERM: saved step" in errors and b"Traceback" not in errors
    newest = RunDirectory(tmp_path / "run").newest_valid()
    assert newest is not None
    last = [record for record in read_journal(journal) if record["kind"] == "step"][-1]
    assert newest[0] == last["step"]


def weights_before_and_after(
    run: RunConfig, path: Path, monkeypatch: pytest.MonkeyPatch, at: int, spoil: object
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]:
    """Weights when step `at` began, and after it raised; and what it raised."""
    real, seen = loop.train_step, {}

    def watched(model: object, *args: object) -> step.StepResult:
        if args[4] == at:
            seen["model"] = model
            seen["before"] = {k: v.clone() for k, v in model.state_dict().items()}  # type: ignore[attr-defined]
            spoil(model)  # type: ignore[operator]
        return real(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", watched)
    with pytest.raises(TrainingHalted) as halted:
        loop.train(path, run, quiet=True)
    after = {k: v.clone() for k, v in seen["model"].state_dict().items()}
    return seen["before"], after, str(halted.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_bad_gradient_changes_no_weight_and_is_named(
    value: float, log_every: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module) -> None:
        model.get_parameter("layers.1.mlp.experts.down_proj").register_hook(lambda grad: grad * value)

    run = small_run(text, f"train.log_every={log_every}")
    before, after, said = weights_before_and_after(run, tmp_path / "run", monkeypatch, 5, spoil)
    assert "step 5" in said and "layers.1.mlp.experts.down_proj" in said
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bad_loss_changes_no_weight(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = task.linear_cross_entropy

    def spoil(model: torch.nn.Module) -> None:
        monkeypatch.setattr(task, "linear_cross_entropy", lambda *args: real(*args) * float("nan"))

    before, after, said = weights_before_and_after(small_run(text), tmp_path / "run", monkeypatch, 3, spoil)
    assert "step 3: the loss is not finite" in said
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bad_weight_is_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("layers.0.self_attn.q_proj.weight")[3, 3] = float("nan")

    *_, said = weights_before_and_after(small_run(text), tmp_path / "run", monkeypatch, 4, spoil)
    assert "weight layers.0.self_attn.q_proj.weight" in said


def test_one_spike_skips_one_update(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = loop.train_step, []

    def spiked(model: torch.nn.Module, *args: object) -> step.StepResult:
        handle = None
        if args[4] == 45:
            handle = model.get_parameter("norm.weight").register_hook(lambda grad: grad + 1e4)
        before = model.get_parameter("embed_tokens.weight").clone()
        result = real(model, *args)  # type: ignore[arg-type]
        seen.append(torch.equal(before, model.get_parameter("embed_tokens.weight")))
        if handle is not None:
            handle.remove()
        return result

    monkeypatch.setattr(loop, "train_step", spiked)
    summary = loop.train(tmp_path / "run", small_run(text, "train.max_steps=50"), quiet=True)
    assert summary.skipped == 1
    assert [i + 1 for i, unchanged in enumerate(seen) if unchanged] == [45]


def test_a_time_budget_becomes_a_number_of_steps_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(text, "train.max_seconds=6", "train.max_steps=50000", "train.save_every=5")
    clock = steps_of_a_second(monkeypatch, 0.1)
    with monkeypatch.context() as patch:
        StopAfter(patch, 20)
        with pytest.raises(Interrupted):
            loop.train(tmp_path / "run", run, quiet=True)
    state = state_of(tmp_path / "run")
    assert state["planned"] and 40 <= state["max_steps"] < 60  # what is left is for validation
    done = loop.train(tmp_path / "run", run, quiet=True)
    assert done.steps == state["max_steps"] and clock[0] == pytest.approx(done.steps / 10)
    assert f"time budget of 6 s: {done.steps} steps planned at step 7; ended at step" in "\n".join(done.lines())


def test_evaluation_changes_nothing(text: Path, tmp_path: Path) -> None:
    """Validating along the way, sampling and taking experts away leave all as it would have been."""
    changes = ["train.max_steps=20", "model.moe.router.jitter=0.01"]
    looks = ["train.eval_every=9", "train.sample_tokens=4", "train.worth_every=7"]
    loop.train(tmp_path / "without", small_run(text, *changes), quiet=True)
    loop.train(tmp_path / "with", small_run(text, *changes, *looks), quiet=True)
    one, other = weights_of(tmp_path / "without"), weights_of(tmp_path / "with")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_dense_model_trains(text: Path, tmp_path: Path) -> None:
    assert loop.train(tmp_path / "run", small_run(text, "model.moe=null"), quiet=True).balance == {}


def test_mla_with_qk_clip_trains(text: Path, tmp_path: Path) -> None:
    changes = [
        "model.attention={kind: mla, num_attention_heads: 2, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 16, "
        "qk_rope_head_dim: 8, v_head_dim: 16}",
        "optim.qk_clip=0.05",
        "train.max_steps=12",
    ]
    summary = loop.train(tmp_path / "run", small_run(text, *changes), quiet=True)
    assert summary.steps == 12 and summary.valid_loss < 6


def test_bfloat16_computes_on_float32_masters(text: Path, tmp_path: Path) -> None:
    changes = ["train.dtype=bfloat16", "train.recompute=true", "train.micro_batch_size=2", "train.max_steps=30"]
    half = loop.train(tmp_path / "half", small_run(text, *changes), quiet=True)
    assert {t.dtype for name, t in weights_of(tmp_path / "half").items() if name.startswith("model.")} == {
        torch.float32
    }
    changes[0] = "train.dtype=float32"
    full = loop.train(tmp_path / "full", small_run(text, *changes), quiet=True)
    assert half.valid_loss != full.valid_loss  # else nothing was computed in bfloat16
    assert half.valid_loss == pytest.approx(full.valid_loss, rel=0.05)


def test_recomputation_changes_nothing(text: Path, tmp_path: Path) -> None:
    """The same losses, counts and biases, though every block runs twice: the router's coins are tossed alike."""
    changes = ["train.max_steps=12", "model.moe.router.jitter=0.05", "model.moe.router.capacity_factor=1.0"]
    loop.train(tmp_path / "without", small_run(text, *changes), quiet=True)
    loop.train(tmp_path / "with", small_run(text, *changes, "train.recompute=true"), quiet=True)
    one, other = weights_of(tmp_path / "without"), weights_of(tmp_path / "with")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_tokenizer_that_does_not_fit_the_vocabulary(text: Path, tmp_path: Path) -> None:
    loop.train(tmp_path / "first", small_run(text, "train.max_steps=1"), quiet=True)
    tokenizer = tmp_path / "first" / "data" / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 280"):
        run = small_run(text, f"data.tokenizer={tokenizer}", "model.vocab_size=280")
        loop.train(tmp_path / "second", run, quiet=True)


def test_bits_per_byte_are_those_of_the_text(text: Path, tmp_path: Path) -> None:
    """Counted from the token files and the text itself: half of it is validation text, at most one byte a token."""
    run = small_run(text, "train.max_steps=3", "train.eval_every=2", "data.valid_fraction=0.3")
    loop.train(tmp_path / "run", run, quiet=True)
    tokenizer = Tokenizer.from_file(tmp_path / "run" / "data" / "tokenizer.json")
    ids = {side: np.load(tmp_path / "run" / "data" / f"{side}.npy") for side in ("train", "valid")}
    texts = {side: tokenizer.decode([i for i in ids[side].tolist() if i != tokenizer.eos_token_id]) for side in ids}
    assert sum(len(t) for t in texts.values()) == len(text.read_text())
    for record in read_journal(tmp_path / "run" / "journal.jsonl"):
        if record["kind"] == "step":
            nats = record["loss"] * len(ids["train"])
            assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(texts["train"].encode()))
        if record["kind"] == "eval":
            nats = record["valid_loss"] * (len(ids["valid"]) - 1)
            assert record["valid_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(texts["valid"].encode()))


def test_a_run_saves_by_time_keeps_few_and_computes_the_same(text: Path, tmp_path: Path) -> None:
    """A kill loses what was done since the last checkpoint: the first process is not even told."""
    changes = ["train.max_steps=30", "train.save_seconds=1e-9"]
    loop.train(tmp_path / "run", small_run(text, *changes), quiet=True)
    saved = [r["step"] for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "checkpoint"]
    assert len(saved) >= 2 and saved[0] < 30 and len(RunDirectory(tmp_path / "run").checkpoints()) <= 2
    loop.train(tmp_path / "never", small_run(text, "train.max_steps=30", "train.save_seconds=0"), quiet=True)
    one, other = weights_of(tmp_path / "run"), weights_of(tmp_path / "never")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert small_run(text).train.save_seconds == 120  # by default


def test_time_is_that_of_steps_and_validation_is_told_apart(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, real_evaluate = steps_of_a_second(monkeypatch), task.evaluate

    def ten_seconds(*args: Any, **kwargs: Any) -> Any:
        clock[0] += 10.0
        return real_evaluate(*args, **kwargs)

    monkeypatch.setattr(task, "evaluate", ten_seconds)
    summary = loop.train(tmp_path / "run", small_run(text, "train.max_steps=4", "train.eval_every=1"), quiet=True)
    assert summary.seconds == 4 and summary.tokens_per_s == 32 * 4
    end = read_journal(tmp_path / "run" / "journal.jsonl")[-1]
    assert (end["elapsed"], end["wall"]) == (4, 44)


@pytest.mark.parametrize("every", [1, 7])
def test_the_summary_counts_what_was_not_logged(
    every: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpikeGuard, "observe", lambda self, *pair: next(steps) in (3, 5, 8))
    steps = iter(range(1, 100))
    summary = loop.train(
        tmp_path / "run", small_run(text, "train.max_steps=20", f"train.log_every={every}"), quiet=True
    )
    assert summary.skipped == 3 and summary.steps == 20


def test_it_says_what_is_wrong_with_a_run_that_ended(text: Path, tmp_path: Path) -> None:
    bad = ["model.moe.router.init=zeros", "model.moe.router.bias=false", "balance.aux_loss_coef=0", "optim.lr=9"]
    summary = loop.train(tmp_path / "run", small_run(text, *bad, "train.max_steps=50"), quiet=True)
    assert summary.verdict.exit_code() == 4 and "verdict: not worth keeping" in summary.lines()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Verdict: not worth keeping" in page and "the training loss was lowest" in page
    short = loop.train(tmp_path / "short", small_run(text, *bad, "train.max_steps=3"), quiet=True)
    assert short.verdict.outcome == "too short to judge" and short.verdict.exit_code() == 0
