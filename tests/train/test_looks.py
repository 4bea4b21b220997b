"""What a run looks at beside its loss: worth, samples, speed; in the journal, on the screen and in the report."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.compare.worth import expert_worth
from manyhands.config import RunConfig
from manyhands.files import VALID_TOKENS
from manyhands.models import Decoder
from manyhands.text import TokenFile
from manyhands.trace.journal import read_journal
from manyhands.train import looks, loop
from manyhands.train.speed import used

from ..small_runs import small_run, write_text

CHANGES = ["train.max_steps=12", "train.eval_every=6", "train.worth_every=5", "train.sample_tokens=6"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, list[dict[str, Any]], list[str]]:
    folder = tmp_path_factory.mktemp("looks")
    run = small_run(write_text(folder), *CHANGES)
    summary = loop.train(folder / "run", run, quiet=True)
    return folder / "run", run, read_journal(folder / "run" / "journal.jsonl"), summary.lines()


def of_kind(records: list[dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in records if record["kind"] == kind}


def test_worth_is_measured_when_asked_and_at_the_end_in_bits_per_byte(done: Any) -> None:
    path, run, records, _ = done
    worths = of_kind(records, "worth")
    assert list(worths) == [5, 10, 12]
    valid = TokenFile.open(path / "data" / VALID_TOKENS, 300)
    texts = looks.worth_texts(valid, run, 12)
    model = mh.load(str(path))[0]
    assert texts is not None and isinstance(model, Decoder)
    found, last = expert_worth(model, texts, plain=True), worths[12]
    bits = valid.info.num_tokens / valid.info.num_bytes / math.log(2)
    assert (last["texts"], last["tokens"]) == (len(texts), texts[:, 1:].numel())
    assert last["layers"].keys() == {str(layer) for layer in found.layers}
    for layer, of in found.layers.items():
        said = last["layers"][str(layer)]
        assert said["cost"] == pytest.approx([bits * e.cost for e in of.experts], abs=1e-5)
        assert said["shuffled"] == pytest.approx(bits * of.shuffled, abs=1e-5)
        assert [said[name] for name in ("tokens", "twin")] == [
            [e.tokens for e in of.experts], [e.twin for e in of.experts]
        ]  # fmt: skip


def test_samples_and_the_machine_are_said(done: Any) -> None:
    path, _, records, lines = done
    samples = of_kind(records, "sample")
    assert list(samples) == [6, 12] and len({sample["prompt"] for sample in samples.values()}) == 1
    assert all(sample["prompt"] and sample["text"] for sample in samples.values())
    model, steps = mh.load(str(path))[0], list(of_kind(records, "step").values())
    active = sum(p.numel() for p in model.parameters())
    for step in steps:
        each = step["flops_per_s"] / step["tokens_per_s"]
        assert 0.1 * 6 * active < each < 12 * active  # between the active parameters alone and attention with them
        assert step["mfu"] is None or step["mfu"] > 0
    assert used(steps) in lines
    page = (path / "report.html").read_text()
    assert "What each expert is worth" in page and "What it writes" in page and "FLOP/s</dd>" in page


def test_by_itself_it_takes_no_more_than_a_twentieth_of_the_time(tmp_path: Path) -> None:
    """Of runs of any length, counted in steps; the short ones are left alone."""
    text = write_text(tmp_path)
    for steps in (8, 100, 1000, 100_000):
        run = small_run(text, f"train.max_steps={steps}", "train.eval_every=2")
        last = looks.worth_steps(run, steps, 100_000)
        before = sum(looks._due(run, step, steps) for step in range(1, steps)) if steps < 10_000 else 0
        assert (before + 1) * last <= 0.05 * steps + 1e-9
        assert (last > 0) == (steps >= 1000)
    off = small_run(text, "train.worth_every=0", "train.max_steps=1000")
    assert looks.worth_steps(off, 1000, 100_000) == 0 and not looks._due(off, 10, 1000)


def test_a_model_that_went_wrong_does_not_end_a_run_when_it_is_looked_at(done: Any) -> None:
    path, run, _, _ = done
    model, tokenizer = mh.load(str(path))
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    valid = TokenFile.open(path / "data" / VALID_TOKENS, 300)

    class Data:
        pass

    data: Any = Data()
    data.valid, data.tokenizer = valid, tokenizer
    assert "diverged" in looks.sample(model, data, 0, 4)[1]
    texts = looks.worth_texts(valid, run, 12)
    found = expert_worth(model, texts)  # type: ignore[arg-type]
    assert all(math.isnan(of.shuffled) for of in found.layers.values())
