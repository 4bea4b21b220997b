"""GGUF's types, layouts and series; what becomes of a file through load, convert and quantize."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.find import find, open_checkpoint
from manyhands.checkpoint.gguf.decode import BLOCKS, decode_into
from manyhands.checkpoint.gguf.open import open_gguf
from manyhands.checkpoint.model import load, load_model
from manyhands.config import PackedConfig, Packing
from manyhands.errors import CheckpointError
from manyhands.families.gguf.types import TYPES
from manyhands.quantize.quantize import quantize

from .gguf_bytes import U16, U32, File, Key, Tensor, byte_level, file_of, sentencepiece
from .gguf_mutations import GQA, MLA, MOE, SMALL, V3
from .hostile import make

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral, and DeepSeek-V3 and Qwen3-MoE beside it."""
    folder = tmp_path_factory.mktemp("published")
    make(folder / "mixtral", **SMALL, **GQA, moe=MOE)
    make(folder / "v3", family="deepseek_v3", **SMALL, **MLA, moe=V3)
    qk = {"attention": GQA["attention"] | {"qk_norm": "head"}}
    make(folder / "qwen3_moe", family="qwen3_moe", **SMALL, **qk, moe=MOE)
    return folder


def written(file: File, path: Path) -> Path:
    path.write_bytes(file.bytes())
    return path


def same(path: Path, directory: Path) -> None:
    expected = load_model(directory, dtype=torch.float32).state_dict()
    found = load_model(path, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_table_of_types_is_that_of_gguf() -> None:
    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {number: (block.name, block.values, block.size) for number, block in TYPES.items()} == theirs


@pytest.mark.parametrize("name", BLOCKS)
def test_every_type_is_decoded_as_gguf_decodes_it(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 700, 2 * size), dtype=np.uint8)
    raw[..., 1::2] &= 0x3F  # halves and exponents that are finite
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    whole = torch.zeros(3, 2 * 700, 2 * values)
    decode_into(torch.from_numpy(raw), name, whole[:, 700:])  # rows with others between
    assert torch.equal(whole[:, 700:].nan_to_num(7.0), expected.nan_to_num(7.0)) and not whole[:, :700].any()
    half = torch.empty(3, 700, 2 * values, dtype=torch.bfloat16)
    decode_into(torch.from_numpy(raw), name, half)
    assert torch.equal(half.nan_to_num(7.0), expected.to(torch.bfloat16).nan_to_num(7.0))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)])
def test_the_dtype_of_a_model(kind: str, dtype: torch.dtype, published: Path, tmp_path: Path) -> None:
    model = load_model(written(file_of(published / "mixtral", kind), tmp_path / "m.gguf"))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if "router" in name else dtype), name
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_old_files_with_one_tensor_per_expert(published: Path, tmp_path: Path) -> None:
    file = file_of(published / "mixtral")
    for tensor in list(file.tensors):
        if "_exps" in str(tensor.name):
            at = file.tensors.index(tensor)
            size = len(tensor.data) // 4
            name = str(tensor.name).replace("_exps.weight", "")
            file.tensors[at : at + 1] = [
                Tensor(f"{name}.{e}.weight", tensor.dims[:2], 0, tensor.data[e * size : (e + 1) * size])
                for e in range(4)
            ]
    path = written(file, tmp_path / "old.gguf")
    same(path, published / "mixtral")
    file.tensors.remove(file.tensor("blk.1.ffn_up.2.weight"))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.0\.weight.*experts of this layer"):
        load_model(written(file, path))


def test_gate_and_up_in_one_tensor(published: Path, tmp_path: Path) -> None:
    file = file_of(published / "qwen3_moe")
    for layer in range(2):
        gate, up = (file.tensor(f"blk.{layer}.ffn_{half}_exps.weight") for half in ("gate", "up"))
        size = len(gate.data) // 4
        parts = [t.data[e * size : (e + 1) * size] for e in range(4) for t in (gate, up)]
        both = Tensor(f"blk.{layer}.ffn_gate_up_exps.weight", [32, 64, 4], 0, b"".join(parts))
        file.tensors[file.tensors.index(gate)] = both
        file.tensors.remove(up)
    same(written(file, tmp_path / "m.gguf"), published / "qwen3_moe")


def test_queries_keys_and_values_in_one_tensor(published: Path, tmp_path: Path) -> None:
    file = file_of(published / "qwen3_moe")
    for layer in range(2):
        parts = [file.tensor(f"blk.{layer}.attn_{letter}.weight") for letter in "qkv"]
        rows = sum(part.dims[1] for part in parts)
        both = Tensor(f"blk.{layer}.attn_qkv.weight", [32, rows], 0, b"".join(part.data for part in parts))
        file.tensors[file.tensors.index(parts[0])] = both
        for part in parts[1:]:
            file.tensors.remove(part)
    same(written(file, tmp_path / "m.gguf"), published / "qwen3_moe")


