"""Methods that train what stands beside a model: saved alone, resumed, asked, merged or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.checkpoint import merge as merging
from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config import PackedConfig, Packing
from manyhands.config.load import load_run
from manyhands.quantize.quantize import quantize
from manyhands.train import loop

from ..small_runs import manyhands, small_run, write_text
from .small import TUNE

IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without experts."""
    folder = tmp_path_factory.mktemp("dense")
    loop.train(folder / "run", small_run(write_text(folder), "model.moe=null"), quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in int4 and int8."""
    path = tmp_path_factory.mktemp("packed") / "model"
    config = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
    quantize(open_checkpoint(base), path, config, measure=False)
    return path


def newest(run: Path) -> Path:
    found = RunDirectory(run).newest_valid()
    assert found is not None
    return found[1]


CASES = {
    "lora": ("base", "lora", ["--r", "4"]),
    "lora on packed": ("packed", "lora", ["--r", "4"]),
    "lora, dense": ("dense", "lora", []),
    "perft": ("base", "perft", ["--num-experts", "3", "--top-k", "1"]),
    "perft on packed": ("packed", "perft", []),
    "molora": ("dense", "molora", ["--top-k", "2"]),
    "mov": ("dense", "mov", []),
}


@pytest.mark.parametrize("case", CASES)
def test_from_the_command_line_to_an_answer(
    case: str, other_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, method, flags = CASES[case]
    start: Path = request.getfixturevalue(name)
    run = tmp_path / "run"
    arguments = ["--method", method, *flags, *TUNE, "--lr", "0.02", "--out", str(run), "--json"]
    said = manyhands("tune", str(start), "--data", str(other_text), *arguments)
    assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)
    assert summary["valid_loss"] < summary["before"]["valid_loss"]
    at = newest(run)
    assert (at / "tuned.json").is_file() and not (at / "model.safetensors").exists()
    assert (at / "tuned.safetensors").stat().st_size < 300_000
    plain, _ = load(start)
    tuned, _ = load(run)
    with torch.no_grad():
        assert (tuned(IDS).logits - plain(IDS).logits).abs().max() > 1e-3
    said = manyhands("generate", str(run), "--prompt", "7 bottles", "--max-new-tokens", "4", "--temperature", "0")
    assert said.returncode == 0 and said.stdout.startswith("7 bottles"), said.stderr
    merged = manyhands("convert", str(run), str(tmp_path / "merged"))
    if method != "lora":
        assert (
            merged.returncode == 2 and f"{method} cannot be merged: what it adds depends on the token" in merged.stderr
        )
        assert not (tmp_path / "merged").exists()
        return
    assert merged.returncode == 0, merged.stderr
    whole, _ = load(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, load_model(at, decode=True)(IDS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "method"), [("base", "lora"), ("packed", "lora"), ("base", "perft"), ("dense", "molora")]
)
def test_resumes_bit_for_bit(
    name: str, method: str, other_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start: Path = request.getfixturevalue(name)
    flat = ["-s", "schedule.kind=wsd", "-s", "schedule.decay_fraction=0", "-s", "schedule.warmup_steps=0"]
    arguments = ["--data", str(other_text), "--method", method, *TUNE, *flat, "--quiet"]
    assert manyhands("tune", str(start), *arguments, "--out", str(tmp_path / "whole")).returncode == 0
    assert (
        manyhands("tune", str(start), *arguments, "--out", str(tmp_path / "half"), "--max-steps", "2").returncode == 0
    )
    said = manyhands("train", "--resume", str(tmp_path / "half"), "train.max_steps=4", "--quiet")
    assert said.returncode == 0, said.stderr
    for file in ("tuned.safetensors", "optimizer.safetensors"):
        left, right = (load_tensors(newest(tmp_path / path) / file) for path in ("whole", "half"))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_merged_by_way_of_pefts_files_and_not_if_an_expert_is_lost(
    base: Path, other_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", str(other_text), "--method", "lora", *TUNE, "--lr", "0.02", "--out", str(run), "--quiet"]
    assert manyhands("tune", str(base), *arguments).returncode == 0
    for form in ("per-expert", "fused"):  # the same by way of PEFT's files
        alone, merged = str(tmp_path / form), str(tmp_path / f"merged {form}")
        assert manyhands("convert", str(run), alone, "--as-adapter", form).returncode == 0
        assert manyhands("convert", str(base), merged, "--adapter", alone).returncode == 0
    assert manyhands("convert", str(run), str(tmp_path / "by us")).returncode == 0
    files = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("by us", "merged fused", "merged per-expert")
    ]
    assert files[0] == files[1] == files[2]
    refused = manyhands("convert", str(run), str(tmp_path / "twice"), "--adapter", alone)
    assert refused.returncode == 2 and "is tuned: merge that first" in refused.stderr
    real = merging._add

    def forgets(weight: torch.Tensor, expert: int | None, **factors: Any) -> torch.Tensor:
        return weight.float() if expert == 5 else real(weight, expert, **factors)

    monkeypatch.setattr(merging, "_add", forgets)
    said = manyhands("convert", str(run), str(tmp_path / "merged"))
    assert said.returncode != 0 and "[5]: what was tuned changes nothing in float32" in said.stderr
    assert not (tmp_path / "merged").exists()


def test_a_packed_model_is_not_trained_itself(packed: Path, other_text: Path, tmp_path: Path) -> None:
    for method in ("full", "esft"):
        arguments = ["--data", str(other_text), "--method", method, "--out", str(tmp_path / "run")]
        said = manyhands("tune", str(packed), *arguments)
        assert said.returncode == 2 and "or put adapters beside them: manyhands tune --method lora" in said.stderr
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "top_k": (
        "dense",
        ["--method", "molora", "--top-k", "9"],
        "top_k = 9: there are num_experts = 4 adapters beside a layer",
    ),
    "routed": ("base", ["--method", "molora", "--targets", "routed"], "a mixture already: molora is for linear layers"),
    "no experts": ("dense", ["--method", "perft"], "perft' puts experts beside a mixture, and this model has none"),
    "no such matrix": ("dense", ["--method", "mov", "--targets", "q_prj"], "'q_prj' names no matrix"),
    "patterns": ("base", ["--method", "lora", "-s", "trainable=[x]"], "itself says what is trained; leave it out"),
    "rank": ("base", ["--method", "lora", "--r", "0"], "--method lora: r = 0"),
    "parts": ("base", ["--method", "lora", "--train", "experts"], "--train is for full"),
    "another method's": ("base", ["--method", "perft", "--targets", "q_proj"], "unknown field 'targets'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, other_text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, flags, words = MISTAKES[mistake]
    start: Path = request.getfixturevalue(name)
    said = manyhands("tune", str(start), "--data", str(other_text), *flags, "--out", str(tmp_path / "run"))
    assert said.returncode in (1, 2, 3) and words in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert not (tmp_path / "run").exists()


def test_another_method_is_another_run(base: Path, other_text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--data", str(other_text), *TUNE, "--out", str(run), "--quiet"]
    assert manyhands("tune", str(base), *arguments, "--method", "lora").returncode == 0
    said = manyhands("tune", str(base), *arguments, "--method", "perft")
    assert said.returncode != 0 and "holds another run: its tune.method is 'lora', yours is 'perft'" in said.stderr
    rank = manyhands("tune", str(base), *arguments, "--method", "lora", "--r", "3")
    assert rank.returncode != 0 and "holds another run: its tune.r is" in rank.stderr
    assert load_run(run / "run.yaml").tune is not None
