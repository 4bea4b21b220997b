"""`manyhands tune --method esft`: a few experts of a model, chosen by the data, and only they are saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.model import load, load_model, save
from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config.load import load_run
from manyhands.config.tune import EsftTuning
from manyhands.parallel.ranks import Alone
from manyhands.trace.recording import Trace
from manyhands.trace.relevance import most_relevant, relevance
from manyhands.train.data import prepare_data
from manyhands.train.fresh import fresh_state
from manyhands.train.schedule import learning_rate
from manyhands.train.start import Start, with_model
from manyhands.train.step import train_step
from manyhands.train.task import LanguageModelling
from manyhands.tune.run import tune
from manyhands.tune.settings import settings

from ..small_runs import manyhands
from .small import TUNE


def newest(run: Path) -> Path:
    found = RunDirectory(run).newest_valid()
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def tuned(base: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the command line."""
    run = tmp_path_factory.mktemp("esft") / "run"
    arguments = ["--method", "esft", "--threshold", "0.4", "-s", "tune.sample_tokens=500", *TUNE, "--out", str(run)]
    said = manyhands("tune", str(base), "--data", str(other_text), *arguments, "--json")
    assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)
    assert summary["valid_loss"] < summary["before"]["valid_loss"]
    return run


def experts_of(run: Path) -> dict[int, tuple[int, ...]]:
    how = load_run(run / "run.yaml").tune
    assert isinstance(how, EsftTuning) and how.experts is not None
    return how.experts