def test_latent_attention_in_old_files(published: Path, tmp_path: Path) -> None:
    """`attn_kv_b` as it is, `key_length` that of a head; and beside the two new tensors, as some have it."""
    file = file_of(published / "v3")
    same(written(file, tmp_path / "new.gguf"), published / "v3")
    weights = load_model(published / "v3", dtype=torch.float32).state_dict()
    for layer in range(2):
        x = weights[f"layers.{layer}.self_attn.kv_b_proj.weight"]
        file.tensors.append(Tensor(f"blk.{layer}.attn_kv_b.weight", [16, len(x)], 0, x.contiguous().numpy().tobytes()))
    same(written(file, tmp_path / "both.gguf"), published / "v3")
    file.tensors = [t for t in file.tensors if "attn_k_b" not in str(t.name) and "attn_v_b" not in str(t.name)]
    file.keys = [key for key in file.keys if not str(key.name).endswith("_mla")]
    file.key("deepseek2.attention.key_length").value = 32
    file.key("deepseek2.attention.value_length").value = 16
    same(written(file, tmp_path / "old.gguf"), published / "v3")


def test_layers_for_multi_token_prediction_are_left_out(published: Path, tmp_path: Path) -> None:
    file = file_of(published / "v3")
    file.key("deepseek2.block_count").value = 3
    file.keys.append(Key("deepseek2.nextn_predict_layers", U32, 1))
    file.tensors.append(Tensor("blk.2.nextn.eh_proj.weight", [32, 32], 0, bytes(4096)))
    same(written(file, tmp_path / "m.gguf"), published / "v3")


def series(file: File, folder: Path, count: int = 3) -> list[Path]:
    size = -(-len(file.tensors) // count)
    paths = []
    for n in range(count):
        part = File(list(file.keys) if n == 0 else [], file.tensors[n * size : (n + 1) * size])
        part.keys += [Key("split.no", U16, n), Key("split.count", U16, count)]
        part.keys.append(Key("split.tensors.count", U32, len(file.tensors)))
        paths.append(written(part, folder / f"m-{n + 1:05}-of-{count:05}.gguf"))
    return paths


def test_a_series_of_files(published: Path, tmp_path: Path) -> None:
    paths = series(file_of(published / "mixtral", tokenizer=byte_level()), tmp_path)
    same(paths[0], published / "mixtral")
    assert find(tmp_path) == paths[0]  # the only model in its directory
    with pytest.raises(CheckpointError, match="give the first one, m-00001-of-00003"):
        load_model(paths[1])
    paths[1].rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: cannot be read"):
        load_model(paths[0])
    (tmp_path / "gone").rename(paths[1])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match="does not say that it is file 3 of 3"):
        load_model(paths[0])


def test_a_run_with_a_gguf_file_in_it_is_a_run(published: Path, tmp_path: Path) -> None:
    written(file_of(published / "mixtral"), tmp_path / "exported.gguf")
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run\.yaml"):
        find(tmp_path)


def test_several_models_in_a_directory(published: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(file_of(published / "mixtral"), tmp_path / f"{name}.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 models in GGUF; name one of them, as 'a\.gguf'"):
        find(tmp_path)


def test_convert_gives_the_publishers_files(published: Path, tmp_path: Path) -> None:
    path = written(file_of(published / "mixtral", tokenizer=byte_level()), tmp_path / "m.gguf")
    (tmp_path / "notes.txt").write_text("another's")
    receipt = convert(path, tmp_path / "hf")
    same(tmp_path / "hf", published / "mixtral")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mixtral"
    assert receipt["beside"] == {"copied": [], "left": []}  # what lies beside one file is not the model's
    assert receipt["agreement"]["largest_logit_difference"] == 0.0
    assert set(receipt["source"]["files"]) == {"m.gguf"}
    fates = receipt["source_tensors"]
    assert fates["blk.0.ffn_gate_inp.weight"]["how"] == "moved, bit for bit"
    assert all(entry["became"] for entry in fates.values())
    again, tokenizer = load(tmp_path / "hf")
    assert tokenizer.eos_token_ids == {258} and again.family == "mixtral"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantize_keeps_what_the_file_has_rounded(kind: str, published: Path, tmp_path: Path) -> None:
    path = written(file_of(published / "mixtral", kind, byte_level()), tmp_path / "m.gguf")
    form = kind.lower()
    packing = {"experts": Packing(format=form, group_size=32), "linear": Packing(format=form, group_size=32)}
    quantize(open_checkpoint(path), tmp_path / "packed", PackedConfig(**packing))
    expected = load_model(path).state_dict()
    for name, tensor in load_model(tmp_path / "packed", decode=True).state_dict().items():
        if "_proj" in name:
            assert torch.equal(tensor, expected[name]), name


def test_a_model_remembers_its_file(published: Path, tmp_path: Path) -> None:
    path = written(file_of(published / "v3", "Q8_0", sentencepiece()), tmp_path / "m.gguf")
    model, _ = load(path)
    (tmp_path / "notes.txt").write_text("another's")
    model.save(tmp_path / "saved")
    expected = model.state_dict()
    for name, tensor in load_model(tmp_path / "saved").state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not (tmp_path / "saved" / "notes.txt").exists()
    assert open_gguf(path).path == path
