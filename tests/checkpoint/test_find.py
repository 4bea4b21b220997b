"""From a path to an opened checkpoint: verified once, and what no manifest vouches for is opened by no way in."""

import json

import pytest

from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.find import open_checkpoint, open_directory
from manyhands.checkpoint.manifest import verify
from manyhands.checkpoint.model import load, load_model, save
from manyhands.checkpoint.safetensors.files import TensorFiles
from manyhands.config import ModelConfig, parse
from manyhands.errors import CheckpointError
from manyhands.models import Decoder
from manyhands.text import Tokenizer

from .hostile import VALUES

WAYS = [load, load_model, open_checkpoint, open_directory]


@pytest.fixture
def ours(tmp_path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"], 270)
    save(Decoder(parse(ModelConfig, VALUES)), tmp_path / "model", tokenizer, family="manyhands")
    return tmp_path / "model"


def to_a_target(directory):
    return convert(directory, directory.parent / "target")


@pytest.mark.parametrize("way", [*WAYS, to_a_target])
def test_a_file_that_the_manifest_does_not_list_is_refused(ours, way):
    manifest = json.loads((ours / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (ours / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"its manifest does not list 'model\.safetensors', which nobody verified"
    ):
        way(ours)
    assert not (ours.parent / "target").exists()


@pytest.mark.parametrize("way", [*WAYS, to_a_target])
def test_our_own_without_a_manifest_is_incomplete(ours, way):
    (ours / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json; an incomplete checkpoint"):
        way(ours)


@pytest.mark.parametrize("way", WAYS)
def test_every_byte_is_verified_once(ours, way, monkeypatch):
    seen = []
    for place in ("find", "runs"):
        monkeypatch.setattr(f"manyhands.checkpoint.{place}.verify", lambda path: seen.append(path) or verify(path))
    way(ours)
    assert seen == [ours]


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for way in (load, open_checkpoint):
        with pytest.raises(CheckpointError, match=f"an adapter, and no whole model; .* --adapter {tmp_path}$"):
            way(tmp_path)


def test_shards_that_are_missing_are_counted(ours):
    (ours / "manifest.json").unlink()
    (ours / "model.safetensors").rename(ours / "model-00001-of-00003.safetensors")
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = {"weight_map": {f"t{n}": shard for n, shard in enumerate(shards)}}
    (ours / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{shards[1]}: does not exist; 2 of the 3 files with the weights"):
        TensorFiles(ours)