def test_only_the_chosen_are_saved_and_only_they_move(base: Path, tuned: Path) -> None:
    chosen, at = experts_of(tuned), newest(tuned)
    assert sorted(path.name for path in at.iterdir()) == [
        "manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json", "tuned.json", "tuned.safetensors"
    ]  # fmt: skip
    saved = load_tensors(at / "tuned.safetensors")
    assert set(saved) == {f"layers.{n}.mlp.experts.{w}_proj" for n in chosen for w in ("gate_up", "down")}
    moments = load_tensors(at / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == set(saved)
    before, after = load_model(newest(base)).state_dict(), load(tuned)[0].state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        ids = list(chosen[int(name.split(".")[1])]) if ".experts." in name else []
        others = [e for e in range(len(tensor)) if e not in ids]
        assert torch.equal(tensor[others], after[name][others]), name
        if ids:
            assert torch.equal(after[name][ids], saved[name]) and not torch.equal(tensor[ids], saved[name])


def test_the_experts_are_those_that_the_data_needs(base: Path, other_text: Path, tuned: Path, tmp_path: Path) -> None:
    """The same as a trace of the same tokens says, and as the file says that DeepSeek's programs read."""
    run = load_run(tuned / "run.yaml")
    steps = ["-s", "trace.every=1", "-s", "optim.lr=1e-12", "--max-steps", "4", "--batch-size", "4", "--quiet"]
    said = manyhands("tune", str(base), "--data", str(other_text), *steps, "--out", str(tmp_path / "full"))
    assert said.returncode == 0, said.stderr
    trace = Trace.open(next((tmp_path / "full" / "traces").iterdir()))
    found = {layer: most_relevant(shares, 0.4) for layer, shares in relevance(trace, "token").items()}
    assert len(trace) == 512 and found == experts_of(tuned)  # sample_tokens, to the end of a batch
    cfg = json.loads((tuned / "expert_cfg.json").read_text())
    assert cfg == {
        "experts": {str(layer): list(ids) for layer, ids in found.items()},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    for flags in (["--trace", str(trace.path), "--threshold", "0.4"], ["--experts", str(tuned / "expert_cfg.json")]):
        again = tmp_path / flags[0]
        arguments = ["--method", "esft", *flags, *TUNE, "--out", str(again), "--quiet"]
        said = manyhands("tune", str(base), "--data", str(other_text), *arguments)
        assert said.returncode == 0, said.stderr
        assert experts_of(again) == found
        left, right = (load_tensors(newest(path) / "tuned.safetensors") for path in (again, tuned))
        assert all(torch.equal(left[name], right[name]) for name in right)
    assert run.trainable == ("*",)


def test_resumes_bit_for_bit(base: Path, other_text: Path, tuned: Path, tmp_path: Path) -> None:
    run = load_run(tuned / "run.yaml")
    half = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 2})})
    schedule = {"schedule": run.schedule.model_copy(update={"kind": "wsd", "decay_fraction": 0.0, "warmup_steps": 0})}
    whole, half = run.model_copy(update=schedule), half.model_copy(update=schedule)
    tune(tmp_path / "whole", whole, quiet=True)
    tune(tmp_path / "half", half, quiet=True)
    unsaid = whole.model_copy(update={"tune": EsftTuning(threshold=0.4, sample_tokens=500)})
    tune(tmp_path / "half", unsaid, quiet=True)  # the experts are those that it chose when it began
    for name in ("tuned.safetensors", "optimizer.safetensors"):
        left, right = (load_tensors(newest(tmp_path / path) / name) for path in ("whole", "half"))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_equals_training_the_whole_bank_and_freezing_the_rest(base: Path, other_text: Path, tmp_path: Path) -> None:
    """50 steps with decay: what is not chosen stays to the bit; the chosen learn what they learn in full training."""
    how = EsftTuning(experts={1: (1, 4), 2: (0,)})
    model = load_model(newest(base))
    sections = {
        "data": {"sources": [str(other_text)]},
        "optim": {"weight_decay": 0.1, "grad_clip": None},
        "guard": {"spike_sigma": None},
        "train": {"max_steps": 50, "batch_size": 4},
    }
    run = settings(str(base), model.config, how, sections=sections)
    tune(tmp_path / "esft", run, quiet=True)
    after = load(tmp_path / "esft")[0].state_dict()
    # The whole bank trained, its other experts put back after every step, as the paper's own code freezes them.

    start = Start.open(str(base))
    full = with_model(run.model_copy(update={"tune": None, "trainable": ("layers.*.mlp.experts.*",)}), start.config)
    full = full.model_copy(update={"train": full.train.model_copy(update={"dtype": "float32"})})
    data = prepare_data(tmp_path / "esft" / "data", full, print)
    state = fresh_state(full, data, LanguageModelling(), Alone(), start)
    frozen = {name: p.detach().clone() for name, p in state.model.named_parameters() if p.requires_grad}
    for step in range(50):
        lr = learning_rate(step, 50, full.optim.lr, full.schedule)
        batch = next(state.batches)
        train_step(state.model, state.optimizers, state.guard, batch, full, step + 1, lr, torch.float32)
        with torch.no_grad():
            for name, p in state.model.named_parameters():
                if name in frozen:
                    ids = how.experts[int(name.split(".")[1])]
                    others = [e for e in range(len(p)) if e not in ids]
                    p[others] = frozen[name][others]
    for name, tensor in state.model.state_dict().items():
        if name in frozen:
            ids = list(how.experts[int(name.split(".")[1])])
            others = [e for e in range(len(tensor)) if e not in ids]
            assert torch.equal(after[name][others], frozen[name][others])
            torch.testing.assert_close(after[name][ids], tensor[ids], atol=2e-5, rtol=1e-4)
            assert (after[name][ids] - frozen[name][ids]).abs().max() > 1e-3
        else:
            assert torch.equal(after[name], tensor)


