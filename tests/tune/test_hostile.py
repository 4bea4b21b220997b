"""A tuned checkpoint that is damaged, or written to do harm, is refused by name, whoever signed it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.errors import CheckpointError, ManyhandsError

from ..small_runs import manyhands
from .small import TUNE


@pytest.fixture(scope="module")
def tuned(base: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ESFT."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    arguments = ["--method", "esft", "-s", "tune.sample_tokens=200", *TUNE, "--max-steps", "1", "--out", str(run)]
    said = manyhands("tune", str(base), "--data", str(other_text), *arguments, "--quiet")
    assert said.returncode == 0, said.stderr
    found = RunDirectory(run).newest_valid()
    assert found is not None
    return found[1]


def sealed(directory: Path) -> None:
    """A manifest that is right for what lies there."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in directory.iterdir()
        if path.name != "manifest.json"
    }
    manifest = {"format": "manyhands", "version": 1, "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))


Told = dict[str, Any]
DESCRIPTIONS: dict[str, tuple[Callable[[Told], Any], str]] = {
    "no description": (lambda told: [], "tuned.json"),
    "another version": (lambda told: told | {"version": 2}, "version = 2"),
    "a field more": (lambda told: told | {"code": "x"}, "unknown field 'code'"),
    "no method": (lambda told: told | {"tune": {}}, "tune.method: which of"),
    "another method": (lambda told: told | {"tune": {"method": "lora"}}, "lora_A is missing"),
    "a rank that asks for memory": (
        lambda told: told | {"tune": {"method": "lora", "r": 4096, "targets": ["routed"]}},
        "lora_A is missing",
    ),
    "experts that are not there": (
        lambda told: told | {"tune": told["tune"] | {"experts": {"1": [99]}}},
        "layer 1 has no expert 99",
    ),
    "a layer that is not there": (
        lambda told: told | {"tune": told["tune"] | {"experts": {"77": [0]}}},
        "layer 77 is not sparse",
    ),
    "more experts than weights": (
        lambda told: told | {"tune": told["tune"] | {"experts": {n: list(range(8)) for n in told["tune"]["experts"]}}},
        "; the model has [8,",
    ),
    "no experts": (lambda told: told | {"tune": told["tune"] | {"experts": None}}, "experts"),
    "another base": (
        lambda told: told | {"base": told["base"] | {"sha256": {"config.json": "0" * 64}}},
        "is another model",
    ),
    "a base that is gone": (
        lambda told: told | {"base": told["base"] | {"directory": "/no/such", "source": "/no/such"}},
        "no longer at /no/such",
    ),
    "a base that is itself": (
        lambda told: told | {"base": told["base"] | {"directory": "HERE", "source": "HERE"}},
        "is another model",
    ),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions(tuned: Path, tmp_path: Path, name: str) -> None:
    change, words = DESCRIPTIONS[name]
    here = tmp_path / "here"
    shutil.copytree(tuned, here)
    told = change(json.loads((here / "tuned.json").read_text()))
    (here / "tuned.json").write_text(json.dumps(told).replace("HERE", str(here)))
    sealed(here)
    for read in (load_model, load):
        with pytest.raises(ManyhandsError) as error:
            read(here)
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_tensors(tuned: Path, tmp_path: Path) -> None:
    state = load_tensors(tuned / "tuned.safetensors")
    first = next(iter(state))
    spoilt = {
        "has no place in this model": state | {"layers.0.mlp.experts.evil": torch.zeros(1)},
        "is missing": {name: tensor for name, tensor in state.items() if name != first},
        "; the model has": state | {first: state[first][..., :1].contiguous()},
        "not a readable safetensors file": None,
    }
    for number, (words, tensors) in enumerate(spoilt.items()):
        here = tmp_path / str(number)
        shutil.copytree(tuned, here)
        if tensors is None:
            (here / "tuned.safetensors").write_bytes(b"\x00" * 64)
        else:
            save_file(tensors, here / "tuned.safetensors")
        with pytest.raises(CheckpointError, match=r"damaged|changed|truncated"):  # by the manifest
            load_model(here)
        sealed(here)
        with pytest.raises(CheckpointError, match=words):
            load_model(here)


def test_a_tuning_is_no_model_for_verbs_that_need_one(tuned: Path, tmp_path: Path) -> None:
    for arguments in (
        ["quantize", str(tuned), str(tmp_path / "q")],
        ["plan", str(tuned)],
        ["tune", str(tuned), "--data", "x.txt"],
        ["convert", str(tuned), str(tmp_path / "m.gguf")],
    ):
        said = manyhands(*arguments)
        assert said.returncode != 0 and said.stderr.count("\n") == 1, (arguments, said.stderr)
        assert "Traceback" not in said.stderr
