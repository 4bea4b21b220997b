"""`manyhands tune --method full`: parts of a model by name, figures before and after, resumed bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config.load import load_run
from manyhands.trace.journal import read_journal
from manyhands.tune.settings import are_rows

from ..small_runs import manyhands
from .small import TUNE


def newest(run: Path) -> dict[str, torch.Tensor]:
    found = RunDirectory(run).newest_valid()
    assert found is not None
    return load_tensors(found[1] / "model.safetensors")


def test_all_but_the_routers(base: Path, other_text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = manyhands("tune", str(base), "--data", str(other_text), *TUNE, "--out", str(run), "--json")
    assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)
    assert summary["valid_loss"] < summary["before"]["valid_loss"]
    before, after = load_model(base / "checkpoints" / "step-00000008").state_dict(), newest(run)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("router" in name), name
    evals = [record for record in read_journal(run / "journal.jsonl") if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [0, 4]
    assert evals[0]["valid_loss"] == summary["before"]["valid_loss"]
    steps = [record for record in read_journal(run / "journal.jsonl") if record["kind"] == "step"]
    assert all(record["aux_loss"] is not None for record in steps)


@pytest.mark.parametrize(
    ("parts", "moved"),
    [("experts", ".experts."), ("router", ".router.")],
)
def test_a_part_alone(base: Path, other_text: Path, tmp_path: Path, parts: str, moved: str) -> None:
    run = tmp_path / "run"
    arguments = [*TUNE, "--train", parts, "--out", str(run), "--quiet", "--max-steps", "2"]
    said = manyhands("tune", str(base), "--data", str(other_text), *arguments)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("bits per byte") == 2 and "\nbefore: " in said.stdout
    before, after = load_model(base / "checkpoints" / "step-00000008").state_dict(), newest(run)
    bias = "e_score_correction_bias"  # a rate of 0 leaves it where it is
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if moved in name and not name.endswith(bias)}


def test_valid_files_are_never_trained_on(base: Path, other_text: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("these lines are held out\n" * 60)
    arguments = ["--valid", str(held), *TUNE, "--out", str(tmp_path / "run"), "--quiet", "--max-steps", "1"]
    said = manyhands("tune", str(base), "--data", str(other_text), *arguments)
    assert said.returncode == 0, said.stderr
    assert load_run(tmp_path / "run" / "run.yaml").data.valid == (str(held),)
    assert json.loads((tmp_path / "run/data/valid.npy.json").read_text())["num_bytes"] == held.stat().st_size
    both = manyhands("tune", str(base), "--data", str(held), "--valid", str(held), *TUNE, "--out", str(tmp_path / "2"))
    assert both.returncode == 2 and "is trained on too, as held.txt of data.sources: leave one out" in both.stderr


MISTAKES = {
    "no model": (["--data", "x.txt"], "say which model is tuned and from what it learns"),
    "no data": (["BASE"], "say which model is tuned and from what it learns"),
    "no such model": (["/no/such", "--data", "x.txt"], "/no/such: does not exist"),
    "no such part": (["BASE", "--data", "x.txt", "--train", "expert"], "'expert' is no part of a model; did you mean"),
    "a part it lacks": (
        ["BASE", "--data", "x.txt", "--train", "shared"],
        "this model has no 'shared'; it has all, experts, dense, attention, router, norms, embedding, head",
    ),
    "another method's": (["BASE", "--data", "x.txt", "--threshold", "0.3"], "--method full: unknown field 'threshold'"),
    "an unknown setting": (["BASE", "--data", "x.txt", "-s", "optim.lrr=3"], "unknown field 'optim.lrr'"),
    "too long": (["BASE", "--data", "x.txt", "--sequence-length", "64"], "train.sequence_length = 64 exceeds"),
    "resume with a model": (["BASE", "--resume", "BASE"], "leave the model and --out away"),
    "resume what tunes nothing": (["--resume", "BASE"], "this run tunes no model"),
    "resume nothing": (["--resume", "/no/such"], "there is no run.yaml in it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(base: Path, tmp_path: Path, name: str) -> None:
    arguments, words = MISTAKES[name]
    made = [str(base) if argument == "BASE" else argument for argument in arguments]
    out = [] if "--resume" in made else ["--out", str(tmp_path / "run")]
    said = manyhands("tune", *made, *out)
    assert said.returncode in (1, 2, 3) and words in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert not (tmp_path / "run").exists()


def test_rows_are_known_by_their_names(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} and", "completion": " {i + 1}."}}\n' for i in range(60)))
    shown = manyhands("tune", str(base), "--data", str(rows), "--show-data", "2")
    assert shown.returncode == 0 and shown.stdout.count("learnt") == 2 and "0 and⟦ 1." in shown.stdout, shown.stderr
    said = manyhands("tune", str(base), "--data", str(rows), *TUNE, "--out", str(tmp_path / "run"), "--quiet")
    assert said.returncode == 0 and "before:     loss" in said.stdout, said.stderr
    assert load_run(tmp_path / "run" / "run.yaml").rows is not None
    assert not are_rows(["stdlib", "notes/", "a.txt"])
    assert all(are_rows([name, "a.txt"]) for name in ("hf:x/y", "a.jsonl.gz", "a.parquet", "stdlib-docstrings"))
