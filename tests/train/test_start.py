"""A run that starts from a checkpoint: its model, weights and tokenizer; contradictions are said before any work."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.checkpoint.model import load, load_model, save
from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.config.load import dump_run, load_run
from manyhands.errors import CheckpointError, ConfigError, Interrupted, UserError
from manyhands.models import Decoder
from manyhands.trace.journal import read_journal
from manyhands.train import loop, preparing
from manyhands.train.fresh import fresh_state
from manyhands.train.signals import StopSignals
from manyhands.train.start import Start

from ..checkpoint.gguf_bytes import byte_level, file_of
from ..checkpoint.gguf_mutations import GQA, MOE, SMALL
from ..checkpoint.hostile import make
from ..small_runs import manyhands, small_run, write_text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("base")
    loop.train(folder / "run", small_run(write_text(folder), "train.max_steps=3"), quiet=True)
    return folder / "run"


def run_file(folder: Path, base: Path, *lines: str) -> Path:
    """A run file that leaves the model to the checkpoint."""
    path = folder / "mine.yaml"
    data = f"data: {{sources: ['{base.parent / 'text.txt'}']}}"
    path.write_text("\n".join([data, "train: {sequence_length: 32, batch_size: 4, max_steps: 2}", *lines]))
    return path


def newest(directory: Path) -> dict[str, torch.Tensor]:
    found = RunDirectory(directory).newest_valid()
    assert found is not None
    return load_tensors(found[1] / "model.safetensors")


def test_from_the_command_line_to_the_end(base: Path, tmp_path: Path) -> None:
    said = manyhands("train", "-c", str(run_file(tmp_path, base)), f"start={base}", "--out", str(tmp_path / "run"))
    assert said.returncode == 0 and f"starting from {base}" in said.stdout
    saved = load_run(tmp_path / "run" / "run.yaml")
    assert saved.start == str(base) and saved.model == load_run(base / "run.yaml").model
    tokenizers = [(path / "data" / "tokenizer.json").read_bytes() for path in (base, tmp_path / "run")]
    assert tokenizers[0] == tokenizers[1]
    start, first, *_ = read_journal(tmp_path / "run" / "journal.jsonl")
    manifest = json.loads((base / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert start["start"]["source"] == str(base)
    assert start["start"]["directory"] == str(base / "checkpoints" / "step-00000003")
    assert start["start"]["sha256"] == {
        name: manifest["files"][name]["sha256"] for name in ("config.json", "model.safetensors")
    }
    assert first["step"] == 1


def test_the_weights_are_those_of_the_checkpoint(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a directory of another family without a manifest, and from bfloat16."""
    model, tokenizer = load(base)
    save(model, tmp_path / "other", tokenizer, family="dots1", dtype=torch.bfloat16)
    (tmp_path / "other" / "manifest.json").unlink()
    seen: list[dict[str, torch.Tensor]] = []

    def fresh(*args: Any) -> Any:
        state = fresh_state(*args)
        seen.append({name: tensor.clone() for name, tensor in state.model.state_dict().items()})
        return state

    monkeypatch.setattr(preparing, "fresh_state", fresh)
    for name, source in (("a", base), ("b", tmp_path / "other")):
        loop.train(tmp_path / name, load_run(run_file(tmp_path, base), [f"start={source}"]), quiet=True)
    stored = newest(base)
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in stored.items())
    for name, tensor in load_model(tmp_path / "other").state_dict().items():
        assert torch.equal(seen[1][name], tensor.float()) and seen[1][name].dtype == torch.float32
    start = read_journal(tmp_path / "b" / "journal.jsonl")[0]["start"]
    assert set(start["sha256"]) == {"config.json", "model.safetensors"}


def test_it_resumes_bit_for_bit_without_its_source(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    run = load_run(run_file(tmp_path, base), [f"start={source}", "train.max_steps=6"])
    loop.train(tmp_path / "whole", run, quiet=True)
    with monkeypatch.context() as patch:
        stop, real = StopSignals(), loop.train_step

        def third(*args: Any) -> Any:
            stop.requested = signal.SIGTERM if args[5] == 3 else None
            return real(*args)

        patch.setattr(loop, "train_step", third)
        patch.setattr(loop, "StopSignals", lambda: stop)
        with pytest.raises(Interrupted):
            loop.train(tmp_path / "parts", run, quiet=True)
    shutil.rmtree(source)
    loop.train(tmp_path / "parts", run, quiet=True)  # the same command again
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match=r"holds another run: its start is .*source', yours is 'else'"):
        loop.train(tmp_path / "parts", load_run(run_file(tmp_path, base), ["start=else"]), quiet=True)
    with pytest.raises(CheckpointError, match="source: does not exist"):
        loop.train(tmp_path / "again", load_run(tmp_path / "parts" / "run.yaml"), quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.hidden_size=64", r"model\.hidden_size = 64 contradicts start = .*, whose model has 32"),
        ("model.moe.router.score=softmax", r"model\.moe\.router\.score = 'softmax' contradicts"),
        ("model.moe=null", r"model\.moe = None contradicts"),
        ("train.sequence_length=64", r"train\.sequence_length = 64 exceeds model\.max_position_embeddings = 32"),
    ],
)
def test_what_contradicts_it(change: str, words: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        loop.train(tmp_path / "run", load_run(run_file(tmp_path, base), [f"start={base}", change]), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_section_may_say_the_same(base: Path, tmp_path: Path) -> None:
    run = load_run(run_file(tmp_path, base), [f"start={base}", "model.hidden_size=32", "train.max_steps=1"])
    assert loop.train(tmp_path / "run", run, quiet=True).steps == 1


def test_packed_weights_are_refused_with_what_to_do(base: Path, tmp_path: Path) -> None:
    assert manyhands("quantize", str(base), str(tmp_path / "packed")).returncode == 0
    with pytest.raises(UserError, match=r"cannot be trained; unpack them first: manyhands convert \S+ DIR"):
        loop.train(tmp_path / "run", load_run(run_file(tmp_path, base), [f"start={tmp_path / 'packed'}"]), quiet=True)
    assert not (tmp_path / "run").exists()


def test_files_of_other_runs_do_not_name_the_new_fields(tmp_path: Path, base: Path) -> None:
    assert "start" not in dump_run(small_run(tmp_path)) and "trainable" not in dump_run(small_run(tmp_path))
    assert not {"start", "trained_parameters"} & set(read_journal(base / "journal.jsonl")[0])


def test_who_asks_for_the_model_of_such_a_file_is_sent_to_the_checkpoint(base: Path, tmp_path: Path) -> None:
    file = run_file(tmp_path, base, f"start: {base}")
    for verb in ("plan", "check"):
        said = manyhands(verb, str(file))
        assert said.returncode == 2 and f"its model is that of start = '{base}': name that in its place" in said.stderr


def test_a_gguf_file_is_a_start(tmp_path) -> None:
    directory = make(tmp_path / "hf", **SMALL, **GQA, moe=MOE)
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(directory, "Q8_0", byte_level()).bytes())
    start = Start.open(str(path))
    assert start.tokenizer().vocab_size == 260
    assert set(start.described()["sha256"]) == {"model.gguf"}
    model = Decoder(start.config)
    start.load_into(model)
    expected = load_model(path).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
