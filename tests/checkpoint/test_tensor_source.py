"""Tensors from elsewhere: whatever gives a `TensorSource` becomes the same model, or fails in the same words."""

import json
import re
from functools import partial

import pytest
import torch

from manyhands.checkpoint.convert import Conversion
from manyhands.checkpoint.model import from_source, load_model
from manyhands.checkpoint.receipt import describe_source
from manyhands.checkpoint.safetensors.files import TensorFiles
from manyhands.checkpoint.source import open_source, source_of
from manyhands.checkpoint.tensors import NAMES, Header, Logical, Stored, TensorSource, as_stored, headers_of
from manyhands.config import PackedConfig, Packing
from manyhands.errors import CheckpointError
from manyhands.families import FAMILIES
from manyhands.quantize.quantize import quantize

from .hostile import EXPERT, FITTING, NORM, SINGLE, make

IDS = torch.randint(0, 270, (2, 12), generator=torch.Generator().manual_seed(5))


class InMemory:
    """Tensors in a dict."""

    def __init__(self, directory, tensors):
        self.directory, self.name, self.metadata, self.tensors = directory, directory / "memory", {}, tensors
        self.stored = {
            n: Stored("memory", Header(NAMES[t.dtype], tuple(t.shape)), 0, t.nbytes) for n, t in tensors.items()
        }

    def logical(self):
        return as_stored(headers_of(self))

    def where(self, name):
        return f"memory: tensor {name!r}"

    def tensor(self, name):
        return self.tensors[name]

    def release(self, name, before=None):
        pass


class Blocks:
    """A file format of this test: a line of JSON, then tensors in a dtype that torch has not.

    Q8: a float32 scale for every row, then a byte for every number, plus 128.
    """

    def __init__(self, path):
        self.directory, self.name, self.metadata = path.parent, path, {}
        with open(path, "rb") as file:
            entries, start = json.loads(file.readline()), file.tell()
        self.stored = {}
        for name, shape in entries.items():
            size = torch.Size(shape).numel() + 4 * torch.Size(shape[:-1]).numel()
            self.stored[name] = Stored(path.name, Header("Q8", tuple(shape)), start, size)
            start += size

    @classmethod
    def write(cls, path, tensors):
        parts = [(json.dumps({name: list(t.shape) for name, t in tensors.items()}) + "\n").encode()]
        for t in tensors.values():
            scale = t.float().abs().amax(-1, keepdim=True) / 127
            codes = (t / scale.clamp(min=1e-30)).round().add(128).to(torch.uint8)
            parts += [scale.contiguous().numpy().tobytes(), codes.numpy().tobytes()]
        path.write_bytes(b"".join(parts))

    def logical(self):
        return {
            name: Logical(Header("F32", stored.header.shape), (name,), partial(self.decode, shape=stored.header.shape))
            for name, stored in self.stored.items()
        }

    @staticmethod
    def decode(parts, out, *, shape):
        (raw,), rows = parts, torch.Size(shape[:-1]).numel()
        scale, codes = raw[: 4 * rows].view(torch.float32), raw[4 * rows :]
        out.copy_((codes.float().view(rows, -1) - 128).mul_(scale[:, None]).view(shape))

    def where(self, name):
        return f"{self.name}: tensor {name!r}"

    def tensor(self, name):
        stored = self.stored[name]
        data = self.name.read_bytes()[stored.start : stored.start + stored.size]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def release(self, name, before=None):
        pass


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "packed"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    if request.param != "packed":
        return make(folder / "model", family=request.param, **FITTING.get(request.param, {}))
    formats = PackedConfig(experts=Packing(format="int8"), linear=Packing(format="bf16"))
    quantize(open_source(make(folder / "plain")), folder / "packed", formats)
    return folder / "packed"


def held(directory):
    """A checkpoint's fields, the path they stand at, and its tensors, in memory."""
    files: TensorSource = TensorFiles(directory)
    tensors = {name: files.tensor(name).clone() for name in files.stored}
    return json.loads((directory / "config.json").read_text()), directory / "config.json", tensors


def test_tensors_in_memory_become_the_same_model(checkpoint):
    values, path, tensors = held(checkpoint)
    source = source_of(values, path, lambda: InMemory(path.parent, tensors))
    model, expected = from_source(source), load_model(checkpoint)
    assert model.state_dict().keys() == expected.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert source.origin.dtypes == open_source(checkpoint).origin.dtypes


def test_they_are_saved_and_converted_as_if_from_files(tmp_path):
    values, path, tensors = held(make(tmp_path / "model"))
    source = source_of(values, path, lambda: InMemory(path.parent, tensors))
    from_source(source).save(tmp_path / "saved")
    assert (tmp_path / "saved" / SINGLE).read_bytes() == (tmp_path / "model" / SINGLE).read_bytes()
    plan = Conversion(source, FAMILIES["mixtral"])
    assert all(torch.equal(plan.value(name), tensor) for name, tensor in tensors.items())
    assert describe_source(source)["model_type"] == "mixtral"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"memory: tensor '{NORM}' is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "memory: tensor 'extra' is not one of this model's"),
        (
            lambda t: t.update({NORM: torch.ones(3)}),
            f"memory: tensor '{NORM}' has shape [3]; config.json says [16]",
        ),
        (lambda t: t.update({EXPERT: t[EXPERT].int()}), f"memory: tensor '{EXPERT}' is I32; expected F64 or F32"),
    ],
)
def test_they_are_refused_in_the_same_words(tmp_path, change, message):
    values, path, tensors = held(make(tmp_path / "model"))
    change(tensors)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        source_of(values, path, lambda: InMemory(path.parent, tensors))


def test_a_format_with_blocks_of_its_own_becomes_a_model(tmp_path):
    values, path, tensors = held(make(tmp_path / "model", initializer_range=0.3))
    Blocks.write(tmp_path / "model" / "weights.q8", tensors)
    (tmp_path / "model" / SINGLE).unlink()
    source = source_of(values, path, partial(Blocks, tmp_path / "model" / "weights.q8"))
    model = from_source(source)
    down = model.layers[1].mlp.experts.down_proj
    assert down.dtype == torch.float32
    torch.testing.assert_close(down[3], tensors[EXPERT], rtol=0, atol=float(tensors[EXPERT].abs().max()) / 254 * 1.01)
    receipt = describe_source(source)
    assert set(receipt["files"]) == {"config.json", "weights.q8"}
    model.save(tmp_path / "saved")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in load_model(tmp_path / "saved").state_dict().items())
