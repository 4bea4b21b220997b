"""A run of another kind than a decoder: trained, stopped and resumed bit for bit, saved, loaded, read, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.checkpoint.model import RecurrentModel, load, load_model
from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config import RecurrentConfig, RunConfig
from manyhands.config.load import dump_run, parse_run
from manyhands.errors import ConfigError
from manyhands.models import Recurrent, build
from manyhands.plan.subject import read_subject
from manyhands.trace.journal import read_journal
from manyhands.train import loop
from manyhands.train.state import count_parameters

from ..small_runs import manyhands, write_text

ROUTER = {"num_experts": 8, "num_experts_per_tok": 2, "noisy": True, "init": "zeros"}
HIERARCHY = ROUTER | {"select": "hierarchical", "n_group": 4, "topk_group": 2}


def small(text: Path, router: dict[str, Any] = ROUTER, *changes: str) -> RunConfig:
    """A recurrent model of 300 tokens on `text`."""
    moe = {"router": router, "moe_intermediate_size": 16, "hidden_act": "relu"}
    run = {
        "data": {"sources": [str(text)]},
        "model": {"kind": "recurrent", "vocab_size": 300, "hidden_size": 32, "dropout": 0.1, "moe": moe},
        "balance": {"aux_loss_coef": 0.0, "importance_coef": 0.1, "load_coef": 0.1},
        "train": {"sequence_length": 32, "batch_size": 4, "max_steps": 6, "save_every": 3},
    }
    return parse_run(json.dumps(run), "run.yaml", changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.Summary]:
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, loop.train(directory, small(text, HIERARCHY, "trace.every=3"), quiet=True)


def _stop() -> Any:
    raise KeyboardInterrupt


def weights(directory: Path) -> dict[str, torch.Tensor]:
    newest = RunDirectory(directory).newest_valid()
    assert newest is not None
    return load_tensors(newest[1] / "model.safetensors") | load_tensors(newest[1] / "optimizer.safetensors")


def test_it_learns_and_is_reported(trained: tuple[Path, loop.Summary]) -> None:
    directory, summary = trained
    first = next(record for record in read_journal(directory / "journal.jsonl") if record["kind"] == "step")
    assert summary.steps == 6 and summary.valid_loss < first["loss"] - 0.2 and set(summary.balance) == {0}
    assert summary.valid_bits_per_byte > 0 and (directory / "report.html").stat().st_size > 10_000


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    text: Path, trained: tuple[Path, loop.Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = small(text, HIERARCHY, "trace.every=3"), loop.train_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", lambda *args: _stop() if args[5] == 5 else real(*args))
        loop.train(tmp_path / "half", whole, quiet=True)
    loop.train(tmp_path / "half", whole, quiet=True)  # from step 3
    mine, theirs = weights(tmp_path / "half"), weights(trained[0])
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(ConfigError, match=r"holds another run: its model\.kind is 'recurrent', yours is 'decoder'"):
        loop.train(tmp_path / "half", RunConfig(data=whole.data, train=whole.train), quiet=True)


def test_it_is_loaded_and_saved_as_what_it_is(trained: tuple[Path, loop.Summary], tmp_path: Path) -> None:
    model, tokenizer = load(trained[0])
    assert isinstance(model, RecurrentModel) and model.family == "manyhands" and not model.training
    model.save(tmp_path / "copy")
    again, _ = mh.load(tmp_path / "copy")
    ids = torch.tensor([tokenizer.encode("the hands are many")])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model"]["kind"] == "recurrent"
    with pytest.raises(ConfigError, match=r"^this model is of kind = 'recurrent', which mixtral does not describe"):
        model.save(tmp_path / "no", family="mixtral")


def test_a_run_starts_from_it(trained: tuple[Path, loop.Summary], text: Path, tmp_path: Path) -> None:
    run = RunConfig(start=str(trained[0]), data={"sources": [str(text)]}, train={"max_steps": 1, "sequence_length": 16})
    loop.train(tmp_path / "on", run, quiet=True)
    assert load_model(RunDirectory(tmp_path / "on").newest_valid()[1]).config == load(trained[0])[0].config  # type: ignore[index]


@pytest.mark.parametrize("router", [ROUTER, HIERARCHY], ids=["flat", "hierarchical"])
def test_the_plan_counts_what_is_built(text: Path, router: dict[str, Any], tmp_path: Path) -> None:
    run = small(text, router)
    (tmp_path / "run.yaml").write_text(dump_run(run))
    counts, model = read_subject(str(tmp_path / "run.yaml")).counts, build(run.model)
    assert isinstance(model, Recurrent) and (counts.total, counts.active) == count_parameters(model)
    expert = 2 * 32 * 16
    idle = 6 * expert + (2 * 32 * (8 - 4) if router is HIERARCHY else 0)  # two groups of two decide
    assert counts.total - counts.active == idle


def test_eval_reads_it_and_what_is_for_decoders_says_so(
    trained: tuple[Path, loop.Summary], text: Path, tmp_path: Path
) -> None:
    found = manyhands("eval", str(trained[0]), "--data", str(text), "--json", "--max-batches", "2")
    assert found.returncode == 0 and json.loads(found.stdout)["loss"] < 7, found.stderr
    for words in (
        ["chat", str(trained[0]), "--template", str(text)],
        ["inspect", str(trained[0]), "--data", str(text), "--out", str(tmp_path / "page")],
        ["bench", str(trained[0])],
        ["quantize", str(trained[0]), str(tmp_path / "packed"), "--experts", "int8"],
    ):
        refused = manyhands(*words)
        assert refused.returncode != 0 and "kind = 'recurrent'" in refused.stderr, (words, refused)
        assert len(refused.stderr.strip().splitlines()) == 1


def test_a_description_without_a_vocabulary_is_only_counted() -> None:
    with pytest.raises(ConfigError, match=r"^vocab_size = 0: this model is described without embedding"):
        build(RecurrentConfig(vocab_size=0))


def test_generate_goes_on_from_a_prompt(trained: tuple[Path, loop.Summary]) -> None:
    words = ["generate", str(trained[0]), "--prompt", "line 7: the", "--temperature", "0", "--max-new-tokens", "5"]
    found = json.loads(manyhands(*words, "--json").stdout)
    model, tokenizer = load(trained[0])
    ids = tokenizer.encode("line 7: the")
    for token in found["token_ids"]:  # each the best after all that stands before it
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert len(found["token_ids"]) == 5 and found["finish_reason"] == "length"
    assert manyhands(*words).stdout == f"line 7: the{found['text']}\n"
    refused = manyhands(*words, "--exact")
    assert "--exact is for decoders, and this model is a recurrent one" in refused.stderr
