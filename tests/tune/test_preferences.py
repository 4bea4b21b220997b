"""DPO: the loss that is written in the paper, packed or padded; from ln 2 down; the first model asked once."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.config import RunConfig
from manyhands.errors import ConfigError, DataError
from manyhands.models import Decoder, init_weights
from manyhands.parallel.ranks import Alone
from manyhands.text import Tokenizer
from manyhands.text.packing import RowBatch
from manyhands.text.pairs import NO_TARGET
from manyhands.trace.journal import read_journal
from manyhands.train import loop
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers
from manyhands.train.preferences import Preferences, with_reference
from manyhands.train.row_data import RowData, prepare_rows
from manyhands.train.start import Start
from manyhands.train.step import StepResult, train_step

from ..small_runs import manyhands, small_run
from .small import TUNE

BETA = 0.5
DPO = ["-s", f"rows.dpo_beta={BETA}"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "preferences.jsonl"
    with path.open("w") as file:
        for i in range(60):
            row = {"prompt": f"{i % 30}", "chosen": "yes"[: i % 3 + 1], "rejected": "naw"[: 3 - i % 3]}
            file.write(json.dumps(row) + "\n")
    return path


def run_of(source: Path, base: Path, *changes: str) -> RunConfig:
    run = small_run(
        source, f"start={base}", f"rows.dpo_beta={BETA}", "optim.grad_clip=null", "train.dtype=float32", *changes
    )
    return run.model_copy(update={"model": Start.open(str(base)).config})


def prepared(run: RunConfig, folder: Path, base: Path) -> RowData:
    start = Start.open(str(base))
    data = with_reference(prepare_rows(folder, run, print, start.tokenizer), folder, run, start, print)
    assert isinstance(data, RowData)
    return data


def likelihood(model: Decoder, read: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of a row's targets, from PyTorch alone."""
    logs = model(read[None]).logits[0].double().log_softmax(-1)
    return (logs.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels != NO_TARGET)).sum()


def take(run: RunConfig, batch: RowBatch) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """A step of another model than the reference, which changes nothing."""
    model = Decoder(run.model, "eager")
    init_weights(model, 1)
    model.double().train()
    task = Preferences(BETA)
    result = train_step(model, Optimizers([]), SpikeGuard(run.guard), batch, run, 1, 0.0, torch.float64, task)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_is_the_papers(base: Path, source: Path, tmp_path: Path) -> None:
    """Equation 7, and its gradient, with both models run row by row."""
    run = run_of(source, base, "balance.aux_loss_coef=0")
    data = prepared(run, tmp_path / "data", base)
    batch = next(Preferences(BETA).batches(data, run, Alone()))
    assert max(len(sequence) for sequence in batch.sequences) > 2
    reference = Start.open(str(base)).model("eager", torch.float32, torch.device("cpu")).double()
    model = Decoder(run.model, "eager")
    init_weights(model, 1)
    model.double().train()
    losses = []
    for better, worse in zip(batch.rows[::2], batch.rows[1::2], strict=True):
        with torch.no_grad():
            known = likelihood(reference, *better) - likelihood(reference, *worse)
        margin = likelihood(model, *better) - likelihood(model, *worse) - known
        losses.append(-torch.log(torch.sigmoid(BETA * margin)))
    wanted = torch.stack(losses).mean()
    wanted.backward()
    packed, padded = take(run, batch), take(run, RowBatch(batch.sequences, False, batch.reference))
    small = take(run.model_copy(update={"train": run.train.model_copy(update={"micro_batch_size": 1})}), batch)
    assert packed[0].count.targets == len(losses)
    for result, gradients in (packed, padded, small):
        assert result.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
        for name, p in model.named_parameters():
            if p.grad is not None:
                largest = float(p.grad.abs().max())
                torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=2e-5 * largest + 1e-12)


def test_a_run_from_ln_2_down(base: Path, source: Path, tmp_path: Path) -> None:
    """From the command line; the same loss before on what is held out, and a lower one after."""
    run = tmp_path / "run"
    arguments = ["--data", str(source), *DPO, *TUNE, "--max-steps", "12", "--out", str(run), "--json"]
    said = manyhands("tune", str(base), *arguments)
    assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)
    assert summary["before"]["valid_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert summary["valid_loss"] < 0.6
    steps = [r["loss"] for r in read_journal(run / "journal.jsonl") if r["kind"] == "step"]
    assert steps[0] == pytest.approx(math.log(2), abs=1e-4) and steps[-1] < steps[0]
    assert np.load(run / "data" / "train.reference.npy").max() < 0


def test_a_run_resumes_and_asks_the_first_model_no_more(
    base: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(source, base, "train.max_steps=4", "train.save_every=2")
    whole = loop.train(tmp_path / "whole", run, quiet=True)
    real = loop.save

    def save_and_die(trainer: loop.Trainer) -> Path:
        real(trainer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            loop.train(tmp_path / "parts", run, quiet=True)
    monkeypatch.setattr(Start, "model", lambda *args: pytest.fail("it asks again"))
    again = loop.train(tmp_path / "parts", run, quiet=True)
    weights = [(summary.checkpoint / "model.safetensors").read_bytes() for summary in (whole, again)]
    assert weights[0] == weights[1] and whole.valid_loss == again.valid_loss
    path = tmp_path / "parts" / "data" / "train.reference.npy"
    np.save(path, np.load(path) + 1)
    with pytest.raises(DataError, match="what the first model said is not of these rows, or was changed"):
        loop.train(tmp_path / "parts", run, quiet=True)


def test_what_does_not_belong_together_is_refused(base: Path, source: Path, tmp_path: Path) -> None:
    tokenizer = Start.open(str(base)).tokenizer()
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    cases: list[tuple[Any, str]] = [
        (
            small_run(source, "rows={}"),
            r"preferences.jsonl:1: rows of chosen and rejected are learnt by DPO: say rows.dpo_beta",
        ),
        (small_run(answers, "rows.dpo_beta=0.1"), "rows of prompt and completion have nothing rejected"),
    ]
    for run, words in cases:
        with pytest.raises(ConfigError, match=words):
            prepare_rows(tmp_path / "data", run, print, lambda: tokenizer)
    with pytest.raises(ConfigError, match=r"rows\.dpo_beta: preferences are learnt by a model that is there"):
        loop.train(tmp_path / "run", small_run(source, "rows.dpo_beta=0.1", "data.tokenizer=x"), quiet=True)


def test_pairs_that_a_cut_makes_alike_are_left_out(base: Path, tmp_path: Path) -> None:
    """What differs behind the cut teaches nothing."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(9)]
    rows += [{"prompt": "1", "chosen": "x" * 40 + "a", "rejected": "x" * 40 + "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer: Tokenizer = Start.open(str(base)).tokenizer()
    said: list[str] = []
    data = prepare_rows(
        tmp_path / "data", run_of(path, base, "data.valid_fraction=0.3"), said.append, lambda: tokenizer
    )
    assert len(data.train_rows) + len(data.valid_rows) == 18
    assert any("left out 1 rows" in line for line in said)
