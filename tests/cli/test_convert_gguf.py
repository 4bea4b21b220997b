"""`manyhands convert MODEL NAME.gguf`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyhands.cli.main import app
from tests.checkpoint.gguf_models import saved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    saved("olmoe", directory)
    return directory


def test_a_file_and_what_is_said_of_it(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    done = CliRunner().invoke(app, ["convert", str(model), str(target), "--type", "q4_0"])
    assert done.exit_code == 0, done.output
    assert (
        "olmoe -> olmoe" in done.output
        and "Q4_0: rounded" in done.output
        and "vocabulary gpt2, llama-bpe" in done.output
    )
    again = CliRunner().invoke(
        app, ["convert", str(model), str(target), "--json", "--overwrite", "--without-vocabulary"]
    )
    receipt = json.loads(again.output)
    assert receipt["target"]["type"] == "bf16" and receipt["target"]["vocabulary"]["model"] == "none"
    assert receipt["target"]["size"] == target.stat().st_size


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("dir", ["--type", "q8_0"], "--type is for a GGUF file"),
        ("dir", ["--without-vocabulary"], "--without-vocabulary is for a GGUF file"),
        ("a.gguf", ["--dtype", "bfloat16"], "--dtype is for a directory"),
        ("a.gguf", ["--to", "mixtral"], "does not fit mixtral"),
        ("a.gguf", ["--to", "kimi_k2"], "no GGUF architecture"),
    ],
)
def test_a_mistake_is_one_line(model: Path, tmp_path: Path, target: str, options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["convert", str(model), str(tmp_path / target), *options])
    assert done.exit_code and said in str(done.exception or done.output)
    assert not list(tmp_path.iterdir())