def test_convert_makes_a_whole_model(tuned: Path, tmp_path: Path) -> None:
    said = manyhands("convert", str(tuned), str(tmp_path / "merged"))
    assert said.returncode == 0, said.stderr
    assert "esft: " in said.stdout and "logits differ by 0 on average" in said.stdout
    merged, mine = load(tmp_path / "merged")[0].state_dict(), load(tuned)[0].state_dict()
    assert merged.keys() == mine.keys() and all(torch.equal(merged[name], mine[name]) for name in mine)
    receipt = json.loads((tmp_path / "merged" / "receipt.json").read_text())
    parts = {
        f"layers.{layer}.mlp.experts.{name}_proj[{e}]"
        for layer, ids in experts_of(tuned).items()
        for e in ids
        for name in ("gate_up", "down")
    }
    said_parts = receipt["tuned"]["changed"] + receipt["tuned"]["unchanged"]
    assert sorted(parts) == sorted(said_parts) and receipt["tuned"]["method"] == "esft"
    hows = {fate["how"] for fate in receipt["source_tensors"].values()}
    assert hows == {"tuned", "moved, bit for bit"} or hows == {"tuned", "moved, bit for bit", "converted"}


@pytest.mark.parametrize("verb", ["generate", "eval", "chat"])
def test_verbs_take_the_run(tuned: Path, other_text: Path, verb: str) -> None:
    more = {
        "generate": ["--prompt", "7 bottles", "--max-new-tokens", "4", "--temperature", "0"],
        "eval": ["--data", str(other_text), "--json"],
        "chat": [],
    }[verb]
    said = manyhands(verb, str(tuned), *more)
    if verb == "chat":  # what the base's tokenizer lacks
        assert said.returncode == 2 and "has no chat template" in said.stderr
    else:
        assert said.returncode == 0 and said.stdout.strip(), said.stderr


def test_another_base_is_refused_by_name(base: Path, other_text: Path, tmp_path: Path) -> None:
    shutil.copytree(newest(base), tmp_path / "model")
    arguments = ["--data", str(other_text), "--method", "esft", *TUNE, "--out", str(tmp_path / "run"), "--quiet"]
    assert manyhands("tune", str(tmp_path / "model"), *arguments).returncode == 0
    shutil.rmtree(tmp_path / "model")
    gone = manyhands("generate", str(tmp_path / "run"), "--prompt", "x")
    assert gone.returncode != 0 and f"no longer at {tmp_path / 'model'}" in gone.stderr
    model, tokenizer = load(base)
    with torch.no_grad():
        model.embed_tokens.weight[0, 0] += 1.0
    save(model, tmp_path / "model", tokenizer, family="manyhands")
    wrong = manyhands("generate", str(tmp_path / "run"), "--prompt", "x")
    assert wrong.returncode != 0 and "is another model: its model.safetensors differs" in wrong.stderr
    resumed = manyhands("tune", "--resume", str(tmp_path / "run"), "-s", "train.max_steps=6")
    assert resumed.returncode != 0 and "is another model: its model.safetensors differs" in resumed.stderr


MISTAKES = {
    "no such expert": ({"experts": {"1": [8]}}, "tune.experts: layer 1 has no expert 8; it has 8"),
    "no such layer": ({"experts": {"7": [0]}}, "tune.experts: layer 7 is not sparse; those that are: [1, 2]"),
    "twice": ({"experts": {"1": [1, 1]}}, "tune.experts: layer 1 names an expert twice: [1, 1]"),
    "none": ({"experts": {"1": []}}, "tune.experts: no layer has an expert to train"),
    "a field": ({"experts": {}, "shared": True}, "unknown field 'shared'"),
    "no number": ({"experts": {"1": ["a"]}}, "experts.1.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_files_that_name_no_experts(base: Path, other_text: Path, tmp_path: Path, name: str) -> None:
    values, words = MISTAKES[name]
    file = tmp_path / "expert_cfg.json"
    file.write_text(json.dumps({"shared_experts": False, "non_expert_modules": False, **values}))
    arguments = ["--data", str(other_text), "--method", "esft", "--experts", str(file), "--out", str(tmp_path / "run")]
    said = manyhands("tune", str(base), *arguments)
    assert said.returncode != 0 and words in said.stderr and said.stderr.count("\n") == 1, said.stderr
    assert not (tmp_path / "run").exists()
