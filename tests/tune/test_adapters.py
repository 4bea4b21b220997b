"""`--adapter`: what a tuning made, put on its base by hand; several on one base, whose weights lie in memory once."""

from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.model import load
from manyhands.checkpoint.put_adapter import put_adapter
from manyhands.errors import CheckpointError, ManyhandsError, UserError
from manyhands.models.adapted import sharing
from manyhands.serve.load import Settings, entries
from manyhands.serve.models import Entry
from manyhands.serve.served import Served

from ..small_runs import manyhands
from .small import TUNE

IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
METHODS = {
    "lora": ["--method", "lora", "--r", "4"],
    "perft": ["--method", "perft"],
    "esft": ["--method", "esft", "--threshold", "0.4", "-s", "tune.sample_tokens=500"],
}


@pytest.fixture(scope="module")
def runs(base: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished tuning of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in METHODS.items():
        arguments = [*flags, *TUNE, "--lr", "0.02", "--out", str(folder / name), "--quiet"]
        said = manyhands("tune", str(base), "--data", str(other_text), *arguments)
        assert said.returncode == 0, said.stderr
    return {name: folder / name for name in METHODS}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", METHODS)
def test_on_the_base_it_is_the_run(base: Path, runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    by_hand, _ = load(base, adapter=runs[name])
    assert torch.equal(logits(by_hand), logits(load(runs[name])[0]))
    if name == "lora":  # and so it is from a folder that PEFT reads
        said = manyhands("convert", str(runs[name]), str(tmp_path / "peft"), "--as-adapter", "per-expert")
        assert said.returncode == 0, said.stderr
        again, _ = load(base, adapter=tmp_path / "peft")
        assert torch.equal(logits(by_hand), logits(again))


def test_several_share_one_base(base: Path, runs: dict[str, Path]) -> None:
    model, _ = load(base)
    before, own = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.origin is not None
    addresses = {tensor.data_ptr() for tensor in model.parameters()}
    others = {}
    for name, run in runs.items():
        others[name] = other = sharing(model)
        put_adapter(other, model.origin, run, shared=True)  # type: ignore[arg-type]
        assert addresses <= {tensor.data_ptr() for tensor in other.parameters()}
    for name, run in runs.items():
        torch.testing.assert_close(logits(others[name]), logits(load(run)[0]), atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_tuning_that_changes_the_base_itself_cannot_share(base: Path, other_text: Path, tmp_path: Path) -> None:
    arguments = [
        *METHODS["esft"],
        "-s",
        "tune.non_expert_modules=true",
        *TUNE,
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    assert manyhands("tune", str(base), "--data", str(other_text), *arguments).returncode == 0
    model, _ = load(base)
    assert model.origin is not None
    with pytest.raises(UserError, match="changes weights of the base itself, which others compute with here"):
        put_adapter(sharing(model), model.origin, tmp_path / "run", shared=True)  # type: ignore[arg-type]
    assert torch.equal(logits(load(base, adapter=tmp_path / "run")[0]), logits(load(tmp_path / "run")[0]))


def served(entry: Entry) -> Served:
    entry.served = entry.load()
    return entry.served


def test_served_by_name(base: Path, runs: dict[str, Path]) -> None:
    every = entries({"base": base}, Settings(max_sequences=2), {"mine": runs["lora"], "thin": runs["perft"]})
    assert [entry.name for entry in every] == ["base", "mine", "thin"]
    try:
        models = [served(entry).service.engine.model for entry in every]
        addresses = [{tensor.data_ptr() for tensor in model.parameters()} for model in models]
        assert addresses[0] <= addresses[1] and addresses[0] <= addresses[2]
        assert torch.equal(logits(models[1]), logits(load(runs["lora"])[0]))
        assert not torch.equal(logits(models[0]), logits(models[1]))
    finally:
        for entry in every:
            if entry.served is not None:
                entry.served.service.close(0.5)


def test_what_is_no_adapter_of_this_model(base: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    tries: list[tuple[Path, Path, type[ManyhandsError], str]] = [
        (base, base, UserError, "a whole model, and no adapter"),
        (base, tmp_path / "no", CheckpointError, "does not exist"),
        (runs["lora"], runs["lora"], UserError, "is tuned itself: no adapter can be put on it"),
    ]
    for model, adapter, error, words in tries:
        with pytest.raises(error, match=words):
            load(model, adapter=adapter)
    said = manyhands("serve", str(base), "--adapter", "mine", "--port", "0")
    assert said.returncode == 2 and "--adapter mine: expected NAME=PATH" in said.stderr
    said = manyhands("serve", "--model", f"x={base}", "--adapter", f"y={runs['lora']}", "--port", "0")
    assert said.returncode == 2 and "give one" in said.stderr
    said = manyhands("serve", str(base), "--adapter", f"y={runs['lora']}", "--memory", "4GB", "--port", "0")
    assert said.returncode == 2 and "leave --memory out" in said.stderr
