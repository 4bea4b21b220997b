"""A loaded model holds its weights and words about where they came from: no file need stay, none is kept open."""

import copy
import io
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing
from manyhands.errors import CheckpointError, UserError
from manyhands.quantize.quantize import quantize

from .hostile import SINGLE, make
from .hostile import copy as copy_of

IDS = torch.randint(0, 270, (2, 12), generator=torch.Generator().manual_seed(5))
MTP = "model.layers.2.eh_proj.weight"
KINDS = ["plain", "packed"]


LATENT = {
    "kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "latent_norm_eps": 1e-6,
}  # fmt: skip
SIGMOID = {"router": {"num_experts": 4, "num_experts_per_tok": 2, "score": "sigmoid", "bias": True}}
SIGMOID |= {"moe_intermediate_size": 8}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A plain one in its own family's names, and one of packed records."""
    folder = tmp_path_factory.mktemp("originals")
    plain = make(folder / "plain", family="deepseek_v3", attention=LATENT, moe=SIGMOID, initializer_range=0.3)
    formats = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
    quantize(open_source(plain), folder / "packed", formats)
    return folder


@pytest.fixture
def checkpoints(originals, tmp_path):
    return {kind: copy_of(originals / kind, tmp_path / kind) for kind in KINDS}


def with_extras(directory):
    """The same with a tensor that the model does not compute with."""
    save_file(load_file(directory / SINGLE) | {MTP: torch.arange(6.0).view(2, 3)}, directory / SINGLE)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 1}))
    return directory


def open_files(directory):
    """How many descriptors and maps of this process lead into a directory."""
    descriptors = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    maps = [line.partition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = str(directory)
    return sum(path.startswith(inside) for path in descriptors), sum(f"/{m}".startswith(inside) for m in maps)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_nothing_is_mapped_once_everything_is_copied(checkpoints):
    model = load_model(checkpoints["plain"], dtype=torch.bfloat16)
    routers = {name for name in model.state_dict() if ".router." in name}  # float32 as they lie there: the file itself
    assert routers and open_files(checkpoints["plain"])[1] == 1
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.load_state_dict({n: t.clone() for n, t in module.state_dict().items()}, assign=True)
    assert open_files(checkpoints["plain"]) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_lives_as_long_as_its_tensors(checkpoints, kind):
    directory = checkpoints[kind]
    for _ in range(5):
        model = load_model(directory)
        assert open_files(directory) == (1, 1)
    state = model.state_dict()
    del model
    assert open_files(directory) == (1, 1)
    del state
    assert open_files(directory) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_works_when_the_directory_has_gone(checkpoints, tmp_path, caplog, kind):
    directory, gone = checkpoints[kind], tmp_path / "gone"
    weights = (directory / SINGLE).read_bytes()
    model, _ = load(directory)
    expected = logits(model)
    directory.rename(gone)
    shutil.rmtree(gone)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    with caplog.at_level(logging.WARNING):
        model.save(directory)  # where it came from
    assert "is gone since it was loaded; what lay there beside the weights is not copied" in caplog.text
    assert (directory / SINGLE).read_bytes() == weights
    again, _ = load(directory)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_saves_what_the_model_saves(checkpoints, tmp_path, kind):
    if kind == "plain":
        with_extras(checkpoints[kind])
    model, _ = load(checkpoints[kind])
    copy.deepcopy(model).save(tmp_path / "copy")
    model.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in (tmp_path / "copy").iterdir()}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    assert (MTP in load_file(tmp_path / "copy" / SINGLE)) == (kind == "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_through_pickle(checkpoints, kind):
    model = load_model(checkpoints[kind])
    data = pickle.dumps(model.state_dict())
    assert len(data) < 2 * sum(t.nbytes for t in model.state_dict().values()) + 100_000  # each tensor, not its file
    other = load_model(checkpoints[kind])
    other.load_state_dict(pickle.loads(data))  # noqa: S301  # our own bytes
    assert torch.equal(logits(other), logits(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_lives_on_when_another_is_saved_over_its_files(checkpoints, tmp_path, kind):
    load_model(checkpoints[kind]).save(tmp_path / "place")
    model = load_model(tmp_path / "place")
    expected = logits(model)
    other = load_model(checkpoints[kind], decode=True)
    with torch.no_grad():
        other.embed_tokens.weight.zero_()
    other.save(tmp_path / "place", overwrite=True)
    assert torch.equal(logits(model), expected)
    with pytest.raises(UserError, match="same directory"):
        model.save(tmp_path / "place", overwrite=True)
    assert not torch.equal(logits(load_model(tmp_path / "place")), expected)


def test_a_change_is_written_to_no_file_and_seen_by_no_other_model(checkpoints):
    before = (checkpoints["plain"] / SINGLE).read_bytes()
    model, other = load_model(checkpoints["plain"]), load_model(checkpoints["plain"])
    expected = logits(other)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert torch.equal(logits(other), expected) and (checkpoints["plain"] / SINGLE).read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"plain/config\.json: is gone"),
        (
            lambda folder: os.utime(folder / SINGLE, ns=(1, 1)),
            r"plain/model\.safetensors: was changed",
        ),
        (lambda folder: (folder / SINGLE).unlink(), r"plain/model\.safetensors: is gone"),
    ],
)
def test_what_is_not_in_the_model_is_read_again_or_missed_in_one_line(checkpoints, tmp_path, spoil, message):
    directory = with_extras(checkpoints["plain"])
    model = load_model(directory)
    assert model.origin.kept == (MTP,)
    model.save(tmp_path / "saved")
    assert torch.equal(load_file(tmp_path / "saved" / SINGLE)[MTP], torch.arange(6.0).view(2, 3))
    spoil(directory)
    with pytest.raises(CheckpointError, match=f"{message} since it was loaded$"):
        model.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    model.save(tmp_path / "other", family="kimi_k2")  # which has no place for it
    assert load_model(tmp_path / "other").family == "kimi_k2"
