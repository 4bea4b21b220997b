"""Packing expert by expert: the same files as layer by layer, in the memory of an expert, chosen by what is free."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.checkpoint.experts import ExpertReader
from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.quantized import logical_tensors
from manyhands.checkpoint.receipt import stored_sha256, tensor_sha256
from manyhands.checkpoint.safetensors.shards import write_shards
from manyhands.checkpoint.source import open_source
from manyhands.checkpoint.tensors import Header
from manyhands.config import PackedConfig, Packing
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, UserError
from manyhands.quant import panels
from manyhands.quantize import figures, room, stream
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample

from ..checkpoint.hostile import FITTING, VALUES, make
from ..families.to_gguf import ARCH, keys_of, tensors_of, write

IDS = torch.randint(0, 270, (2, 24), generator=torch.Generator().manual_seed(5))
INT = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
FORMATS = [
    INT,
    PackedConfig(experts=Packing(format="int8"), linear=Packing(format="int4", group_size=64)),
    PackedConfig(experts=Packing(format="q4_0", group_size=32), linear=Packing(format="q8_0", group_size=32)),
    PackedConfig(experts=Packing(format="bf16"), linear=Packing(format="bf16")),
]
FAMILIES = ["mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "mxfp4", "fp8", "gguf", "gguf_old", "gguf_fused"]
"""Expert by expert; stacked; stacked and transposed, with biases; latent attention; quantised stacks; quantised."""
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    return written(tmp_path_factory.mktemp("source"), request.param)


def written(folder, kind):
    family = {"mxfp4": "gpt_oss", "fp8": "mixtral"}.get(kind, "mixtral" if "gguf" in kind else kind)
    width = {"hidden_size": 64} if "gguf" in kind or family == "gpt_oss" else {}  # blocks of 32
    fields = {"initializer_range": 0.3} | width | FITTING.get(family, {})
    if width:
        fields["moe"] = fields.get("moe", VALUES["moe"]) | {"moe_intermediate_size": 32}
    path = make(folder / kind, family=family, **fields)
    if kind in ("mxfp4", "fp8"):
        quantized(path, kind)
    return gguf_of(path, kind) if "gguf" in kind else path


def gguf_of(directory, kind):
    """Experts in a stack, one by one as years ago, or gate and up in one tensor; in Q8_0."""
    values = json.loads((directory / "config.json").read_text())
    tensors = tensors_of(directory, values)
    for block in ("blk.0.", "blk.1."):
        if kind == "gguf_fused":
            gate, up = (tensors.pop(f"{block}ffn_{half}_exps.weight") for half in ("gate", "up"))
            tensors[f"{block}ffn_gate_up_exps.weight"] = torch.cat((gate, up), dim=1)
        for half in ("gate", "up", "down") if kind == "gguf_old" else ():
            for e, expert in enumerate(tensors.pop(f"{block}ffn_{half}_exps.weight")):
                tensors[f"{block}ffn_{half}.{e}.weight"] = expert
    return write(directory.with_suffix(".gguf"), ARCH["mixtral"], keys_of(values), tensors, "Q8_0")


def quantized(path, kind):
    """The experts' matrices, replaced by random ones in a publisher's format."""
    rng = torch.Generator().manual_seed(3)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and "bias" not in name]:
        weight = tensors.pop(name)
        if kind == "mxfp4":
            E, K, N = weight.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (E, N, K // 32, 16), generator=rng).to(torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 126, (E, N, K // 32), generator=rng).to(torch.uint8)
        else:
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.25)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = MXFP4 if kind == "mxfp4" else FP8
    (path / "config.json").write_text(json.dumps(config))


def files(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")} | {
        "config": (directory / "config.json").read_bytes()
    }


@pytest.mark.parametrize("packed", FORMATS, ids=lambda p: p.experts.format)
def test_the_same_files_and_the_same_receipt(source, packed, tmp_path):
    run = quantize(open_checkpoint(source), tmp_path / "run", packed, Sample(IDS, None), measure=True)
    streamed = quantize(open_checkpoint(source), tmp_path / "streamed", packed, measure=False)
    assert files(tmp_path / "run") == files(tmp_path / "streamed")
    assert streamed["not_measured"].startswith("not measured, as asked") and run["not_measured"] is None
    assert streamed["routing_agreement"]["overall"] is None and streamed["perplexity"] is None
    assert json.loads((tmp_path / "streamed" / "receipt.json").read_text()) == streamed
    for measured in ("not_measured", "routing_agreement", "perplexity"):
        del streamed[measured], run[measured]
    assert streamed == run
    load_model(tmp_path / "streamed")


def test_a_matrix_in_parts_and_shards_are_the_same_too(source, tmp_path, monkeypatch):
    options = {"packed": INT, "max_shard_size": 40_000}
    whole = quantize(open_checkpoint(source), tmp_path / "whole", sample=Sample(IDS, None), measure=True, **options)
    for module in (stream, panels, figures):
        monkeypatch.setattr(module, "CHUNK_VALUES", 1100)  # 16 outputs at a time, and a remainder
    parts = quantize(open_checkpoint(source), tmp_path / "parts", measure=False, **options)
    assert files(tmp_path / "whole") == files(tmp_path / "parts") and len(files(tmp_path / "parts")) > 4
    for name, tensor in whole["packed_tensors"].items():
        got = parts["packed_tensors"][name]["relative_error"]
        assert got == pytest.approx(tensor["relative_error"], rel=1e-12) and min(got.values()) > 0


def test_an_expert_is_its_part_of_the_stack(source):
    opened = open_checkpoint(source)
    expected = load_model(source).state_dict()
    for name, shape in tensor_shapes(opened.config).items():
        if ".experts." not in name:
            continue
        reader = ExpertReader(opened, name, shape)
        for e in (2, 0, 3):
            got = reader.read(e)
            assert got.dtype == expected[name].dtype and torch.equal(got, expected[name][e]), name
            reader.release(e)


def test_an_entry_is_its_part_of_a_decoded_stack(source):
    """Every stack that is decoded can be decoded one expert at a time: none is ever made whole."""
    opened = open_checkpoint(source)
    stacks = {name: logical for name, logical in opened.logical.items() if len(logical.header.shape) == 3}
    for name, logical in stacks.items():
        assert logical.decode is None or logical.entry is not None, name
        if logical.entry is not None:
            parts, whole = [opened.files.tensor(part) for part in logical.parts], opened.value(name)
            for e in range(len(whole)):
                out = torch.full_like(whole[e], torch.nan)
                logical.entry(parts, e, out)
                assert torch.equal(out, whole[e])


def test_one_expert_is_in_memory_at_a_time(source, tmp_path, monkeypatch):
    """No stack is made, and what was read is let go before the next."""
    sizes = []
    pack = stream.pack_experts
    monkeypatch.setattr(stream, "pack_experts", lambda one, *a: sizes.append(len(one.up)) or pack(one, *a))
    quantize(open_checkpoint(source), tmp_path / "target", INT, measure=False)
    assert set(sizes) == {1} and len(sizes) == 8


def test_chosen_by_free_memory(source, tmp_path, monkeypatch, caplog):
    opened, sample = open_checkpoint(source), Sample(IDS, None)
    need = room.layer_bytes(opened, INT, sample)
    monkeypatch.setattr(room, "free_memory", lambda: need / (1 - room.SPARE) + 1)
    assert quantize(opened, tmp_path / "runs", INT, sample)["not_measured"] is None
    monkeypatch.setattr(room, "free_memory", lambda: need / (1 - room.SPARE) - 1)
    with caplog.at_level(logging.WARNING):
        receipt = quantize(open_checkpoint(source), tmp_path / "streams", INT, sample)
    assert "packed expert by expert" in receipt["not_measured"] and receipt["not_measured"] in caplog.text
    assert files(tmp_path / "runs") == files(tmp_path / "streams")
    with pytest.raises(UserError, match=r"cannot be calibrated here; without --data"):
        quantize(open_checkpoint(source), tmp_path / "no", INT, Sample(IDS, "text", 1))
    with pytest.raises(UserError, match="leave out --no-measure"):
        quantize(open_checkpoint(source), tmp_path / "no", INT, Sample(IDS, "text", 1), measure=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["layers.1.mlp.experts.down_proj", "lm_head.weight"])
def test_weights_that_are_not_finite_are_named(name, tmp_path):
    model = load_model(written(tmp_path, "mixtral"))
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = torch.nan
    model.save(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + ": int[48] cannot hold"):
        quantize(open_source(tmp_path / "nan"), tmp_path / "target", INT, measure=False)
    assert [path.name for path in tmp_path.iterdir() if "target" in path.name] == []


def test_parts_must_make_the_whole(tmp_path):
    parts = iter([torch.zeros(2, 3), torch.zeros(1, 3)])
    write_shards(tmp_path, {"a": Header("F32", (3, 3))}, lambda name: parts)
    assert load_file(tmp_path / "model.safetensors")["a"].shape == (3, 3)
    with pytest.raises(AssertionError):
        write_shards(tmp_path, {"a": Header("F32", (3, 3))}, lambda name: iter([torch.zeros(2, 3)]))


def test_a_hash_in_parts_is_the_hash(source, monkeypatch):
    opened = open_checkpoint(source)
    expected = {name: tensor_sha256(opened.files.tensor(name)) for name in opened.files.stored}
    monkeypatch.setattr("manyhands.checkpoint.receipt._AT_A_TIME", 1000)
    assert {name: stored_sha256(opened.files, name) for name in opened.files.stored} == expected


def test_stacked_fp8_is_decoded_expert_by_expert():
    stacks = {"x": torch.randn(3, 4, 8).to(torch.float8_e4m3fn), "x_scale_inv": torch.rand(3, 1, 1)}
    headers = {"x": Header("F8_E4M3", (3, 4, 8)), "x_scale_inv": Header("F32", (3, 1, 1))}
    logical = logical_tensors(headers, FP8, "config.json")["x"]
    parts, whole = [stacks[name] for name in logical.parts], torch.empty(3, 4, 8)
    assert logical.decode is not None and logical.entry is not None
    logical.decode(parts, whole)
    for e in range(3):
        out = torch.empty(4, 8)
        logical.entry(parts, e, out)
        assert torch.equal(out, whole[e])
